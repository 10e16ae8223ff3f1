"""What CSV and JSON lines share: a cursor over the records in lines, and arrays of strings."""

import gzip
import math
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from batchclf.config import ReadSettings
from batchclf.errors import InputError
from batchclf.schema import output_name
from batchclf.shards import Contents
from batchclf.source.base import BATCH_BYTES, BATCH_ROWS, Reader, RowBatch, record_batch
from batchclf.store import Source

MAX_ROW_BYTES = 128 << 20  # a longer line is no row but damage, such as a quote never closed
# A short one takes up to 200 bytes of memory. As many as this are no article: in 128 MiB of text,
# a comma every 32 characters.
MAX_ROW_VALUES = 1 << 22
_UTF8_BOM = b"\xef\xbb\xbf"


class GzipFile(gzip.GzipFile):
    """Closes what it reads from."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


@dataclass(frozen=True)
class Unparseable:
    """A record that is none, and why."""

    reason: str


class LinesReader(Reader):
    """What CSV and JSON lines share: a cursor over parsed records, and batches made of them."""

    def __init__(self, file: BinaryIO, source: Source, settings: ReadSettings) -> None:
        super().__init__(file, source, settings)
        self._position = -1  # of the next record
        self._offset = 0  # bytes taken by the records so far
        self._most_bytes = (
            math.inf if settings.max_source_bytes is None else settings.max_source_bytes
        )
        self._most_line_bytes = int(min(MAX_ROW_BYTES, self._most_bytes + 1))
        self._records: Iterator[Any] = iter(())
        with self._errors():
            self._skip_bom()
            self._columns = self._find_columns()
        self._kept = self._choose_columns(self._columns)
        self.kept_schema = pa.schema(
            [pa.field(output_name(name, self._kept), pa.string()) for name in self._kept]
        )

    @abstractmethod
    def _find_columns(self) -> tuple[str, ...]:
        """The columns of the source; leaves the file anywhere."""

    @abstractmethod
    def _parse(self, at_start: bool) -> Iterator[Any]:
        """Records from where the file stands, `_offset` following along."""

    @abstractmethod
    def _fields(self, record: Any, names: Sequence[str]) -> tuple[list[str | None], str | None]:
        """The named fields of a record, and why it is not one, if so."""

    def contents(self, rows_per_shard: int) -> Contents:
        offsets = {}
        with self._errors():
            self._rewind()
            while True:
                if self._position % rows_per_shard == 0 and not self._compressed:
                    offsets[self._position] = self._offset
                before = self._position
                self._position += sum(1 for _ in islice(self._records, rows_per_shard))
                if self._position - before < rows_per_shard:
                    return Contents(self._position, offsets=offsets)

    def read(self, start: int, stop: int, offset: int | None = None) -> Iterator[RowBatch]:
        with self._errors():
            if self._position != start:
                self._go_to(start, offset)
            while self._position < stop:
                batch = self._read_batch(min(BATCH_ROWS, stop - self._position))
                if not batch.num_rows:
                    raise self._ended_early(start, stop, self._position)
                yield batch

    def _read_batch(self, most: int) -> RowBatch:
        text_names = self._settings.text_columns
        rows: list[list[str | None]] = []
        faults: dict[int, str] = {}
        first_row, first_offset = self._position, self._offset
        for record in islice(self._records, most):
            values, fault = self._fields(record, (*text_names, *self._kept))
            if fault is not None:
                faults[len(rows)] = fault
            rows.append(values)
            if self._offset - first_offset > BATCH_BYTES:
                break
        self._position += len(rows)
        text, kept = string_arrays(rows, len(text_names), len(self._kept))
        return RowBatch(first_row, text, record_batch(kept, self.kept_schema, len(rows)), faults)

    def _go_to(self, start: int, offset: int | None) -> None:
        if offset is not None and not self._compressed:
            self._file.seek(offset)
            self._offset = offset
            self._position = start
            self._records = self._parse(at_start=False)
            return
        if not 0 <= self._position < start:
            self._rewind()
        self._position += sum(1 for _ in islice(self._records, start - self._position))

    def _rewind(self) -> None:
        self._file.seek(0)
        self._offset = 0
        self._skip_bom()
        self._position = 0
        self._records = self._parse(at_start=True)

    def _skip_bom(self) -> None:
        if self._file.read(len(_UTF8_BOM)) == _UTF8_BOM:
            self._offset = len(_UTF8_BOM)
        else:
            self._file.seek(0)

    @property
    def _compressed(self) -> bool:
        return isinstance(self._file, gzip.GzipFile)

    def _lines(self) -> Iterator[bytes]:
        """Lines with their ends, each at most MAX_ROW_BYTES and a rest that is dropped."""
        while line := self._next_line():
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                while (rest := self._next_line()) and not rest.endswith(b"\n"):
                    pass
            yield line

    def _next_line(self) -> bytes:
        line = self._file.readline(self._most_line_bytes)
        self._offset += len(line)
        if self._offset > self._most_bytes:
            self._settings.check_size(self._offset, str(self._source))
        return line

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise InputError(f"{self._source}: damaged gzip: {error}") from error
        except OSError as error:
            raise InputError(f"{self._source}: {error.strerror or error}") from error


def too_long() -> str:
    """Why a line or row that reached MAX_ROW_BYTES is none."""
    return f"a row of more than {MAX_ROW_BYTES >> 20} MiB"


def too_many() -> str:
    """Why a row of more than MAX_ROW_VALUES is none."""
    return f"more than {MAX_ROW_VALUES:,} values in it"


def decode(line: bytes) -> str:
    """Text whose bytes that are not UTF-8 survive as lone surrogates."""
    return line.decode("utf-8", "surrogateescape")


def string_arrays(
    rows: Sequence[Sequence[str | None]], num_text: int, num_kept: int
) -> tuple[tuple[pa.Array, ...], list[pa.Array]]:
    """Rows of `num_text` and then `num_kept` values as columns: those of text, and those kept."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * (num_text + num_kept)
    text = tuple(_text_array(values) for values in columns[:num_text])
    return text, [_kept_array(values) for values in columns[num_text:]]


def _text_array(values: Sequence[str | None]) -> pa.Array:
    """Strings, or, where one of them is not valid Unicode, the bytes of all."""
    try:
        return pa.array(values, pa.large_string())
    except UnicodeEncodeError:
        return pa.array([None if v is None else _encode(v) for v in values], pa.large_binary())


def _encode(value: str) -> bytes:
    try:
        return value.encode("utf-8", "surrogateescape")  # the bytes that were there
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")  # a lone surrogate written as \ud800


def _kept_array(values: Sequence[str | None]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        return pa.array([None if v is None else replace_bad(v) for v in values], pa.string())


def replace_bad(value: str) -> str:
    """Text with U+FFFD for whatever is not valid Unicode."""
    return _encode(value).decode("utf-8", "replace")
