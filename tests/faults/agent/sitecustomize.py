"""Imported at the start of a batchclf process whose PYTHONPATH names this folder.

Counts the calls of os.fsync, os.link, os.unlink and os.replace on files under FAULT_FOLDER, and
sends the process the signal FAULT_SIGNAL just before call number FAULT_CALL, on the thread that
makes it. Each call, made or not, is a line in the file FAULT_LOG.

FAULT_READ_TIMEOUT is the most seconds that a client of boto3 waits for a reply, in place of a
minute.
"""

import itertools
import os
import signal
from typing import Any

_CALLS = ("fsync", "link", "unlink", "replace")


def _path_of(file: Any) -> str:
    return os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(file)  # noqa: PTH100, PTH115 - pathlib calls what is replaced here


def _watch(folder: str, log: str, wanted: int, number: int) -> None:
    numbers = itertools.count(1)
    lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watched(name: str) -> Any:
        call = getattr(os, name)

        def before_call(file: Any, *args: Any, **kwargs: Any) -> Any:
            path = _path_of(file)
            if path.startswith(folder):
                os.write(lines, f"{name} {os.path.relpath(path, folder)}\n".encode())
                if next(numbers) == wanted:
                    signal.raise_signal(number)
            return call(file, *args, **kwargs)

        return before_call

    for name in _CALLS:
        setattr(os, name, watched(name))


def _hurry(most_s: float) -> None:
    from botocore.config import Config

    make = Config.__init__

    def made(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.read_timeout = min(self.read_timeout, most_s)

    Config.__init__ = made


if "FAULT_READ_TIMEOUT" in os.environ:
    _hurry(float(os.environ["FAULT_READ_TIMEOUT"]))
if "FAULT_FOLDER" in os.environ:
    _watch(
        os.environ["FAULT_FOLDER"],
        os.environ["FAULT_LOG"],
        int(os.environ.get("FAULT_CALL", "0")),
        int(os.environ.get("FAULT_SIGNAL", "0")),
    )
