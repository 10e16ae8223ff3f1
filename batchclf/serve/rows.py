"""The body of a request as rows, read by the readers of `classify`."""

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Literal

import pyarrow as pa

from batchclf.config import ReadSettings
from batchclf.errors import InputError
from batchclf.serve.media import CSV, JSON, JSON_LINES, PARQUET, MediaType
from batchclf.serve.refusal import Refusal, too_large_inside, unreadable
from batchclf.serve.settings import Limits
from batchclf.source import Reader, RowBatch, open_reader
from batchclf.source.base import record_batch
from batchclf.store import Source
from batchclf.text import join_text

# How a JSON body holds its texts, and so how its answer looks.
Shape = Literal["one", "list", "instances"]

# A column that is one value many times is small in the body and large in memory; so the memory is
# bounded too.
_MOST_EXPANSION = 8
_NOTHING_KEPT = record_batch([], pa.schema([]), 1)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rows:
    """What was asked to be classified.

    Attributes:
        texts: [rows] None where `errors` has the row.
        errors: row -> `code: short reason`.
        kept: the columns that travel to the answer, batch by batch.
        kept_schema: theirs.
        shape: of a JSON body.
    """

    texts: list[str | None]
    errors: dict[int, str]
    kept: list[pa.RecordBatch]
    kept_schema: pa.Schema
    shape: Shape = "list"


@dataclass
class _Growing:
    texts: list[str | None] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    kept: list[pa.RecordBatch] = field(default_factory=list)


def read_rows(body: bytes, media: MediaType, settings: ReadSettings, limits: Limits) -> Rows:
    """The rows of a body.

    Raises:
        Refusal: it is not what its type says, lacks a column, or is too large.
    """
    shape: Shape = "list"
    if media.name == JSON:
        content = _parse_json(body)
        if (text := _simple_text(content, settings)) is not None:
            return Rows([text], {}, [_NOTHING_KEPT], _NOTHING_KEPT.schema, "one")
        body, shape = _json_to_lines(content, settings, limits)
    elif media.name == CSV and not media.has_header:
        body = _header(settings) + body.removeprefix(b"\xef\xbb\xbf")
    try:
        reader = _open(body, media, settings, limits)
        num_rows = _count(reader, limits)
        found = _read(reader, num_rows, settings, limits)
    except InputError as error:
        raise unreadable(error) from error
    return Rows(found.texts, found.errors, found.kept, reader.kept_schema, shape)


def _open(body: bytes, media: MediaType, settings: ReadSettings, limits: Limits) -> Reader:
    file: BinaryIO = io.BytesIO(body)
    suffix = {JSON: "jsonl", JSON_LINES: "jsonl", CSV: "csv", PARQUET: "parquet"}[media.name]
    source = Source(f"body.{suffix}", version="", size_bytes=len(body))
    if media.name != PARQUET:
        return open_reader(file, source, settings)
    # pyarrow may hang at exit after a damaged page of a Python file; not with its own.
    bounded = replace(settings, max_source_bytes=_MOST_EXPANSION * limits.max_body_bytes)
    return open_reader(pa.BufferReader(body), source, bounded)


def _count(reader: Reader, limits: Limits) -> int:
    num_rows = reader.contents(limits.max_rows + 1).num_rows
    if num_rows > limits.max_rows:
        raise Refusal(
            413,
            "too_many_rows",
            f"the body has {num_rows} rows; send at most {limits.max_rows} at once",
        )
    return num_rows


def _read(reader: Reader, num_rows: int, settings: ReadSettings, limits: Limits) -> _Growing:
    found = _Growing()
    most_bytes = _MOST_EXPANSION * limits.max_body_bytes
    size = 0
    for batch in _batches(reader, num_rows):
        texts = join_text(dict(zip(settings.text_columns, batch.text, strict=True)))
        for row in batch.faults:
            texts.texts[row] = None
        first = len(found.texts)
        found.texts += texts.texts
        errors = texts.errors | batch.faults
        found.errors |= {first + row: error for row, error in errors.items()}
        found.kept.append(batch.kept)
        size += batch.kept.nbytes + sum(column.nbytes for column in batch.text)
        if size > most_bytes:
            raise too_large_inside()
    return found


def _batches(reader: Reader, num_rows: int) -> Iterator[RowBatch]:
    if num_rows:
        yield from reader.read(0, num_rows)


def _parse_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except UnicodeDecodeError as error:
        raise Refusal(400, "not_json", f"the body is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise Refusal(400, "not_json", "the body is nested too deeply") from error
    except ValueError as error:
        raise Refusal(400, "not_json", f"the body is not JSON: {error}") from error


def _simple_text(content: Any, settings: ReadSettings) -> str | None:
    """The text of an object with texts and nothing else: the most frequent body, read at once.

    None for any other body, and for texts with anything wrong: the readers say what.
    """
    if not isinstance(content, dict) or tuple(content) != settings.text_columns:
        return None
    texts = list(content.values())
    if settings.keep == "all" or not all(isinstance(text, str) for text in texts):
        return None
    text = "\n".join(texts)
    # What cannot be UTF-8 are lone surrogates.
    is_valid = text.isascii() or not _SURROGATE.search(text)
    return text if is_valid and text and not text.isspace() else None


def _json_to_lines(content: Any, settings: ReadSettings, limits: Limits) -> tuple[bytes, Shape]:
    """A JSON body as JSON lines, so that its rows are judged as those of files are."""
    shape: Shape = "list"
    instances: Any = content
    if isinstance(content, dict):
        shape = "instances" if "instances" in content else "one"
        instances = content["instances"] if shape == "instances" else [content]
    if not isinstance(instances, list):
        example = json.dumps(dict.fromkeys(settings.text_columns, "..."))
        raise Refusal(
            400,
            "wrong_shape",
            f'send {example}, a list of those, or {{"instances": [...]}}',
        )
    if len(instances) > limits.max_rows:
        raise Refusal(
            413,
            "too_many_rows",
            f"the body has {len(instances)} rows; send at most {limits.max_rows} at once",
        )
    return b"".join(_json_line(instance, settings.text_columns) for instance in instances), shape


def _json_line(instance: Any, text_columns: Sequence[str]) -> bytes:
    """One line of ASCII; lone surrogates stay what they are, as escapes."""
    if isinstance(instance, str):
        instance = {text_columns[0]: instance}
    return json.dumps(instance).encode("ascii") + b"\n"


def _header(settings: ReadSettings) -> bytes:
    names = (name.replace('"', '""') for name in settings.text_columns)
    return settings.delimiter.join(f'"{name}"' for name in names).encode() + b"\n"
