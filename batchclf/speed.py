"""How fast this machine labels: measured by the stages that label, on articles of a sample.

What comes out is thrown away. Where the sample holds several windows, stages overlap in it as they
do in a long run, and their common pace is measured. Elsewhere it is by the bottleneck law: stages
that overlap go as fast as the slowest of them, and no faster than all cores together can work off
what each row costs. That is a bound for threads that never wait; those that spin while they wait
make it too slow, which shows with small models.
"""

import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchclf.batching import spread
from batchclf.engine import Engine
from batchclf.estimates import Windows, make_windows
from batchclf.shards import Shard
from batchclf.source import RowBatch
from batchclf.source.base import BATCH_BYTES, BATCH_ROWS, record_batch
from batchclf.store import Source
from batchclf.worker import Arrived, Tools, run_shards

_FIRST_BATCHES = 2  # of each stream, in the first look, or
_LOOK_TOKENS = 32768  # if those are more
_LARGEST_SHARE = 0.2  # of the budget, for one pass
_PASSES = (2, 10)  # at least and at most, once warm
_LONG_WINDOWS = 3  # at least, in a pass whose stages overlap
_LONG_SHARE = 0.3  # of the budget, at the most, for such a pass
_LONG_PASSES = 3
_SLICE_ROWS = 32
_NUM_SHARDS = 4  # for the cost of one more shard

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Demand:
    """Seconds that a row takes in each stage alone, and of all cores together.

    Attributes:
        read, tokenise, predict, write: wall time.
        cpu: of all threads of all stages.
    """

    read: float
    tokenise: float
    predict: float
    write: float
    cpu: float

    def steady(self, num_cores: int) -> float:
        """Seconds a row while all stages overlap."""
        return max(self.read, self.tokenise, self.predict, self.write, self.cpu / num_cores)


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        demand: per row.
        scatter: fastest and slowest pass against the median, such as (0.98, 1.05).
        num_rows: articles of a pass.
        num_passes: how many there were.
        num_cores: that this process may use.
        warm_up_s: what the first batches took longer than later ones.
        shard_s: what one more shard costs.
        overlapped_s: a row, while all stages but reading overlap; None where it was not measured.
    """

    demand: Demand
    scatter: tuple[float, float]
    num_rows: int
    num_passes: int
    num_cores: int
    warm_up_s: float
    shard_s: float
    overlapped_s: float | None = None

    @property
    def steady_s(self) -> float:
        """Seconds a row while all stages overlap."""
        if self.overlapped_s is None:
            return self.demand.steady(self.num_cores)
        return max(self.demand.read, self.overlapped_s + self.demand.read / self.num_cores)

    def seconds(self, num_rows: int, num_shards: int, first_rows: float) -> float:
        """How long shards take. The first window comes by itself, and as much goes at the end.

        Args:
            num_rows: in all.
            num_shards: that they are in.
            first_rows: of the first window.
        """
        if not num_rows:
            return 0.0
        alone = min(float(num_rows), first_rows)
        demand = self.demand
        return (
            self.warm_up_s
            + num_shards * self.shard_s
            + alone * (max(demand.read, demand.tokenise) + demand.predict + demand.write)
            + (num_rows - alone) * self.steady_s
        )


def computed_tokens(windows: Windows, engine: Engine) -> int:
    """Tokens that are computed for texts of these lengths, padding included.

    Args:
        windows: what is sorted together.
        engine: what will compute them.
    """
    return sum(
        engine.num_padded(lengths[batch])
        for lengths in windows.lengths
        for batch in engine.plan(lengths)
    )


@dataclass(frozen=True)
class _Pass:
    total_s: float
    cpu_s: float
    stages: dict[str, float]


class Speedometer:
    """Runs sampled articles through the stages of a worker.

    Args:
        tools: with a sink whose folder may be thrown away.
        interrupt: when set, measuring stops with Interrupted.
    """

    def __init__(self, tools: Tools, interrupt: threading.Event) -> None:
        self._tools = tools
        self._interrupt = interrupt
        self._names = itertools.count()

    def measure(
        self,
        batches: Sequence[RowBatch],
        budget_s: float,
        read_s: float,
        computed_a_row: float,
    ) -> Speed:
        """Measure for about so many seconds, at least two passes and a look.

        Args:
            batches: of the sample, evenly spread; one or more with text.
            budget_s: for passes of few rows; those of several windows take as long again at most.
            read_s: that reading a row takes.
            computed_a_row: tokens that are computed a row in the whole job, padding included.
        """
        parts = [
            batch.copy(first, min(first + _SLICE_ROWS, batch.num_rows))
            for batch in batches
            for first in range(0, batch.num_rows, _SLICE_ROWS)
        ]
        row_tokens = float(self._lengths(_spread(parts, _SLICE_ROWS))[0].mean())
        first = _spread(parts, self._rows_of_a_look(row_tokens))
        looked = self._run(_as_read(first))
        looked_rows = _num_rows(first)
        most_s = budget_s * _LARGEST_SHARE
        chosen = _spread(parts, max(int(most_s / looked.total_s * looked_rows), looked_rows))
        num_rows = _num_rows(chosen)
        rows = _as_read(chosen)
        began = time.perf_counter()
        cold = looked if len(first) == len(parts) else self._run(rows)
        passes = [self._run(rows) for _ in range(_PASSES[0])]
        most_rows = int(budget_s * _LONG_SHARE / passes[-1].total_s * num_rows)
        long_rows, long_s = self._long_pass(_spread(parts, most_rows), row_tokens)
        while (
            len(passes) < _PASSES[1] and time.perf_counter() - began + passes[-1].total_s < budget_s
        ):
            passes.append(self._run(rows))
        total_s = statistics.median(each.total_s for each in passes)
        typical = min(passes, key=lambda each: abs(each.total_s - total_s))
        a_row = {stage: seconds / num_rows for stage, seconds in typical.stages.items()}
        # Few rows are sorted among themselves less well than a whole window.
        computed = self._computed_tokens(chosen)
        scale = computed_a_row * num_rows / computed if computed else 1.0
        shard_s = self._shard_s(chosen, total_s / num_rows)
        # A long pass fills and drains as a short one does; what is more is between.
        more_rows = long_rows - num_rows
        overlapped_s = max(long_s - total_s, 0.0) / more_rows if more_rows > num_rows else None
        return Speed(
            Demand(
                read_s,
                a_row["tokenise"],
                a_row["predict"] * scale,
                a_row["write"],
                read_s + typical.cpu_s / num_rows,
            ),
            (
                min(each.total_s for each in passes) / typical.total_s,
                max(each.total_s for each in passes) / typical.total_s,
            ),
            num_rows,
            len(passes),
            len(os.sched_getaffinity(0)),
            max(cold.total_s - total_s, looked.total_s - looked_rows * total_s / num_rows, 0.0),
            shard_s,
            overlapped_s,
        )

    def _long_pass(self, parts: Sequence[RowBatch], row_tokens: float) -> tuple[int, float]:
        """Rows and seconds of a pass of several windows; zeros if these rows are too few."""
        num_rows = _num_rows(parts)
        if num_rows * row_tokens < _LONG_WINDOWS * self._tools.engine.window_tokens:
            return 0, 0.0
        rows = _as_read(parts)
        # Whatever else the machine does can only make one slower.
        return num_rows, min(self._run(rows).total_s for _ in range(_LONG_PASSES))

    def _rows_of_a_look(self, row_tokens: float) -> int:
        """So many that a small job is looked at as a whole, and a large model not for long."""
        engine = self._tools.engine
        tokens = _FIRST_BATCHES * engine.num_streams * engine.max_batch_tokens
        return max(int(max(tokens, _LOOK_TOKENS) / row_tokens), 1)

    def _lengths(self, parts: Sequence[RowBatch]) -> tuple[IntArray, list[bytes]]:
        """Tokens and ids of the articles that have some."""
        columns = self._tools.read.text_columns
        encoded = [self._tools.encoder.encode(part.texts(columns).texts) for part in parts]
        lengths = np.concatenate([each.num_tokens for each in encoded]).astype(np.int64)
        rows = [row for each in encoded for row in each.row_bytes() if row]
        return lengths[lengths > 0], rows

    def _computed_tokens(self, parts: Sequence[RowBatch]) -> int:
        lengths, rows = self._lengths(parts)
        engine = self._tools.engine
        windows = make_windows(lengths, rows, engine.window_tokens, len(lengths))
        return computed_tokens(windows, engine)

    def _shard_s(self, parts: Sequence[RowBatch], row_s: float) -> float:
        """What it costs to open, write and publish one more shard."""
        rows = [part.copy(0, 1) for part in itertools.islice(itertools.cycle(parts), _NUM_SHARDS)]
        began = time.perf_counter()
        self._flow([self._arrived([row]) for row in rows])
        return max((time.perf_counter() - began) / _NUM_SHARDS - row_s, 0.0)

    def _run(self, shards: Sequence[Sequence[RowBatch]]) -> _Pass:
        began, cpu_began = time.perf_counter(), time.process_time()
        busy = self._flow([self._arrived(rows) for rows in shards])
        total_s = time.perf_counter() - began
        return _Pass(
            total_s,
            time.process_time() - cpu_began,
            {stage: share * total_s for stage, share in busy.items()},
        )

    def _flow(self, shards: Sequence[Arrived]) -> dict[str, float]:
        busy: dict[str, float] = {}
        for outcome in run_shards(shards, self._tools, self._interrupt, _ignore, busy.update):
            if outcome.error is not None:
                raise outcome.error
        return busy

    def _arrived(self, parts: Sequence[RowBatch]) -> Arrived:
        source = Source(f"file:///measured-{next(self._names)}", "none", 0)
        shard = Shard(source, 0, _num_rows(parts))
        return Arrived(shard, parts[0].kept.schema, _renumbered(parts))


def _as_read(parts: Sequence[RowBatch]) -> list[list[RowBatch]]:
    """Rows of the same columns as one shard, in record batches as large as readers make them."""
    alike: dict[str, list[RowBatch]] = {}
    for part in parts:
        types = [column.type for column in part.text]
        alike.setdefault(f"{types} {part.kept.schema}", []).append(part)
    return [[batch for group in _groups(some) for batch in _join(group)] for some in alike.values()]


def _groups(parts: Sequence[RowBatch]) -> Iterator[list[RowBatch]]:
    group: list[RowBatch] = []
    num_bytes = 0
    for part in parts:
        group.append(part)
        num_bytes += sum(column.nbytes for column in part.text)
        if _num_rows(group) >= BATCH_ROWS or num_bytes >= BATCH_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _join(parts: list[RowBatch]) -> list[RowBatch]:
    """As one record batch, where Arrow can."""
    num_texts = len(parts[0].text)
    columns = [[*part.text, *part.kept.columns] for part in parts]
    names = [str(place) for place in range(len(columns[0]))]
    try:
        whole = pa.concat_batches([pa.record_batch(each, names) for each in columns])
    except pa.ArrowNotImplementedError:  # nested dictionaries that differ
        return parts
    faults = {}
    first = 0
    for part in parts:
        faults.update({first + row: fault for row, fault in part.faults.items()})
        first += part.num_rows
    kept = record_batch(whole.columns[num_texts:], parts[0].kept.schema, first)
    return [RowBatch(0, tuple(whole.columns[:num_texts]), kept, faults)]


def _renumbered(parts: Sequence[RowBatch]) -> Iterator[RowBatch]:
    first_row = 0
    for part in parts:
        yield RowBatch(first_row, part.text, part.kept, part.faults)
        first_row += part.num_rows


def _num_rows(parts: Sequence[RowBatch]) -> int:
    return sum(part.num_rows for part in parts)


def _spread(parts: Sequence[RowBatch], num_rows: int) -> list[RowBatch]:
    """Some of the parts, evenly over all, with about so many rows."""
    wanted = -(-num_rows * len(parts) // max(_num_rows(parts), 1))
    return [parts[place] for place in spread(len(parts), wanted)]


def _ignore(num_examples: int, num_tokens: int) -> None:
    """Nobody watches a measurement."""
