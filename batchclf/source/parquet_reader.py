"""Parquet."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchclf.config import ReadSettings
from batchclf.errors import InputError
from batchclf.schema import output_name
from batchclf.shards import Contents
from batchclf.source.base import BATCH_BYTES, BATCH_ROWS, Reader, RowBatch, record_batch
from batchclf.store import Source

_ERRORS = (
    pa.ArrowInvalid,
    pa.ArrowNotImplementedError,
    pa.ArrowKeyError,
    OSError,  # a page whose checksum does not fit, a footer that is no footer
    UnicodeDecodeError,  # a column name that is not UTF-8
)


class ParquetReader(Reader):
    """Rows of the row groups, in their order; columns keep their types."""

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
        batch_size = self._rows_per_batch()
        # One row group at a time: pyarrow cannot join nested dictionaries across them.
        self._batches = (
            batch
            for index in range(group, len(self._row_groups))
            for batch in self._parquet.iter_batches(batch_size, [index], self._columns)
        )
        while self._position < start:
            batch = next(self._batches, None)
            if batch is None:
                return
            skipped = min(start - self._position, batch.num_rows)
            self._position += skipped
            self._left_over = batch.slice(skipped) if skipped < batch.num_rows else None

    def _rows_per_batch(self) -> int:
        """So many that a batch has about BATCH_BYTES in the row group with the widest rows."""
        # Of all columns: asking for the size of one aborts the process where a damaged footer
        # has size statistics that do not fit (pyarrow 26), and sums are bounds.
        metadata = self._parquet.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        widest = max([1.0, *(g.total_byte_size / max(g.num_rows, 1) for g in groups)])
        return int(min(max(BATCH_BYTES / widest, 1), BATCH_ROWS))

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
