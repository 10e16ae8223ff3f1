"""What a store is: sources to read, and a folder to publish into."""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit

from batchclf.errors import ConfigError, OutOfSpaceError, StoreError

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ENTRY = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,  # a file where a folder should be
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


@dataclass(frozen=True)
class Source:
    """One input object in one version.

    Attributes:
        uri: `file:///...` or `s3://bucket/key`.
        version: what identifies the content: the ETag on S3, `sha256:...` for a local file.
        stat: for a local file, what must stay the same between the plan and the read.
    """

    uri: str
    version: str
    size_bytes: int = field(compare=False)
    stat: tuple[int, ...] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return local_path(self.uri) if self.uri.startswith("file://") else self.uri


@dataclass
class Scratch:
    """A file being written that nobody sees until it is published under `name`."""

    name: str
    file: BinaryIO
    path: str | None = None  # where it has a name of its own, next to where it will be published


class Folder(ABC):
    """An output folder. Names are relative, with `/` between parts."""

    uri: str

    @abstractmethod
    def prepare(self) -> None:
        """Make the folder, drop what killed runs left, and prove that publishing is create-only.

        Two create-only writes of one key: if the second succeeds, the store ignores conditions.

        Raises:
            ConfigError: it cannot be written, or a second create-only write succeeds.
        """

    @abstractmethod
    def sizes(self, prefix: str) -> Mapping[str, int]:
        """Name to size in bytes of every object whose name starts with `prefix`."""

    @abstractmethod
    def open(self, name: str, *, whole: bool = False) -> BinaryIO | None:
        """A published object as a seekable file, or None where there is none.

        Args:
            name: which one.
            whole: it will be read to its end, so bring all of it here at once.
        """

    @abstractmethod
    def scratch(self, name: str) -> AbstractContextManager[Scratch]:
        """A fresh file to write to; thrown away on leaving, published or not."""

    @abstractmethod
    def publish(self, scratch: Scratch) -> bool:
        """Make the scratch file appear under its name, whole and durable, if nothing is there.

        Returns:
            True if it was created; False if an object of that name exists. After a lost reply
            that object may be ours: read it back and look.
        """

    @abstractmethod
    def put(self, name: str, content: bytes) -> None:
        """Write a small object, replacing what is there. For notes about runs, never for rows."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; no error where there is none."""


def is_s3(uri: str) -> bool:
    """Whether a location is on S3 rather than in the local file system."""
    return uri.startswith("s3://")


def local_path(uri: str) -> str:
    """The path behind a `file://` URI, also for names that are not UTF-8."""
    return unquote_to_bytes(urlsplit(uri).path).decode("utf-8", "surrogateescape")


def source_suffix(name: str) -> str | None:
    """Which kind of input a name promises: the longest known ending, lower case, or None."""
    lowered = name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if lowered.endswith(s)), None)


def hidden(relative: str) -> bool:
    """Whether readers of a folder pass over this name: a part starts with `_` or `.`."""
    return any(part.startswith(("_", ".")) for part in relative.split("/"))


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def translate_os_error(error: OSError, what: str) -> StoreError | ConfigError:
    """An error of the local file system as one of ours."""
    reason = error.strerror or str(error)
    if error.errno in _FULL_DISK:
        return OutOfSpaceError(f"{what}: {reason}; free some space and run the same command again")
    if error.errno in _NO_ENTRY:
        return ConfigError(f"{what}: {reason}; choose a folder that this user may write to")
    return StoreError(f"{what}: {reason}")
