"""The job of `batchclf plan`: what labelling an archive will take, before anything is labelled."""

import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchclf.config import CutSettings, ModelSettings, PredictSettings, ReadSettings, Share
from batchclf.errors import BatchclfError, ConfigError
from batchclf.estimates import (
    Estimate,
    Histogram,
    Windows,
    choose_blocks,
    histogram,
    make_windows,
)
from batchclf.labelling import Labelling
from batchclf.log import fields
from batchclf.planning import Looked, look_into
from batchclf.sample import MOST_TOKENS, OFFSET_ROWS, Sample, SampleReader
from batchclf.shards import Shard, plan_shards, take_share
from batchclf.speed import Speed, Speedometer, computed_tokens
from batchclf.store import source_suffix
from batchclf.text import TextEncoder
from batchclf.worker import Tools

log = logging.getLogger(__name__)

_MEASURE_S = 8.0
_LEAST_CANDIDATE = 128  # tokens; longer ones are its doubles
_PROCESS_STAT = Path("/proc/self/stat")
_START_FIELD = 22  # of /proc/self/stat, see proc_pid_stat(5)


@dataclass(frozen=True)
class Settings:
    """Everything that `plan` was asked for.

    Attributes:
        sample_rows: at the most so many rows are read.
        num_workers: that share the job, or None for one; not with a share of an array.
        price_per_hour: of one worker, in any currency.
        tokens_per_second: of one worker, or None to measure it.
    """

    inputs: tuple[str, ...]
    model: ModelSettings
    read: ReadSettings
    cut: CutSettings
    share: Share
    sample_rows: int
    num_workers: int | None = None
    price_per_hour: float | None = None
    tokens_per_second: float | None = None
    endpoint_url: str | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.share.count > 1:
            raise ConfigError(
                "--workers plans all shares of a job and --shard-index a single one; leave out one "
                "of them (a share may also come from AWS Batch's or Slurm's variables)"
            )


@dataclass(frozen=True)
class Truncation:
    """What becomes of the texts at one maximum length.

    Attributes:
        max_length: tokens of a text that the model sees.
        chosen: whether it is the one that the rest of the plan is for.
        texts: share of the texts that are longer.
        lost: share of all tokens that the model does not see.
        num_tokens: that it sees of a text, on average.
    """

    max_length: int
    chosen: bool
    texts: Estimate
    lost: Estimate
    num_tokens: Estimate


@dataclass(frozen=True)
class WorkerTime:
    """How long the work takes, and what it costs.

    Attributes:
        num_workers: that have something to do.
        num_shards: of the worker with the most rows.
        num_rows: of that worker.
        start_s: until its first shard is begun, or None where that was not measured.
        run_s: of its shards, the model's way into memory included: what a run calls `seconds`.
        worker_hours: of all workers together, starts included.
        cost: of those, in the unit of the price; None without one.
        tokens_per_s: of one worker while its stages overlap.
        is_measured: on this machine, just now.
    """

    num_workers: int
    num_shards: int
    num_rows: int
    start_s: float | None
    run_s: Estimate
    worker_hours: Estimate
    cost: Estimate | None
    tokens_per_s: float
    is_measured: bool


@dataclass(frozen=True)
class Forecast:
    """What was found and what follows from it.

    Attributes:
        num_files, num_bytes: of the inputs, unreadable ones included.
        kinds: number of files by their ending.
        unreadable: why some cannot be read, or not in full.
        num_rows: of the shards that this plan is for.
        num_sampled, num_blocks: rows that were read, and the places that they are from.
        is_whole: every row was read, so that nothing is estimated.
        num_planned, num_mine: shards of the whole job, and those that this plan is for.
        error_rows: by code, rows that will have no label.
        text_tokens: of a text, on average.
        total_tokens: that the model will see.
        lengths: texts by their tokens; those of more than MOST_TOKENS count as so long.
        truncation: by maximum length, ascending.
        repeats: share of the rows whose tokens an earlier row has too; in a sample, at least.
        padding: share of the computed tokens that is padding.
        max_batch_tokens: the token budget of the batches.
        device, dtype: of this machine.
        speed: as measured, or None.
        time: or None where there is nothing to compute.
    """

    num_files: int
    num_bytes: int
    kinds: dict[str, int]
    unreadable: tuple[BatchclfError, ...]
    num_rows: int
    num_sampled: int
    num_blocks: int
    is_whole: bool
    num_planned: int
    num_mine: int
    error_rows: dict[str, Estimate]
    text_tokens: Estimate
    total_tokens: Estimate
    lengths: Histogram
    truncation: tuple[Truncation, ...]
    repeats: float
    padding: float
    max_batch_tokens: int
    device: str
    dtype: str
    speed: Speed | None
    time: WorkerTime | None

    def as_dict(self) -> dict[str, Any]:
        """The numbers, as JSON takes them."""
        bins = [
            {"from": first, "to": last, "share": share}
            for (first, last), share in zip(self.lengths.bounds(), self.lengths.shares, strict=True)
        ]
        return {
            **asdict(self),
            "unreadable": [str(error) for error in self.unreadable],
            "lengths": bins,
        }


