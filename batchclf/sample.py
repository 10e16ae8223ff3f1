"""Read a sample of the rows of a job, through the readers and the tokenizer that label them."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from batchclf.config import ReadSettings
from batchclf.errors import InputError, Interrupted
from batchclf.estimates import Blocks, Population
from batchclf.shards import Contents, Shard
from batchclf.source import Reader, RowBatch, open_reader
from batchclf.store import Source, check_unchanged, open_source_tail, source_suffix
from batchclf.text import TextEncoder

# Every so many rows of uncompressed text, its place in the file is known, to read on from there.
OFFSET_ROWS = 1024
MOST_TOKENS = 65536  # of a text are counted; what lies beyond is left out
_THREADS = 8  # reading waits for the store, or runs in C
_MOST_KEPT_BYTES = 64 << 20  # of record batches that stay in memory, for measuring with
_DIGEST_BYTES = 16
_READ_S = 0.5  # for measuring how fast a file is read
_READ_ROWS = 20_000

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """What is known of N rows, in input order.

    Attributes:
        places: int64 [N], position of each among all rows of the job.
        lengths: int64 [N], tokens of the whole text, at most MOST_TOKENS; 0 where it has an error.
        num_tokens: int64 [N], those that the model sees.
        digests: [N] equal where the model sees the same tokens.
        codes: [N] of the error, empty where there is none.
    """

    places: IntArray
    lengths: IntArray
    num_tokens: IntArray
    digests: list[bytes]
    codes: list[str]


@dataclass
class Sample:
    """The rows that were read, and some of their record batches.

    Attributes:
        population: what each row stands for.
        batches: of the sampled rows, as many as MOST_KEPT_BYTES hold, evenly spread.
        damaged: why some blocks could not be read.
    """

    rows: Rows
    population: Population
    batches: list[RowBatch]
    damaged: list[InputError] = field(default_factory=list)


@dataclass(frozen=True)
class _Stretch:
    """Rows `start` to `stop` of a source, which are those from `place` on of the job."""

    source: Source
    contents: Contents
    start: int
    stop: int
    place: int


class SampleReader:
    """Reads blocks of rows of some shards.

    Args:
        read: which columns are text.
        encoder: the model's.
        whole: of the same tokenizer, for MOST_TOKENS.
        interrupt: when set, reading stops with Interrupted.
        endpoint_url: of the store.
    """

    def __init__(
        self,
        read: ReadSettings,
        encoder: TextEncoder,
        whole: TextEncoder,
        interrupt: threading.Event,
        endpoint_url: str | None,
    ) -> None:
        self._read_settings = read
        self._encoder = encoder
        self._whole = whole
        self._interrupt = interrupt
        self._endpoint_url = endpoint_url

    def read(
        self, shards: Sequence[Shard], contents: Mapping[Source, Contents], blocks: Blocks
    ) -> Sample:
        """The rows of the blocks. A source that turns out to be damaged loses some of them.

        Args:
            shards: the rows of the job, in input order.
            contents: of their sources.
            blocks: which of those rows.

        Raises:
            Interrupted, StoreError: nothing was read in full.
        """
        kept = _Kept()
        damaged: list[InputError] = []

        def one(stretch: _Stretch) -> list[Rows]:
            found = []
            try:
                for rows in self._read_stretch(stretch, blocks, kept):
                    found.append(rows)  # noqa: PERF402 - what came before the damage counts
            except InputError as error:
                damaged.append(error)
            return found

        with ThreadPoolExecutor(_THREADS) as pool:
            parts = list(chain.from_iterable(pool.map(one, _stretches(shards, contents))))
        rows = Rows(
            np.concatenate([part.places for part in parts] or [np.array([], np.int64)]),
            np.concatenate([part.lengths for part in parts] or [np.array([], np.int64)]),
            np.concatenate([part.num_tokens for part in parts] or [np.array([], np.int64)]),
            [digest for part in parts for digest in part.digests],
            [code for part in parts for code in part.codes],
        )
        block_of = np.searchsorted(blocks.starts, rows.places, side="right") - 1
        return Sample(rows, Population(blocks, block_of), kept.batches(), damaged)

    def _read_stretch(self, stretch: _Stretch, blocks: Blocks, kept: "_Kept") -> Iterator[Rows]:
        ranges = _ranges(stretch, blocks)
        if not ranges:
            return
        with closing(open_source_tail(stretch.source, self._endpoint_url)) as file:
            reader = open_reader(file, stretch.source, self._read_settings)
            position = -1
            for group in _together(ranges, stretch):
                start, stop = group[0][0], group[-1][1]
                _approach(reader, stretch.contents, position, start)
                position = stop
                for batch in reader.read(start, stop, stretch.contents.offsets.get(start)):
                    yield from self._wanted(batch, group, stretch, kept)
            check_unchanged(stretch.source)

    def _wanted(
        self, batch: RowBatch, group: Sequence[tuple[int, int]], stretch: _Stretch, kept: "_Kept"
    ) -> Iterator[Rows]:
        for start, stop in group:
            if self._interrupt.is_set():
                raise Interrupted("asked to stop; nothing was written")
            first = max(start - batch.first_row, 0)
            last = min(stop - batch.first_row, batch.num_rows)
            if first < last:
                part = batch.copy(first, last)
                kept.add(part)
                yield self._look(part, stretch.place - stretch.start)

    def _look(self, batch: RowBatch, shift: int) -> Rows:
        texts = batch.texts(self._read_settings.text_columns)
        encoded = self._encoder.encode(texts.texts)
        lengths = encoded.num_tokens.astype(np.int64)
        longer = np.flatnonzero(encoded.truncated)
        if len(longer):
            all_tokens = self._whole.encode([texts.texts[row] for row in longer]).num_tokens
            lengths[longer] = np.maximum(all_tokens, lengths[longer] + 1)
        errors = {**texts.errors, **encoded.errors}
        return Rows(
            np.arange(batch.num_rows) + batch.first_row + shift,
            lengths,
            encoded.num_tokens.astype(np.int64),
            [_digest(row) for row in encoded.row_bytes()],
            [errors.get(row, "").partition(":")[0] for row in range(batch.num_rows)],
        )

    def first_s(self, shards: Sequence[Shard]) -> float:
        """How long it takes to open the first file of each kind and to read its first rows.

        More in a process that has not done so before, as no worker has.
        """
        return sum(self._time(shard, 1)[0] for shard, _ in _kinds(shards))

    def seconds_a_row(self, shards: Sequence[Shard]) -> float:
        """How long reading alone takes, measured on the largest shard of each kind of file."""
        total = sum(shard.num_rows for shard in shards)
        found = 0.0
        for shard, num_rows in _kinds(shards):
            seconds, num_read = self._time(shard, _READ_ROWS)
            found += seconds / max(num_read, 1) * num_rows / max(total, 1)
        return found

    def _time(self, shard: Shard, most_rows: int) -> tuple[float, int]:
        """Seconds, and the rows that were read in them."""
        num_rows = 0
        began = time.perf_counter()
        # whoever reads the sample tells of a file that is damaged
        with (
            contextlib.suppress(InputError),
            closing(open_source_tail(shard.source, self._endpoint_url)) as file,
        ):
            reader = open_reader(file, shard.source, self._read_settings)
            for batch in reader.read(shard.start, min(shard.stop, shard.start + most_rows)):
                num_rows += batch.num_rows
                if time.perf_counter() - began > _READ_S:
                    break
        return time.perf_counter() - began, num_rows


def _kinds(shards: Sequence[Shard]) -> list[tuple[Shard, int]]:
    """The largest shard of each kind of file, and how many rows there are of that kind."""
    found: dict[str | None, tuple[Shard, int]] = {}
    for shard in shards:
        kind = source_suffix(shard.source.uri)
        largest, num_rows = found.get(kind, (shard, 0))
        largest = max(largest, shard, key=lambda each: each.num_rows)
        found[kind] = (largest, num_rows + shard.num_rows)
    return list(found.values())


class _Kept:
    """Record batches within a bound of memory: when it is reached, every other one is dropped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches: list[RowBatch] = []
        self._num_bytes = 0
        self._every = 1
        self._seen = 0

    def add(self, batch: RowBatch) -> None:
        with self._lock:
            self._seen += 1
            if self._seen % self._every:
                return
            self._batches.append(batch)
            self._num_bytes += _size(batch)
            while self._num_bytes > _MOST_KEPT_BYTES and len(self._batches) > 1:
                self._batches = self._batches[1::2]
                self._every *= 2
                self._num_bytes = sum(map(_size, self._batches))

    def batches(self) -> list[RowBatch]:
        return self._batches


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _size(batch: RowBatch) -> int:
    return sum(column.nbytes for column in (*batch.text, *batch.kept.columns))


