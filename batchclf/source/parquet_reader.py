"""Parquet."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchclf.config import ReadSettings
from batchclf.errors import InputError
from batchclf.schema import output_name
from batchclf.shards import Contents
from batchclf.source import parquet_pages
from batchclf.source.base import BATCH_BYTES, BATCH_ROWS, Reader, RowBatch, record_batch
from batchclf.store import Source

# The most rows that are decoded at once: each takes the whole length of its values again, however
# often a dictionary in the file repeats them. More are hardly faster.
_ROWS_AT_ONCE = 8
# In sources that strangers name: of a page, which is decompressed whole, and of the values of a
# column that are decoded at once.
MAX_PAGE_BYTES = 128 << 20
_MAX_DECODED_BYTES = 256 << 20
_LEAST_ROW_BYTES = 8  # of a row once decoded, for what a footer claims
_ERRORS = (
    pa.ArrowInvalid,
    pa.ArrowNotImplementedError,
    pa.ArrowKeyError,
    OSError,  # a page whose checksum does not fit, a footer that is no footer
    UnicodeDecodeError,  # a column name that is not UTF-8
    parquet_pages.PagesError,
)


class ParquetReader(Reader):
    """Rows of the row groups, in their order; columns keep their types."""

    def __init__(self, file: BinaryIO, source: Source, settings: ReadSettings) -> None:
        super().__init__(file, source, settings)
        self._is_trusted = settings.max_source_bytes is None
        with self._errors():
            if not self._is_trusted:
                parquet_pages.check_footer(file)
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
        # no checksum guards a footer
        if sum(self._row_groups) != metadata.num_rows or min(self._row_groups, default=0) < 0:
            raise InputError(
                f"{source}: damaged Parquet file: {metadata.num_rows} rows by its footer, but "
                f"{sum(self._row_groups)} in its row groups"
            )
        settings.check_size(metadata.num_rows * _LEAST_ROW_BYTES, str(source))
        self._dense = [
            name for name in self._columns if not _in_dictionary(schema.field(name).type)
        ]
        self._chunks: list[list[parquet_pages.Chunk]] | None = None  # of each row group
        self._decoded_bytes = 0  # by this call of `read`
        self._position = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._left_over: pa.RecordBatch | None = None

    def contents(self, rows_per_shard: int) -> Contents:  # noqa: ARG002 - row groups say it all
        return Contents(sum(self._row_groups), tuple(self._row_groups))

    def read(self, start: int, stop: int, offset: int | None = None) -> Iterator[RowBatch]:  # noqa: ARG002
        self._decoded_bytes = 0
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
        # One row group at a time: pyarrow cannot join nested dictionaries across them.
        self._batches = (
            batch
            for index in range(group, len(self._row_groups))
            for batch in self._gathered(
                self._parquet.iter_batches(self._rows_at_once(index), [index], self._columns)
            )
        )
        while self._position < start:
            batch = next(self._batches, None)
            if batch is None:
                return
            skipped = min(start - self._position, batch.num_rows)
            self._position += skipped
            self._left_over = batch.slice(skipped) if skipped < batch.num_rows else None

    def _rows_at_once(self, index: int) -> int:
        """So many rows of a row group that, by its footer, they are a small part of BATCH_BYTES."""
        # Of all columns: asking for the size of one aborts the process where a damaged footer
        # has size statistics that do not fit (pyarrow 26), and sums are bounds.
        group = self._parquet.metadata.row_group(index)
        width = max(group.total_byte_size / max(group.num_rows, 1), 1)
        most = _ROWS_AT_ONCE
        if not self._is_trusted:  # then a value may be as long as a page
            most = min(most, _MAX_DECODED_BYTES // max(self._largest_page_bytes(index), 1))
        return int(min(max(BATCH_BYTES / _ROWS_AT_ONCE / width, 1), most))

    def _largest_page_bytes(self, index: int) -> int:
        if self._chunks is None:
            self._chunks = parquet_pages.find_chunks(self._file, self._columns)
        largest = parquet_pages.largest_page_bytes(self._file, self._chunks[index])
        if largest > MAX_PAGE_BYTES:
            raise InputError(
                f"{self._source}: has a page that expands to {largest:,} bytes, more than "
                f"{MAX_PAGE_BYTES:,}"
            )
        return largest

    def _gathered(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Join neighbours in a row group until they have BATCH_ROWS or pass BATCH_BYTES."""
        gathered: list[pa.RecordBatch] = []
        num_rows = num_bytes = 0
        for batch in batches:
            gathered.append(batch)
            num_rows += batch.num_rows
            # A dictionary is shared, so it neither grows with the rows nor counts for each batch.
            decoded_bytes = sum(batch.column(name).nbytes for name in self._dense)
            num_bytes += decoded_bytes
            self._decoded_bytes += decoded_bytes
            self._settings.check_size(self._decoded_bytes, str(self._source))
            if num_rows >= BATCH_ROWS or num_bytes >= BATCH_BYTES:
                yield from _join(gathered)
                gathered, num_rows, num_bytes = [], 0, 0
        yield from _join(gathered)

    def _row_batch(self, first_row: int, batch: pa.RecordBatch) -> RowBatch:
        text = tuple(batch.column(name) for name in self._settings.text_columns)
        kept = [_valid_utf8(batch.column(name)) for name in self._kept]
        return RowBatch(first_row, text, record_batch(kept, self.kept_schema, batch.num_rows), {})

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            reason = str(error).rstrip(".")
            raise InputError(f"{self._source}: not a readable Parquet file: {reason}") from error


def _join(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    try:
        return [pa.concat_batches(batches)] if batches else []
    except pa.ArrowNotImplementedError:  # nested dictionaries that differ
        return batches


def _in_dictionary(kind: pa.DataType) -> bool:
    """Whether a column, or what is nested in it, is a dictionary in Arrow too."""
    if pa.types.is_dictionary(kind):
        return True
    return any(_in_dictionary(kind.field(i).type) for i in range(kind.num_fields))


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
