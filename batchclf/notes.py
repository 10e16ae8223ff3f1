"""Notes that a run leaves beside its output, as JSON: what was planned, and what was done."""

import json
from typing import Any

from batchclf.errors import OutputError
from batchclf.store import Folder

SUCCESS_NAME = "_SUCCESS.json"
RUNS = "_runs/"
NOTE_FORMAT = 1


def read_note(folder: Folder, name: str) -> dict[str, Any] | None:
    """A JSON note that a run left in the output, or None where there is none.

    Raises:
        OutputError: it is not such a note.
    """
    file = folder.open(name)
    if file is None:
        return None
    with file:
        try:
            note = json.loads(file.read())
        except ValueError as error:
            raise OutputError(f"{folder.uri}/{name}: not JSON: {error}") from error
    if not isinstance(note, dict) or note.get("format") != NOTE_FORMAT:
        raise OutputError(f"{folder.uri}/{name}: not a note of this version of batchclf")
    return note
