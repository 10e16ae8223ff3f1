"""The user's cache, where what can be had again is kept."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/batchclf`, by default in `~/.cache`; it need not be there yet.

    None where this user has no home, as in a container with a number for a user.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "batchclf"
    except RuntimeError:
        return None
