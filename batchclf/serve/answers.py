"""Rows and their predictions as the body of an answer."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from batchclf.predictions import Predictions, to_record_batch
from batchclf.schema import output_schema
from batchclf.serve.media import CSV, JSON, PARQUET, MediaType
from batchclf.serve.refusal import Refusal
from batchclf.serve.rows import Rows

_PROBS_PREFIX = "probs."


def write_answer(
    rows: Rows,
    predictions: Predictions,
    labels: Sequence[str],
    media: MediaType,
    read_chars: Sequence[int | None] | None,
) -> bytes:
    """The body of an answer.

    Args:
        rows: what was asked.
        predictions: of all of them.
        labels: in the order of the classes.
        media: what is written.
        read_chars: with JSON, how many characters of each text the model saw; then one text is
            answered with all that is known of it, not with its probabilities alone.

    Raises:
        Refusal: a single text that cannot be labelled has no probabilities to answer with.
    """
    if media.name == JSON and rows.shape == "one" and read_chars is None:
        return _dump(_only_probabilities(predictions, labels))
    table = to_table(rows, predictions, labels)
    if media.name == PARQUET:
        return _write_parquet(table)
    if media.name == CSV:
        return _write_csv(table, header=media.has_header)
    objects = _to_objects(table, read_chars)
    if media.name == JSON:
        if rows.shape == "one":
            return _dump(objects[0])
        return _dump({"predictions": objects} if rows.shape == "instances" else objects)
    return b"".join(_dump(row) + b"\n" for row in objects)


def to_table(rows: Rows, predictions: Predictions, labels: Sequence[str]) -> pa.Table:
    """The columns that `classify` writes."""
    schema = output_schema(rows.kept_schema, labels, probs=True)
    names = pa.array(labels, pa.string())
    batches = []
    first = 0
    for kept in rows.kept:
        part = predictions.rows(first, first + kept.num_rows)
        batches.append(to_record_batch(first, kept, part, names, schema))
        first += kept.num_rows
    return pa.Table.from_batches(batches, schema)


def _only_probabilities(predictions: Predictions, labels: Sequence[str]) -> dict[str, float]:
    """What the original project's endpoint answers: label -> probability, the best first."""
    if predictions.errors:
        code, _, reason = predictions.errors[0].partition(": ")
        raise Refusal(422, code, f"the text cannot be labelled: {reason}")
    return _by_probability(dict(zip(labels, predictions.probs[0].tolist(), strict=True)))


def _by_probability(probs: dict[str, float]) -> dict[str, float]:
    return dict(sorted(probs.items(), key=lambda pair: -pair[1]))


def _to_objects(table: pa.Table, read_chars: Sequence[int | None] | None) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = table.to_pylist()
    for row, content in enumerate(objects):
        if content["probs"] is not None:
            content["probs"] = _by_probability(content["probs"])
        if read_chars is not None:
            content["read_chars"] = read_chars[row]
    return objects


def _plain(value: Any) -> str:
    """Values of kept columns that JSON does not know: bytes, times, decimals."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


# Made once: `json.dumps` makes an encoder at every call with options.
_TO_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_plain).encode


def _dump(content: Any) -> bytes:
    return _TO_JSON(content).encode()


def _write_parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    return file.getvalue()


def _write_csv(table: pa.Table, *, header: bool) -> bytes:
    columns: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name == "probs":
            names = [f"{_PROBS_PREFIX}{label.name}" for label in column.type]
            columns |= dict(zip(names, column.flatten(), strict=True))
        else:
            columns[name] = _as_csv(column)
    file = io.BytesIO()
    options = pyarrow.csv.WriteOptions(include_header=header, quoting_style="needed")
    pyarrow.csv.write_csv(pa.table(columns), file, options)
    return file.getvalue()


def _as_csv(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """A column that CSV can hold; what it cannot is written as JSON."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_nested(column.type) or _is_binary(column.type)):
        return column
    return pa.array(
        [None if value is None else _as_text(value) for value in column.to_pylist()], pa.string()
    )


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(test(kind) for test in (*tests, types.is_fixed_size_binary))


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return _plain(value)
    return json.dumps(value, ensure_ascii=False, default=_plain)
