"""A source as record batches: Parquet, CSV and JSON lines, read forward, some rows at a time.

Every row that can be told apart arrives, with its position; what is wrong with it travels beside
it. Columns of CSV and JSON lines are strings: in JSON lines, values that are not strings are kept
as their JSON text.
"""

import csv
import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from batchclf.config import ReadSettings
from batchclf.errors import InputError
from batchclf.schema import output_name
from batchclf.shards import Contents
from batchclf.store import Source, source_suffix

BATCH_ROWS = 1024
_BATCH_BYTES = 8 << 20  # a record batch ends after the row that passes this
MAX_ROW_BYTES = 256 << 20  # a longer line is no row but damage, such as a quote never closed
_HEAD_ROWS = 1000  # JSON lines in which a text column has to show up

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_PARQUET_ERRORS = (
    pa.ArrowInvalid,
    pa.ArrowNotImplementedError,
    pa.ArrowKeyError,
    OSError,  # a page whose checksum does not fit, a footer that is no footer
    UnicodeDecodeError,  # a column name that is not UTF-8
)
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_END = "\ud800"  # comes after the last line of a CSV; decoding never gives it


@dataclass(frozen=True)
class RowBatch:
    """Neighbouring rows of a source.

    Attributes:
        first_row: position of the first of them in the source.
        text: the text columns, one array each, in the order of the settings.
        kept: the columns that travel to the output, under their names there.
        faults: by index in the batch, why a row could not be read: `code: reason`.
    """

    first_row: int
    text: tuple[pa.Array, ...]
    kept: pa.RecordBatch
    faults: dict[int, str]

    @property
    def num_rows(self) -> int:
        return int(self.kept.num_rows)


class Reader(ABC):
    """One open source. Reads forward; reading on where the last range ended costs nothing extra."""

    kept_schema: pa.Schema

    def __init__(self, file: BinaryIO, source: Source, settings: ReadSettings) -> None:
        self._file = file
        self._source = source
        self._settings = settings

    def close(self) -> None:
        self._file.close()

    @abstractmethod
    def contents(self, rows_per_shard: int) -> Contents:
        """Count the rows; remember where each `rows_per_shard`-th begins, where that helps."""

    @abstractmethod
    def read(self, start: int, stop: int, offset: int | None = None) -> Iterator[RowBatch]:
        """Rows `start` to `stop` (exclusive).

        Args:
            start: position of the first row wanted.
            stop: position after the last.
            offset: byte offset of row `start`, if known.

        Raises:
            InputError: the source ends before `stop`, or is damaged.
        """

    def _choose_columns(self, available: Sequence[str]) -> tuple[str, ...]:
        uri = str(self._source)
        self._settings.check_text_columns(available, uri)
        return self._settings.kept_columns(available, uri)

    def _ended_early(self, start: int, stop: int, position: int) -> InputError:
        return InputError(
            f"{self._source}: rows {start} to {stop} were asked for, but it ends after {position}"
        )


def open_reader(file: BinaryIO, source: Source, settings: ReadSettings) -> Reader:
    """The reader for a source, by the ending of its name. Closing it closes the file.

    Raises:
        InputError: the content is not what the name says, or a column is missing.
    """
    suffix = source_suffix(source.uri) or ""
    magic = file.read(4)
    file.seek(0)
    _check_magic(magic, suffix, source)
    if suffix == ".parquet":
        return _ParquetReader(file, source, settings)
    if suffix.endswith(".gz"):
        file = cast("BinaryIO", _GzipFile(file))
    kind = _CsvReader if suffix.startswith(".csv") else _JsonLinesReader
    return kind(file, source, settings)


def _check_magic(magic: bytes, suffix: str, source: Source) -> None:
    if suffix == ".parquet":
        return  # pyarrow says it well
    found = None
    if magic == _PARQUET_MAGIC:
        found = "Parquet"
    elif magic[:2] == _GZIP_MAGIC and not suffix.endswith(".gz"):
        found = "gzip"
    elif magic[:2] in _UTF16_BOMS:
        found = "UTF-16 text, and UTF-8 is wanted"
    elif suffix.endswith(".gz") and magic[:2] != _GZIP_MAGIC:
        found = "not gzip" if magic else "an empty file, not gzip"
    if found:
        raise InputError(f"{source}: its name ends in {suffix}, but it is {found}")


