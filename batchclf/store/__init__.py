"""Where bytes live: local folders and S3. Nothing else in the package knows S3.

Two doors. `find_sources` and `open_source` read inputs; `open_folder` gives the output folder,
whose `publish` is create-only: the object that appears is the commit, and it appears once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO

from batchclf.errors import ConfigError, InputError
from batchclf.store.base import Folder, Scratch, Source, hidden, is_s3, source_suffix
from batchclf.store.local import (
    LocalFolder,
    as_path,
    check_local_unchanged,
    find_local,
    open_local,
)

__all__ = [
    "Folder",
    "Scratch",
    "Source",
    "check_separate",
    "check_unchanged",
    "find_object",
    "find_sources",
    "hidden",
    "list_objects",
    "open_folder",
    "open_source",
    "open_source_tail",
    "read_object",
    "source_suffix",
]


def find_sources(inputs: Iterable[str], endpoint_url: str | None = None) -> list[Source]:
    """Every input object behind files, folders, globs and s3:// prefixes, each once.

    Ordered by argument, then by name. In folders and prefixes, names that start with `_` or `.`
    and names without a known ending are passed over.

    Raises:
        InputError: an argument matches nothing, or names a file of an unknown kind.
    """
    sources: dict[str, Source] = {}
    for given in inputs:
        found: Sequence[Source]
        if is_s3(given):
            from batchclf.store.s3 import S3

            found = S3.connect(endpoint_url).find(given)
        else:
            found = find_local(given)
        if not found:
            raise InputError(
                f"{given}: no .parquet, .csv, .csv.gz, .jsonl or .jsonl.gz files there"
            )
        for source in found:
            sources.setdefault(source.uri, source)
    return list(sources.values())


def find_object(uri: str, endpoint_url: str | None = None) -> Source:
    """The object on S3 of exactly this name, in its current version.

    Raises:
        InputError: it is not there, may not be read, or has no known ending.
    """
    from batchclf.store.s3 import S3

    return S3.connect(endpoint_url).head(uri)


def read_object(uri: str, most_bytes: int, endpoint_url: str | None = None) -> bytes:
    """The content of the object on S3 of exactly this name, for small ones.

    Raises:
        InputError: it is not there, may not be read, or is larger than `most_bytes`.
        StoreError: the store kept failing.
    """
    from batchclf.store.s3 import S3

    return S3.connect(endpoint_url).read(uri, most_bytes)


def list_objects(uri: str, endpoint_url: str | None = None) -> Mapping[str, Source]:
    """Name to object of all that is on S3 directly under a prefix, folders in it left out.

    Raises:
        InputError: it may not be listed.
        StoreError: the store kept failing.
    """
    from batchclf.store.s3 import S3

    return S3.connect(endpoint_url).list_objects(uri)


def open_source(source: Source, endpoint_url: str | None = None) -> BinaryIO:
    """The whole of an input as a seekable file that is gone when it is closed.

    Raises:
        InputChangedError: it is no longer the version that was planned.
        InputError: it is gone or may not be read.
        StoreError: the store kept failing.
    """
    if is_s3(source.uri):
        from batchclf.store.s3 import S3

        return S3.connect(endpoint_url).download(source)
    return open_local(source)


def open_source_tail(source: Source, endpoint_url: str | None = None) -> BinaryIO:
    """An input as a seekable file that fetches only what is read: for the footer of a Parquet."""
    if is_s3(source.uri):
        from batchclf.store.s3 import S3

        return S3.connect(endpoint_url).open_ranges(source)
    return open_local(source)


def check_unchanged(source: Source) -> None:
    """Raise InputChangedError if a source may have changed under its reader.

    An object from S3 was downloaded in the planned version, so only local files can.
    """
    if not is_s3(source.uri):
        check_local_unchanged(source)


def check_separate(inputs: Iterable[str], output: str) -> None:
    """Raise ConfigError if the output is an input or lies in one: the next run would read it."""
    for given in inputs:
        if is_s3(given) != is_s3(output):
            continue
        if is_s3(output):
            inside = f"{output.rstrip('/')}/".startswith(given)
        else:
            inside = as_path(output).resolve().is_relative_to(as_path(given).resolve())
        if inside:
            raise ConfigError(
                f"the output {output} lies inside the input {given}, and the next run would take "
                "it for input; choose an output beside it"
                + (", or end the input with /" if is_s3(given) and not given.endswith("/") else "")
            )


def open_folder(uri: str, endpoint_url: str | None = None) -> Folder:
    """The output folder at a local path or an s3:// prefix."""
    if is_s3(uri):
        from batchclf.store.s3 import S3
        from batchclf.store.s3_folder import S3Folder

        return S3Folder(S3.connect(endpoint_url), uri)
    return LocalFolder(uri)
