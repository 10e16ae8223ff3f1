"""What a reader is, and what it gives."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

from batchclf.config import ReadSettings
from batchclf.errors import InputError
from batchclf.shards import Contents
from batchclf.store import Source
from batchclf.text import Texts, join_text

BATCH_ROWS = 1024
BATCH_BYTES = 8 << 20  # a record batch ends after the row that passes this


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

    def texts(self, text_columns: Sequence[str]) -> Texts:
        """The text of each row; one that could not be read has none.

        Args:
            text_columns: names of `text`.
        """
        joined = join_text(dict(zip(text_columns, self.text, strict=True)))
        for row in self.faults:
            joined.texts[row] = None
        return Texts(joined.texts, {**joined.errors, **self.faults})

    def slice(self, start: int, stop: int) -> "RowBatch":
        """Rows `start` to `stop` (exclusive), which share the memory of all."""
        return RowBatch(
            self.first_row + start,
            tuple(column.slice(start, stop - start) for column in self.text),
            self.kept.slice(start, stop - start),
            self._faults(start, stop),
        )

    def copy(self, start: int, stop: int) -> "RowBatch":
        """Rows `start` to `stop` (exclusive), without a hold on the memory of the others."""
        rows = pa.array(range(start, stop), pa.int64())
        return RowBatch(
            self.first_row + start,
            tuple(column.take(rows) for column in self.text),
            record_batch(
                [column.take(rows) for column in self.kept.columns], self.kept.schema, stop - start
            ),
            self._faults(start, stop),
        )

    def _faults(self, start: int, stop: int) -> dict[int, str]:
        return {row - start: fault for row, fault in self.faults.items() if start <= row < stop}


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


def record_batch(columns: list[pa.Array], schema: pa.Schema, num_rows: int) -> pa.RecordBatch:
    """A record batch that knows its length also without columns."""
    if columns:
        return pa.record_batch(columns, schema=schema)
    # a batch without columns cannot be made with a length; a struct array can
    empty = pa.StructArray.from_buffers(pa.struct([]), num_rows, [None])
    return pa.RecordBatch.from_struct_array(empty)
