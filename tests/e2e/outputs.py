"""What `batchclf classify` left in a local folder, for tests to look at."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

PREFIX = "batchclf."


def fingerprint_folder(output: Path) -> Path:
    """The one folder `fp=...`."""
    (folder,) = output.glob("fp=*")
    return folder


def output_files(output: Path) -> list[Path]:
    """The labelled files, by name."""
    return sorted(fingerprint_folder(output).glob("*.parquet"))


def footer(path: Path) -> dict[str, str]:
    """What a labelled file says of itself, without the prefix of the keys."""
    metadata = pq.read_metadata(path).metadata
    return {
        key.decode().removeprefix(PREFIX): value.decode()
        for key, value in metadata.items()
        if key.startswith(PREFIX.encode())
    }


def source_name(footer: Mapping[str, str]) -> str:
    """File name of the source that a footer is of."""
    source = footer["source"]
    return (source if source.startswith("s3://") else unquote(source)).rsplit("/", 1)[-1]


def read_source(output: Path, name: str) -> pa.Table:
    """All rows of the source with this file name, in their order."""
    found = {path: footer(path) for path in output_files(output)}
    paths = [path for path in found if source_name(found[path]) == name]
    paths.sort(key=lambda path: int(found[path]["start"]))
    return pa.concat_tables([pq.read_table(path, partitioning=None) for path in paths])


def read_sources(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Name of a source -> its rows."""
    names = {source_name(footer(path)) for path in output_files(output)}
    return {name: read_source(output, name).to_pylist() for name in sorted(names)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too: relative name -> bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