class _GzipFile(gzip.GzipFile):
    """Closes what it reads from."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


class _ParquetReader(Reader):
    def __init__(self, file: BinaryIO, source: Source, settings: ReadSettings) -> None:
        super().__init__(file, source, settings)
        with self._errors():
            # One row group is streamed page by page, not read ahead whole.
            self._parquet = pq.ParquetFile(
                file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
            )
            schema = self._parquet.schema_arrow
        self._kept = self._choose_columns(schema.names)
        self._columns = list(dict.fromkeys((*settings.text_columns, *self._kept)))
        self._names = [output_name(name, self._kept) for name in self._kept]
        self.kept_schema = pa.schema(
            [
                schema.field(name).with_name(new).remove_metadata()
                for name, new in zip(self._kept, self._names, strict=True)
            ]
        )
        metadata = self._parquet.metadata
        self._row_groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if sum(self._row_groups) != metadata.num_rows:  # no checksum guards a footer
            raise InputError(
                f"{source}: damaged Parquet file: {metadata.num_rows} rows by its footer, but "
                f"{sum(self._row_groups)} in its row groups"
            )
        self._position = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._left_over: pa.RecordBatch | None = None

    def contents(self, rows_per_shard: int) -> Contents:  # noqa: ARG002 - row groups say it all
        return Contents(sum(self._row_groups), tuple(self._row_groups))

    def read(self, start: int, stop: int, offset: int | None = None) -> Iterator[RowBatch]:  # noqa: ARG002
        with self._errors():
            if self._position != start:
                self._open_at(start)
            while self._position < stop:
                batch = (
                    self._left_over if self._left_over is not None else next(self._batches, None)
                )
                if batch is None:
                    raise self._ended_early(start, stop, self._position)
                wanted = stop - self._position
                self._left_over = batch.slice(wanted) if batch.num_rows > wanted else None
                batch = batch.slice(0, wanted)
                first_row = self._position
                self._position += batch.num_rows
                if self._position > start and batch.num_rows:
                    yield self._row_batch(first_row, batch)

    def _open_at(self, start: int) -> None:
        first_of_group = group = 0
        while group < len(self._row_groups) and first_of_group + self._row_groups[group] <= start:
            first_of_group += self._row_groups[group]
            group += 1
        self._position = first_of_group
        self._left_over = None
        self._batches = self._parquet.iter_batches(
            batch_size=self._rows_per_batch(),
            row_groups=list(range(group, len(self._row_groups))),
            columns=self._columns,
        )
        while self._position < start:
            batch = next(self._batches, None)
            if batch is None:
                return
            skipped = min(start - self._position, batch.num_rows)
            self._position += skipped
            self._left_over = batch.slice(skipped) if skipped < batch.num_rows else None

    def _rows_per_batch(self) -> int:
        """So many that a batch has about _BATCH_BYTES in the row group with the widest rows."""
        # Of all columns: asking for the size of one aborts the process where a damaged footer
        # has size statistics that do not fit (pyarrow 26), and sums are bounds.
        metadata = self._parquet.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        widest = max([1.0, *(g.total_byte_size / max(g.num_rows, 1) for g in groups)])
        return int(min(max(_BATCH_BYTES / widest, 1), BATCH_ROWS))

    def _row_batch(self, first_row: int, batch: pa.RecordBatch) -> RowBatch:
        text = tuple(batch.column(name) for name in self._settings.text_columns)
        kept = [_valid_utf8(batch.column(name)) for name in self._kept]
        return RowBatch(first_row, text, _record_batch(kept, self.kept_schema, batch.num_rows), {})

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _PARQUET_ERRORS as error:
            reason = str(error).rstrip(".")
            raise InputError(f"{self._source}: not a readable Parquet file: {reason}") from error


class _LinesReader(Reader):
    """What CSV and JSON lines share: a cursor over parsed records, and batches made of them."""

    def __init__(self, file: BinaryIO, source: Source, settings: ReadSettings) -> None:
        super().__init__(file, source, settings)
        self._position = -1  # of the next record
        self._offset = 0  # bytes taken by the records so far
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
            if self._offset - first_offset > _BATCH_BYTES:
                break
        self._position += len(rows)
        columns = (
            list(zip(*rows, strict=True)) if rows else [()] * (len(text_names) + len(self._kept))
        )
        text = tuple(_text_array(values) for values in columns[: len(text_names)])
        kept = [_kept_array(values) for values in columns[len(text_names) :]]
        return RowBatch(first_row, text, _record_batch(kept, self.kept_schema, len(rows)), faults)

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
        while line := self._file.readline(MAX_ROW_BYTES):
            self._offset += len(line)
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                while (rest := self._file.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                    self._offset += len(rest)
                self._offset += len(rest)
            yield line

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise InputError(f"{self._source}: damaged gzip: {error}") from error
        except OSError as error:
            raise InputError(f"{self._source}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Unparseable:
    reason: str


class _CsvReader(_LinesReader):
    def _find_columns(self) -> tuple[str, ...]:
        header = next(self._parse_rows(), None)
        if header is None:
            raise InputError(f"{self._source}: empty, without even a header line")
        if isinstance(header, _Unparseable):
            raise InputError(f"{self._source}: the header cannot be read: {header.reason}")
        return tuple(_replace_bad(name) for name in header)

    def _parse(self, at_start: bool) -> Iterator[Any]:
        rows = self._parse_rows()
        if at_start:
            next(rows, None)  # the header
        return rows

    def _parse_rows(self) -> Iterator[list[str] | _Unparseable]:
        csv.field_size_limit(MAX_ROW_BYTES)
        lines = chain(map(_csv_line, self._lines()), [_END])
        rows = csv.reader(lines, delimiter=self._settings.delimiter)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield _Unparseable(str(error).split(" - ")[0])
                continue
            if row == [_END]:
                return
            if row and row[-1].endswith(_END):
                yield _Unparseable("a quote in it is never closed, so it goes on to the end")
            elif row:  # blank lines are no rows
                yield row

    def _fields(
        self, record: list[str] | _Unparseable, names: Sequence[str]
    ) -> tuple[list[str | None], str | None]:
        if isinstance(record, _Unparseable):
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


def _csv_line(line: bytes) -> str:
    """A line for csv, which begins a new row with the next one where this one is refused."""
    if len(line) >= MAX_ROW_BYTES:
        raise csv.Error(_too_long())
    return _decode(line)


class _JsonLinesReader(_LinesReader):
    def _find_columns(self) -> tuple[str, ...]:
        """The keys of the first objects, or of all where all are kept."""
        most = None if self._settings.keep == "all" else _HEAD_ROWS
        columns: dict[str, None] = {}
        for record in islice(self._parse(at_start=True), most):
            value = _parse_json(record)
            if isinstance(value, dict):
                columns |= dict.fromkeys(value)
        if columns:
            return tuple(_replace_bad(name) for name in columns)
        # no objects there: then the declared columns, for a file of no rows or of bad ones
        keep = self._settings.keep if isinstance(self._settings.keep, tuple) else ()
        id_column = (self._settings.id_column,) if self._settings.id_column else ()
        return tuple(dict.fromkeys((*self._settings.text_columns, *keep, *id_column)))

    def _parse(self, at_start: bool) -> Iterator[Any]:  # noqa: ARG002 - there is no header
        return (line for line in self._lines() if not line.isspace())

    def _fields(self, record: bytes, names: Sequence[str]) -> tuple[list[str | None], str | None]:
        value = _parse_json(record)
        if isinstance(value, _Unparseable):
            return [None] * len(names), f"unparseable: {value.reason}"
        fault = None
        for name in self._settings.text_columns:
            text = value.get(name)
            if text is not None and not isinstance(text, str):
                fault = f"not_text: {name!r} is a JSON {_json_kind(text)}"
        return [_as_string(value.get(name)) for name in names], fault


def _parse_json(line: bytes) -> dict[str, Any] | _Unparseable:
    if len(line) >= MAX_ROW_BYTES:
        return _Unparseable(_too_long())
    try:
        value = json.loads(_decode(line))
    except RecursionError:
        return _Unparseable("JSON nested too deeply")
    except ValueError as error:
        return _Unparseable(f"not JSON: {error}")
    if not isinstance(value, dict):
        return _Unparseable(f"a JSON {_json_kind(value)}, not an object")
    return value


def _too_long() -> str:
    return f"a line of more than {MAX_ROW_BYTES >> 20} MiB"


def _json_kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "null" if value is None else "object")


def _as_string(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _decode(line: bytes) -> str:
    """Text whose bytes that are not UTF-8 survive as lone surrogates."""
    return line.decode("utf-8", "surrogateescape")


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
        return pa.array([None if v is None else _replace_bad(v) for v in values], pa.string())


def _valid_utf8(column: pa.Array) -> pa.Array:
    """A column as it is, unless its strings would make the output unreadable to others."""
    if column.type not in (pa.string(), pa.large_string()):
        return column
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        as_bytes = column.cast(pa.large_binary()).to_pylist()
        valid = [None if v is None else v.decode("utf-8", "replace") for v in as_bytes]
        return pa.array(valid, column.type)
    return column


def _replace_bad(value: str) -> str:
    return _encode(value).decode("utf-8", "replace")


def _record_batch(columns: list[pa.Array], schema: pa.Schema, num_rows: int) -> pa.RecordBatch:
    if columns:
        return pa.record_batch(columns, schema=schema)
    # a batch without columns cannot be made with a length; a struct array can
    empty = pa.StructArray.from_buffers(pa.struct([]), num_rows, [None])
    return pa.RecordBatch.from_struct_array(empty)
