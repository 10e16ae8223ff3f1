"""JSON lines."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from batchclf.source import lines
from batchclf.source.lines import (
    LinesReader,
    Unparseable,
    decode,
    replace_bad,
    too_long,
    too_many,
)

_HEAD_ROWS = 1000  # in which a text column has to show up


class JsonLinesReader(LinesReader):
    """Rows are lines with one JSON object each."""

    def _find_columns(self) -> tuple[str, ...]:
        """The keys of the first objects, or of all where all are kept."""
        most = None if self._settings.keep == "all" else _HEAD_ROWS
        columns: dict[str, None] = {}
        for record in islice(self._parse(at_start=True), most):
            value = _parse_json(record)
            if isinstance(value, dict):
                columns |= dict.fromkeys(value)
        if columns:
            return tuple(replace_bad(name) for name in columns)
        # no objects there: then the declared columns, for a file of no rows or of bad ones
        keep = self._settings.keep if isinstance(self._settings.keep, tuple) else ()
        id_column = (self._settings.id_column,) if self._settings.id_column else ()
        return tuple(dict.fromkeys((*self._settings.text_columns, *keep, *id_column)))

    def _parse(self, at_start: bool) -> Iterator[Any]:  # noqa: ARG002 - there is no header
        return (line for line in self._lines() if not line.isspace())

    def _fields(self, record: bytes, names: Sequence[str]) -> tuple[list[str | None], str | None]:
        value = _parse_json(record)
        if isinstance(value, Unparseable):
            return [None] * len(names), f"unparseable: {value.reason}"
        return read_object(value, self._settings.text_columns, names)


def read_object(
    value: Mapping[str, Any], text_columns: Sequence[str], names: Sequence[str]
) -> tuple[list[str | None], str | None]:
    """The named fields of a JSON object as strings, and what is wrong with its text, if so."""
    fault = None
    for name in text_columns:
        text = value.get(name)
        if text is not None and not isinstance(text, str):
            fault = f"not_text: {name!r} is a JSON {_json_kind(text)}"
    return [_as_string(value.get(name)) for name in names], fault


def _parse_json(line: bytes) -> dict[str, Any] | Unparseable:
    if len(line) >= lines.MAX_ROW_BYTES:
        return Unparseable(too_long())
    if len(line) > lines.MAX_ROW_VALUES and _num_values(line) > lines.MAX_ROW_VALUES:
        return Unparseable(too_many())
    try:
        value = json.loads(decode(line))
    except RecursionError:
        return Unparseable("JSON nested too deeply")
    except ValueError as error:
        return Unparseable(f"not JSON: {error}")
    if not isinstance(value, dict):
        return Unparseable(f"a JSON {_json_kind(value)}, not an object")
    return value


def _num_values(line: bytes) -> int:
    """An upper bound: whatever follows another value or opens one is counted."""
    return sum(map(line.count, (b",", b"[", b"{")))


def _json_kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "null" if value is None else "object")


def _as_string(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
