"""Folders that are written long after a command began: what is wrong with them is said at once."""

import os
import re
import tempfile
from pathlib import Path

from batchclf.errors import ConfigError
from batchclf.store.base import translate_os_error

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")  # a Path of s3://bucket has one slash left


def check_writable(option: str, given: str | Path) -> None:
    """Whether a folder can be made and written here; nothing is left there.

    Args:
        option: that named it, for messages.
        given: the folder, which need not be there.

    Raises:
        ConfigError: it is an address and no path, or this user may not write to it.
        StoreError: the file system says no for another reason.
    """
    if _ADDRESS.match(str(given)):
        raise ConfigError(
            f"{option} {given}: must be a folder on this machine; write it here, and copy it after"
        )
    place = Path(os.path.abspath(given))  # noqa: PTH100 - a link stays what it is
    while not place.exists():
        place = place.parent
    try:
        tempfile.TemporaryDirectory(prefix=".batchclf-", dir=place).cleanup()
    except OSError as error:
        raise translate_os_error(error, f"{option} {given}") from error