class PlanJob:
    """A plan in the making. Making it reads the model's files and looks at the inputs.

    Args:
        settings: what was asked for.
        scratch: an empty folder, for what the measurement writes.

    Raises:
        ConfigError, CheckpointError: the settings make no sense together.
        InputError: an input argument matches nothing.
    """

    def __init__(self, settings: Settings, scratch: str) -> None:
        self._settings = settings
        self._labelling = Labelling(
            settings.model,
            settings.read,
            PredictSettings(),
            settings.cut,
            scratch,
            settings.endpoint_url,
        )
        self._checkpoint = self._labelling.checkpoint
        self._looked: Looked = look_into(
            settings.inputs, settings.read, OFFSET_ROWS, settings.endpoint_url
        )
        self._shards = plan_shards(self._looked.readable, settings.cut)
        self._mine = take_share(self._shards, settings.share)
        self._num_rows = sum(shard.num_rows for shard in self._mine)
        self._start_s = _process_age_s()

    def run(self, interrupt: threading.Event) -> Forecast:
        """Read the sample, measure, and work out the rest.

        Raises:
            Interrupted, StoreError: run the same command again.
        """
        for error in self._looked.unreadable:
            log.error("%s", error)
        reader = SampleReader(
            self._settings.read,
            TextEncoder(
                self._checkpoint.tokenizer, self._checkpoint.max_length, self._checkpoint.normalise
            ),
            TextEncoder(self._checkpoint.tokenizer, MOST_TOKENS, self._checkpoint.normalise),
            interrupt,
            self._settings.endpoint_url,
        )
        first_s = reader.first_s(self._mine)  # before anything else was read
        blocks = choose_blocks(self._num_rows, self._settings.sample_rows)
        log.info(
            "reading %s of %s rows",
            f"{blocks.num_sampled:,}",
            f"{self._num_rows:,}",
            extra=fields(sampled=blocks.num_sampled, rows=self._num_rows),
        )
        sample = reader.read(self._mine, dict(self._looked.readable), blocks)
        for error in sample.damaged:
            log.error("%s", error)
        began = time.perf_counter()
        tools = self._labelling.tools()
        build_s = first_s + time.perf_counter() - began
        shares = self._shares()
        self._labelling.tune(tools.engine, max(map(_num_rows, shares), default=0))
        windows = self._windows(sample, tools)
        computed = computed_tokens(windows, tools.engine)
        speed = None
        if windows.num_texts and self._settings.tokens_per_second is None:
            began = time.perf_counter()
            self._labelling.folder.prepare()
            build_s += time.perf_counter() - began
            speed = self._measure(reader, sample, tools, computed / windows.num_texts, interrupt)
        return self._forecast(sample, tools, windows, computed, speed, build_s, shares)

    def _shares(self) -> list[list[Shard]]:
        """The shards of each worker."""
        count = self._settings.num_workers or 1
        return [take_share(self._mine, Share(index, count)) for index in range(count)]

    def _windows(self, sample: Sample, tools: Tools) -> Windows:
        texts = np.flatnonzero(sample.rows.num_tokens)
        num_texts = round(len(texts) * self._num_rows / max(len(sample.rows.places), 1))
        digests = [sample.rows.digests[row] for row in texts.tolist()]
        return make_windows(
            sample.rows.num_tokens[texts], digests, tools.engine.window_tokens, num_texts
        )

    def _measure(
        self,
        reader: SampleReader,
        sample: Sample,
        tools: Tools,
        computed_a_text: float,
        interrupt: threading.Event,
    ) -> Speed:
        log.info("measuring this machine for %.0f to %.0f s", _MEASURE_S, 2 * _MEASURE_S)
        texts_a_row = float((sample.rows.num_tokens > 0).mean())
        speedometer = Speedometer(tools, interrupt)
        return speedometer.measure(
            sample.batches,
            _MEASURE_S,
            reader.seconds_a_row(self._mine),
            computed_a_text * texts_a_row,
        )

    def _forecast(
        self,
        sample: Sample,
        tools: Tools,
        windows: Windows,
        computed: int,
        speed: Speed | None,
        build_s: float,
        shares: Sequence[Sequence[Shard]],
    ) -> Forecast:
        rows, population = sample.rows, sample.population
        total_tokens = population.mean(rows.num_tokens).times(self._num_rows)
        is_text = rows.num_tokens > 0
        time_ = self._time(total_tokens, tools, speed, build_s, shares)
        repeats = 1 - len({rows.digests[row] for row in np.flatnonzero(is_text).tolist()}) / max(
            int(is_text.sum()), 1
        )
        sources = self._looked.sources
        distinct_tokens = sum(int(lengths.sum()) for lengths in windows.lengths)
        return Forecast(
            num_files=len(sources),
            num_bytes=sum(source.size_bytes for source in sources),
            kinds=dict(Counter(source_suffix(source.uri) or "" for source in sources)),
            unreadable=(*self._looked.unreadable, *sample.damaged),
            num_rows=self._num_rows,
            num_sampled=len(rows.places),
            num_blocks=len(np.unique(population.block_of)),
            is_whole=len(rows.places) == self._num_rows,
            num_planned=len(self._shards),
            num_mine=len(self._mine),
            error_rows={
                code: population.share(np.array([code == other for other in rows.codes])).times(
                    self._num_rows
                )
                for code in sorted(set(rows.codes) - {""})
            },
            text_tokens=population.ratio(rows.lengths, is_text),
            total_tokens=total_tokens,
            lengths=histogram(rows.lengths[is_text], population.weights[is_text]),
            truncation=self._truncation(sample),
            repeats=repeats if is_text.any() else 0.0,
            padding=1 - distinct_tokens / computed if computed else 0.0,
            max_batch_tokens=tools.engine.max_batch_tokens,
            device=str(self._labelling.compute.device),
            dtype=self._labelling.compute.dtype_name,
            speed=speed,
            time=time_,
        )

    def _truncation(self, sample: Sample) -> tuple[Truncation, ...]:
        longest, chosen = self._checkpoint.config.longest, self._checkpoint.max_length
        candidates = {chosen}
        candidate = _LEAST_CANDIDATE
        while candidate <= longest:
            candidates.add(candidate)
            candidate *= 2
        lengths = sample.rows.lengths
        is_text = sample.rows.num_tokens > 0
        found = []
        for max_length in sorted(candidates):
            seen = np.minimum(lengths, max_length)
            found.append(
                Truncation(
                    max_length,
                    max_length == chosen,
                    sample.population.share(lengths > max_length, is_text),
                    sample.population.share(lengths - seen, lengths),
                    sample.population.ratio(seen, is_text),
                )
            )
        return tuple(found)

    def _time(
        self,
        total_tokens: Estimate,
        tools: Tools,
        speed: Speed | None,
        build_s: float,
        shares: Sequence[Sequence[Shard]],
    ) -> WorkerTime | None:
        given = self._settings.tokens_per_second
        if not total_tokens.value or (speed is None and given is None):
            return None
        row_tokens = total_tokens.value / self._num_rows
        lowest, highest = speed.scatter if speed else (1.0, 1.0)
        low, high = (
            lowest * total_tokens.low / total_tokens.value,
            highest * total_tokens.high / total_tokens.value,
        )

        def seconds(shards: Sequence[Shard]) -> Estimate:
            fixed_s = build_s if speed else 0.0
            num_rows = _num_rows(shards)
            if speed is not None:
                first_rows = tools.engine.first_window_tokens / row_tokens
                rows_s = speed.seconds(num_rows, len(shards), first_rows)
            else:
                rows_s = num_rows * row_tokens / (given or 1.0)
            return Estimate(fixed_s + rows_s, fixed_s + rows_s * low, fixed_s + rows_s * high)

        busy = [shards for shards in shares if shards]
        most = max(busy, key=_num_rows)
        start_s = self._start_s if speed else None
        each = [seconds(shards) for shards in busy]
        starts_s = (start_s or 0.0) * len(busy)
        hours = Estimate(
            (starts_s + sum(one.value for one in each)) / 3600,
            (starts_s + sum(one.low for one in each)) / 3600,
            (starts_s + sum(one.high for one in each)) / 3600,
        )
        price = self._settings.price_per_hour
        return WorkerTime(
            num_workers=len(busy),
            num_shards=len(most),
            num_rows=_num_rows(most),
            start_s=start_s,
            run_s=seconds(most),
            worker_hours=hours,
            cost=None if price is None else hours.times(price),
            tokens_per_s=given or (row_tokens / speed.steady_s if speed else 0.0),
            is_measured=speed is not None,
        )


def make_forecast(settings: Settings, interrupt: threading.Event) -> Forecast:
    """Look at the inputs, read a sample, and measure. Leaves nothing behind.

    Raises:
        ConfigError, CheckpointError: the settings make no sense together.
        InputError: an input argument matches nothing.
        Interrupted, StoreError: run the same command again.
    """
    with tempfile.TemporaryDirectory(prefix="batchclf-plan-") as scratch:
        return PlanJob(settings, scratch).run(interrupt)


def _num_rows(shards: Sequence[Shard]) -> int:
    return sum(shard.num_rows for shard in shards)


def _process_age_s() -> float:
    """Seconds since this process was started; 0 where the system does not say."""
    if not _PROCESS_STAT.exists():  # not Linux
        return 0.0
    # the second field is the program's name in brackets, which may hold spaces
    after_name = _PROCESS_STAT.read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    ticks = int(after_name.split()[_START_FIELD - 3])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
