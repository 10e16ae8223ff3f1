"""Local files and folders."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from batchclf.errors import ConfigError, InputChangedError, InputError, StoreError
from batchclf.store.base import (
    SUFFIXES,
    Folder,
    Scratch,
    Source,
    fsync,
    hidden,
    local_path,
    source_suffix,
    translate_os_error,
)

_TEMPORARY = ".batchclf-tmp"
_TEMPORARY_PLACES = ("", "fp=*/", "fp=*/_runs/")  # where this package writes, and nobody else
_HASH_THREADS = 4  # hashing releases the GIL; more only makes one disk seek
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1  # linux/fs.h; man 2 renameat2


def as_path(given: str) -> Path:
    """The path that a `file://` URI or a plain path stands for."""
    return Path(local_path(given) if given.startswith("file://") else given)


def find_local(given: str) -> list[Source]:
    """The sources behind a file, a folder (searched to its depths) or a glob, sorted by name.

    Raises:
        InputError: there is no such file, or it is of an unknown kind.
    """
    name = local_path(given) if given.startswith("file://") else given
    try:
        paths = _find_paths(name)
    except OSError as error:  # such as a name too long for any file
        raise InputError(f"{given}: {error.strerror or error}") from error
    if paths is None:
        raise InputError(f"{given}: no such file or folder")
    for found in paths:
        if source_suffix(found.name) is None:
            raise InputError(f"{found}: not a {', '.join(SUFFIXES)} file by its name")
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(_identify, paths))


def _find_paths(name: str) -> list[Path] | None:
    path = Path(name)
    if path.is_dir():
        found = (
            Path(folder, file)
            for folder, _, files in os.walk(path, onerror=_refuse)
            for file in files
        )
        return sorted(
            p
            for p in found
            if source_suffix(p.name) and not hidden(str(p.relative_to(path))) and p.is_file()
        )
    if path.exists():
        return [path]
    if glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute patterns
        return [Path(p) for p in matches if source_suffix(p) and Path(p).is_file()]
    return None


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed must not look empty."""
    raise InputError(f"{error.filename}: {error.strerror}") from error


def open_local(source: Source) -> BinaryIO:
    """Open a planned file for reading.

    Raises:
        InputError: it is gone or may not be read.
        InputChangedError: it is not the file that was planned.
    """
    try:
        file = Path(local_path(source.uri)).open("rb")  # noqa: SIM115 - the caller closes it
        stat = os.fstat(file.fileno())
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}") from error
    if source.stat is not None and _signature(stat) != source.stat:
        file.close()
        raise InputChangedError(f"{source}: replaced since the plan was made; run again")
    return file


def check_local_unchanged(source: Source) -> None:
    """Raise InputChangedError if a file was written to or replaced since it was planned."""
    try:
        now = _signature(Path(local_path(source.uri)).stat())
    except FileNotFoundError:
        return  # deleted, but whole in the hands of whoever opened it
    if source.stat is not None and now != source.stat:
        raise InputChangedError(f"{source}: replaced while it was read; run again")


def _identify(path: Path) -> Source:
    try:
        # one name for one file, by whatever way it was reached; a link keeps its own last name
        named = path.parent.resolve(strict=True) / path.name
        with path.open("rb") as file:
            before = _signature(os.fstat(file.fileno()))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = _signature(os.fstat(file.fileno()))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if before != after:
        raise InputChangedError(f"{path}: is being written to; run again when it is complete")
    size_bytes = before[0]
    return Source(named.as_uri(), f"sha256:{digest}", size_bytes, before)


def _signature(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev)