def _stretches(shards: Sequence[Shard], contents: Mapping[Source, Contents]) -> list[_Stretch]:
    """Neighbouring shards of a source as one."""
    found: list[_Stretch] = []
    place = 0
    for shard in shards:
        last = found[-1] if found else None
        if last and last.source == shard.source and last.stop == shard.start:
            found[-1] = _Stretch(last.source, last.contents, last.start, shard.stop, last.place)
        else:
            known = contents[shard.source]
            found.append(_Stretch(shard.source, known, shard.start, shard.stop, place))
        place += shard.num_rows
    return found


def _ranges(stretch: _Stretch, blocks: Blocks) -> list[tuple[int, int]]:
    """Rows of the source that are in blocks, as ascending ranges; those that touch are one."""
    shift = stretch.start - stretch.place
    starts = np.maximum(blocks.starts + shift, stretch.start)
    stops = np.minimum(blocks.stops + shift, stretch.stop)
    ranges: list[tuple[int, int]] = []
    for index in np.flatnonzero(starts < stops).tolist():
        start, stop = int(starts[index]), int(stops[index])
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return ranges


def _together(ranges: Sequence[tuple[int, int]], stretch: _Stretch) -> list[list[tuple[int, int]]]:
    """Ranges that are read in one go: of a row group, which is read from its beginning anyway."""
    ends = np.cumsum(stretch.contents.row_groups)
    groups: list[list[tuple[int, int]]] = []
    last_group = -1
    for each in ranges:
        group = int(np.searchsorted(ends, each[0], side="right"))
        if len(ends) and groups and group == last_group:
            groups[-1].append(each)
        else:
            groups.append([each])
        last_group = int(np.searchsorted(ends, each[1] - 1, side="right"))
    return groups


def _approach(reader: Reader, contents: Contents, position: int, start: int) -> None:
    """Bring a reader of text near a row by a place that is known, if that lies ahead."""
    known = start // OFFSET_ROWS * OFFSET_ROWS
    offset = contents.offsets.get(known)
    if offset is not None and position < known < start:
        for _ in reader.read(known, known + 1, offset):
            pass
