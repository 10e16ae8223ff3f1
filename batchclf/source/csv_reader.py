"""CSV."""

import csv
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

from batchclf.errors import InputError
from batchclf.source import lines
from batchclf.source.lines import (
    LinesReader,
    Unparseable,
    decode,
    replace_bad,
    too_long,
    too_many,
)

_END = "\ud800"  # comes after the last line; decoding never gives it


class CsvReader(LinesReader):
    """Rows are lists of fields under a header line; quoted fields may hold line breaks."""

    def _find_columns(self) -> tuple[str, ...]:
        header = next(self._parse_rows(), None)
        if header is None:
            raise InputError(f"{self._source}: empty, without even a header line")
        if isinstance(header, Unparseable):
            raise InputError(f"{self._source}: the header cannot be read: {header.reason}")
        return tuple(replace_bad(name) for name in header)

    def _parse(self, at_start: bool) -> Iterator[Any]:
        rows = self._parse_rows()
        if at_start:
            next(rows, None)  # the header
        return rows

    def _parse_rows(self) -> Iterator[list[str] | Unparseable]:
        csv.field_size_limit(lines.MAX_ROW_BYTES)
        feed = _Feed(self._settings.delimiter)
        with_end = chain(map(feed.decode, self._lines()), [_END])
        rows = csv.reader(with_end, delimiter=self._settings.delimiter)
        while True:
            feed.begin_row()
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Unparseable(str(error).split(" - ")[0])
                continue
            if row == [_END]:
                return
            if row and row[-1].endswith(_END):
                yield Unparseable("a quote in it is never closed, so it goes on to the end")
            elif row:  # blank lines are no rows
                yield row

    def _fields(
        self, record: list[str] | Unparseable, names: Sequence[str]
    ) -> tuple[list[str | None], str | None]:
        if isinstance(record, Unparseable):
            return [None] * len(names), f"unparseable: {record.reason}"
        fault = None
        if len(record) != len(self._columns):
            fault = f"unparseable: {len(record)} fields where the header has {len(self._columns)}"
        indices = self._index
        return [
            record[indices[name]] if indices[name] < len(record) else None for name in names
        ], fault

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self._columns)}


class _Feed:
    """Lines for csv, which begins a new row with the next one where this one is refused.

    A row may go on over many lines, and csv would gather it without bound.
    """

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter.encode()
        self._num_bytes = 0
        self._num_values = 0

    def begin_row(self) -> None:
        self._num_bytes = self._num_values = 0

    def decode(self, line: bytes) -> str:
        self._num_bytes += len(line)
        if self._num_bytes >= lines.MAX_ROW_BYTES:
            raise csv.Error(too_long())
        if self._num_bytes > lines.MAX_ROW_VALUES:  # with fewer bytes it has fewer values
            self._num_values += line.count(self._delimiter)
            if self._num_values > lines.MAX_ROW_VALUES:
                raise csv.Error(too_many())
        return decode(line)