class LocalFolder(Folder):
    """A folder of the local file system."""

    def __init__(self, given: str) -> None:
        self.path = as_path(given)
        self.uri = str(self.path)

    def prepare(self) -> None:
        with self._errors():
            self.path.mkdir(parents=True, exist_ok=True)
            for place in _TEMPORARY_PLACES:
                for leftover in self.path.glob(f"{place}.*{_TEMPORARY}"):
                    _remove_if_abandoned(leftover)
        # The first scratch file, and with it the lock on the probe, stays until the probe is gone:
        # what a killed run leaves of it is cleared away above.
        name = f".probe-{uuid.uuid4().hex}{_TEMPORARY}"
        with self.scratch(name) as first:
            try:
                created = [self.publish(first)]
                with self.scratch(name) as second:
                    created.append(self.publish(second))
            finally:
                self.delete(name)
        if created != [True, False]:
            raise ConfigError(
                f"{self.uri}: this file system replaced a file that may only be created, so rows "
                "could be lost. Use a folder on a local disk, or S3"
            )

    def sizes(self, prefix: str) -> Mapping[str, int]:
        top = self.path / prefix.rpartition("/")[0]
        with self._errors():
            return {
                str(path.relative_to(self.path)): path.stat().st_size
                for path in top.rglob("*")
                if path.is_file()
                and path.suffix != _TEMPORARY
                and str(path.relative_to(self.path)).startswith(prefix)
            }

    def open(self, name: str, *, whole: bool = False) -> BinaryIO | None:  # noqa: ARG002 - it is here
        with self._errors():
            try:
                return (self.path / name).open("rb")
            except FileNotFoundError:
                return None

    @contextmanager
    def scratch(self, name: str) -> Iterator[Scratch]:
        final = self.path / name
        with self._errors():
            final.parent.mkdir(parents=True, exist_ok=True)
            file, path = _create_locked(final)
            try:
                yield Scratch(name, file, str(path))
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # a full disk was reported by the write already
                    file.close()

    def publish(self, scratch: Scratch) -> bool:
        final = self.path / scratch.name
        if scratch.path is None:
            raise StoreError(f"{final}: the scratch file is not of this folder")
        with self._errors():
            scratch.file.flush()
            os.fsync(scratch.file.fileno())
            created = _move_if_absent(Path(scratch.path), final)
            fsync(final.parent)
        return created

    def put(self, name: str, content: bytes) -> None:
        with self.scratch(name) as scratch, self._errors():
            scratch.file.write(content)
            scratch.file.flush()
            os.fsync(scratch.file.fileno())
            Path(str(scratch.path)).replace(self.path / name)
            fsync((self.path / name).parent)

    def delete(self, name: str) -> None:
        with self._errors():
            (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise translate_os_error(error, self.uri) from error


def _create_locked(final: Path) -> tuple[BinaryIO, Path]:
    """A new temporary file beside `final`, locked for as long as its writer lives.

    The lock guards no rows: it only tells `_remove_if_abandoned` that somebody is still writing.
    """
    while True:
        path = final.with_name(f".{final.name[:150]}.{uuid.uuid4().hex[:12]}{_TEMPORARY}")
        file = path.open("x+b")
        with contextlib.suppress(OSError):  # no locks here: then nobody can clean up either
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for a starting worker that is removing it
        if path.exists():  # else a starting worker took it for abandoned before it was locked
            return file, path
        file.close()


def _remove_if_abandoned(path: Path) -> None:
    try:
        with path.open("r+b") as file:  # NFS locks only what is open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except (FileNotFoundError, BlockingIOError):
        return  # gone already, or its writer lives
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise


def _move_if_absent(temporary: Path, final: Path) -> bool:
    """Give a complete file its final name unless that name is taken; no moment with half of it."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _rename_noreplace(temporary, final)
    temporary.unlink()
    return True


def _rename_noreplace(temporary: Path, final: Path) -> bool:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        old, new = os.fsencode(temporary), os.fsencode(final)
        if renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) == 0:
            return True
        code = ctypes.get_errno()
        if code == errno.EEXIST:
            return False
        if code not in (errno.EINVAL, *_NO_HARD_LINKS):  # neither of which means: not here
            raise OSError(code, os.strerror(code), str(final))
    raise ConfigError(
        f"{final.parent}: this file system has neither hard links nor a rename that does not "
        "replace, so two workers could overwrite each other. Use another folder, or S3"
    )
