"""A model directory on S3, downloaded once into the user's cache.

    $XDG_CACHE_HOME/batchclf/models/<key>/<last part of the prefix>/config.json, ...
    $XDG_CACHE_HOME/batchclf/models/<key>.download, <key>.use

The key is a hash of the prefix and of what is there, name by name and ETag by ETag, so a model that
was replaced has another one. A directory appears by a rename, whole. Locks: who downloads holds the
first one, so that many workers on a machine download once; who uses a model shares the second one
for as long as it lives, so that nothing in use is cleared away. Deleting the whole folder while
nobody uses it is always safe.
"""

import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from batchclf.cache import cache_folder
from batchclf.checkpoint.files import (
    BUILD_FILES,
    BUILD_FOLDER,
    CONFIG,
    JSON_FILES,
    PICKLES,
    TEXT_FILES,
    WEIGHTS,
    WEIGHTS_FILES,
    WEIGHTS_INDEX,
)
from batchclf.errors import CheckpointError, ConfigError, InputChangedError, InputError
from batchclf.log import fields
from batchclf.store import Source, list_objects, open_source
from batchclf.store.base import translate_os_error

log = logging.getLogger(__name__)

MOST_MODEL_BYTES = 16 << 30  # the largest GPT-2 has 6 GiB in float32
MOST_CACHE_BYTES = 32 << 30  # of all models; those least recently used go first
_CHUNK_BYTES = 1 << 20
_KEY_DIGITS = 32

# Descriptors whose shared locks say that this process uses a model; it keeps them to its end.
_in_use: dict[Path, int] = {}


def fetch_model(uri: str, *, weights: bool, build: bool, endpoint_url: str | None) -> Path:
    """The directory of a model on S3 with the files that are known, and no others.

    Args:
        uri: `s3://bucket/prefix`.
        weights: whether they are wanted too.
        build: whether what `batchclf build` made of it is wanted too, if it is there.
        endpoint_url: another server of the S3 protocol.

    Raises:
        CheckpointError: there is no model, or it may not be read.
        InputChangedError: it was replaced while it was downloaded.
        CredentialsError, StoreError: as `open_source`.
        OutOfSpaceError, ConfigError: there is no room for it, or no place.
    """
    uri = uri.rstrip("/")
    try:
        listed = dict(list_objects(uri, endpoint_url))
        if build:
            found = list_objects(f"{uri}/{BUILD_FOLDER}", endpoint_url)
            listed |= {f"{BUILD_FOLDER}/{name}": source for name, source in found.items()}
        wanted = _choose_files(uri, listed, weights=weights)
        models = _models_folder()
        key = _key(uri, wanted)
        directory = models / key / uri.rsplit("/", 1)[-1]
        try:
            models.mkdir(parents=True, exist_ok=True, mode=0o700)
            if directory not in _in_use:
                _in_use[directory] = _lock(models / f"{key}.use", fcntl.LOCK_SH)
            if not _is_whole(directory, wanted):
                with _alone(models / f"{key}.download"):
                    if not _is_whole(directory, wanted):
                        _download(uri, wanted, directory, endpoint_url)
                        _clear(models, keep=key)
            os.utime(directory.parent)
        except OSError as error:
            raise translate_os_error(error, f"the cache {models} (XDG_CACHE_HOME)") from error
    except InputChangedError:
        raise
    except InputError as error:
        raise CheckpointError(f"no model can be had: {error}") from error
    return directory


def _models_folder() -> Path:
    folder = cache_folder()
    if folder is None:
        raise ConfigError("this user has no home to download a model into; set XDG_CACHE_HOME")
    return folder / "models"


def _choose_files(uri: str, listed: Mapping[str, Source], *, weights: bool) -> dict[str, Source]:
    """Those that make a model, by name."""
    if not listed:
        raise CheckpointError(f"{uri}: there is no such prefix; name the one that holds {CONFIG}")
    if CONFIG not in listed:
        raise CheckpointError(
            f"{uri}/{CONFIG} is missing; a model directory holds {CONFIG}, {WEIGHTS} and "
            "tokenizer.json"
        )
    known = (*JSON_FILES, *TEXT_FILES, *BUILD_FILES)
    chosen = {name: listed[name] for name in known if name in listed}
    if weights:
        safetensors = [name for name in listed if fnmatch.fnmatch(name, WEIGHTS_FILES[0])]
        if WEIGHTS in listed:
            safetensors = [WEIGHTS]
        elif WEIGHTS_INDEX not in listed:
            pickles = [name for name in listed if Path(name).suffix in PICKLES]
            raise CheckpointError(
                f"{uri}/{WEIGHTS} is missing"
                + (f", and the pickle {min(pickles)} is never read" if pickles else "")
            )
        chosen |= {name: listed[name] for name in safetensors}
    num_bytes = sum(source.size_bytes for source in chosen.values())
    if num_bytes > MOST_MODEL_BYTES:
        raise CheckpointError(
            f"{uri}: its files have {num_bytes:,} bytes, more than any GPT-2; "
            f"at most {MOST_MODEL_BYTES:,} are downloaded"
        )
    return chosen


def _key(uri: str, wanted: Mapping[str, Source]) -> str:
    there = [uri, sorted((name, source.version) for name, source in wanted.items())]
    return hashlib.sha256(json.dumps(there).encode()).hexdigest()[:_KEY_DIGITS]


def _lock(path: Path, kind: int) -> int:
    """A descriptor that is locked, once others let go of the file, until it is closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with suppress(OSError):  # no locks here: two may download at once, and nothing is cleared away
        fcntl.flock(descriptor, kind)
    return descriptor


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    descriptor = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def _is_whole(directory: Path, wanted: Mapping[str, Source]) -> bool:
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == source.size_bytes
        for name, source in wanted.items()
    )


def _download(
    uri: str, wanted: Mapping[str, Source], directory: Path, endpoint_url: str | None
) -> None:
    num_bytes = sum(source.size_bytes for source in wanted.values())
    log.info(
        "downloading the model %s (%.1f MiB)",
        uri,
        num_bytes / (1 << 20),
        extra=fields(model=uri, bytes=num_bytes, cached=str(directory)),
    )
    temporary = directory.parent.with_name(f".{directory.parent.name}.{uuid.uuid4().hex}.tmp")
    try:
        for name, source in wanted.items():
            path = temporary / directory.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_source(source, endpoint_url) as downloaded, path.open("wb") as file:
                shutil.copyfileobj(downloaded, file, _CHUNK_BYTES)
                file.flush()
                os.fsync(file.fileno())
        # What may be there is damaged, or of a process that could not lock.
        shutil.rmtree(directory.parent, ignore_errors=True)
        temporary.rename(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _clear(models: Path, keep: str) -> None:
    """Remove the models least recently used, of those that nobody uses, until the rest is small."""
    found = sorted(
        (path for path in models.iterdir() if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    num_bytes = sum(_size(path) for path in found if path.name == keep)
    for path in found:
        if path.name == keep:
            continue
        num_bytes += _size(path)
        if num_bytes > MOST_CACHE_BYTES or path.name.startswith("."):
            _remove_unused(path)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _remove_unused(path: Path) -> None:
    """Remove a model that no process holds the lock of, or what a killed download left."""
    key = path.name.strip(".").partition(".")[0]
    with (path.parent / f"{key}.use").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        shutil.rmtree(path, ignore_errors=True)
