"""The job of `batchclf classify`: plan, share, run, and say what was done."""

import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from batchclf.config import CutSettings, ModelSettings, PredictSettings, ReadSettings, Share
from batchclf.errors import BatchclfError
from batchclf.labelling import Labelling, peak_rss_mib
from batchclf.log import fields
from batchclf.notes import SUCCESS_NAME, read_note
from batchclf.planning import Plan, make_plan
from batchclf.progress import Progress
from batchclf.shards import Shard, check_same_cut, take_share
from batchclf.sink import Counts
from batchclf.store import check_separate
from batchclf.worker import Outcome, run_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Everything that `classify` was asked for."""

    inputs: tuple[str, ...]
    output: str
    model: ModelSettings
    read: ReadSettings
    predict: PredictSettings
    cut: CutSettings
    share: Share
    endpoint_url: str | None = None


@dataclass
class Summary:
    """What a run did.

    Attributes:
        num_planned: shards of the whole job; `num_mine` of them are this worker's share.
        counts, labels: rows of the shards that this run committed.
        busy: each stage's share of the time in which it worked.
        peak_rss_mib: most memory that this process has held.
        complete: every shard of the whole job is in the output.
    """

    num_planned: int
    num_mine: int
    errors: list[BatchclfError] = field(default_factory=list)
    num_committed: int = 0
    num_skipped: int = 0
    counts: Counts = field(default_factory=Counts)
    labels: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    peak_rss_mib: int = 0
    complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The numbers, as JSON takes them."""
        return {
            "complete": self.complete,
            "num_shards": {
                "planned": self.num_planned,
                "mine": self.num_mine,
                "committed": self.num_committed,
                "done_before": self.num_skipped,
            },
            "counts": asdict(self.counts),
            "labels": dict(self.labels),
            "errors": [str(error) for error in self.errors],
            "seconds": round(self.seconds, 3),
            "articles_per_s": round(self.counts.num_rows / max(self.seconds, 1e-9), 2),
            "tokens_per_s": round(self.counts.num_tokens / max(self.seconds, 1e-9), 1),
            "busy": self.busy,
            "peak_rss_mib": self.peak_rss_mib,
        }


class ClassifyJob:
    """A planned job. Making it reads the model's files and looks at the inputs; nothing is written.

    Raises:
        ConfigError, CheckpointError: the settings make no sense together.
        InputError: an input argument matches nothing.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        check_separate(settings.inputs, settings.output)
        self.labelling = Labelling(
            settings.model,
            settings.read,
            settings.predict,
            settings.cut,
            settings.output,
            settings.endpoint_url,
        )
        self.compute = self.labelling.compute
        self.checkpoint = self.labelling.checkpoint
        self.folder = self.labelling.folder
        self.sink = self.labelling.sink
        self.plan: Plan = make_plan(
            settings.inputs, settings.read, settings.cut, settings.endpoint_url
        )
        self.mine = take_share(self.plan.shards, settings.share)
        self.existing = frozenset(self.folder.sizes(self.sink.prefix))
        check_same_cut(self.plan.shards, list(self.existing))

    @property
    def output(self) -> str:
        """Where the labelled files are."""
        return self.labelling.output

    def is_done(self, shard: Shard) -> bool:
        """Whether an object of the shard's name was there when the job was planned."""
        return self.sink.name(shard) in self.existing

    def run(self, interrupt: threading.Event, progress: Progress) -> Summary:
        """Label this worker's shards, then write down what was done.

        Raises:
            Interrupted, StoreError: what was committed until then stays; run again.
            ErrorRateError: the first bad row under --on-error fail.
        """
        began = time.perf_counter()
        summary = Summary(
            num_planned=len(self.plan.shards),
            num_mine=len(self.mine),
            errors=list(self.plan.unreadable),
        )
        for error in self.plan.unreadable:
            log.error("%s", error)
        if self.mine:
            self.folder.prepare()
            self._withdraw_other_success()
        try:
            for outcome in self._outcomes(interrupt, progress, summary):
                self._count(outcome, summary)
                progress.shard(outcome.shard.num_rows, computed=outcome.is_new)
                if outcome.error is not None and self.settings.predict.on_error == "fail":
                    raise outcome.error
            summary.complete = self._mark_success(summary)
        finally:
            summary.seconds = time.perf_counter() - began
            summary.peak_rss_mib = peak_rss_mib()
            self._record_run(summary)
        return summary

    def _outcomes(
        self, interrupt: threading.Event, progress: Progress, summary: Summary
    ) -> Iterator[Outcome]:
        if not self.mine:
            return
        num_rows = sum(shard.num_rows for shard in self.mine)
        tools = self.labelling.tools(num_rows)
        device, dtype = str(self.compute.device), self.compute.dtype_name
        log.info(
            "labelling %s rows in %s on %s in %s",
            f"{num_rows:,}",
            "1 shard" if len(self.mine) == 1 else f"{len(self.mine):,} shards",
            device,
            dtype,
            extra=fields(
                rows=num_rows,
                shards=len(self.mine),
                device=device,
                dtype=dtype,
                output=self.output,
            ),
        )
        yield from run_shards(self.mine, tools, interrupt, progress.batch, summary.busy.update)

    def _count(self, outcome: Outcome, summary: Summary) -> None:
        shard, receipt = outcome.shard, outcome.receipt
        if outcome.error is not None:
            summary.errors.append(outcome.error)
            log.error("%s", outcome.error)
        if receipt is None:
            return
        if not outcome.is_new:
            summary.num_skipped += 1
            log.info("done before: %s", shard, extra=fields(shard=shard.name))
        else:
            summary.num_committed += 1
            summary.counts += receipt.counts
            summary.labels.update(receipt.labels)
            counts = fields(shard=shard.name, **asdict(receipt.counts))
            log.info("committed %s", shard, extra=counts)

    def _withdraw_other_success(self) -> None:
        """Take away a mark of success that would speak too soon of this plan."""
        success = read_note(self.folder, self.sink.prefix + SUCCESS_NAME)
        other = success is not None and success.get("plan") != self._plan_id
        if other or (success is not None and self.plan.unreadable):
            self.folder.delete(self.sink.prefix + SUCCESS_NAME)

    def _mark_success(self, summary: Summary) -> bool:
        """Write _SUCCESS.json if every planned shard, of all workers, is there."""
        if summary.errors:
            return False
        name = self.sink.prefix + SUCCESS_NAME
        there = self.folder.sizes(self.sink.prefix)
        names = [shard.name for shard in self.plan.shards]
        if any(self.sink.prefix + shard_name not in there for shard_name in names):
            return False
        if name not in there:
            note = {
                **self.labelling.identity(),
                "plan": self._plan_id,
                "num_shards": len(names),
                "num_rows": sum(shard.num_rows for shard in self.plan.shards),
                "shards": names,
            }
            self.folder.put(name, json.dumps(note, indent=1).encode())
        return True

    def _record_run(self, summary: Summary) -> None:
        if not self.mine:
            return
        what = {"plan": self._plan_id, **summary.as_dict()}
        self.labelling.record_run(asdict(self.settings), what)

    @cached_property
    def _plan_id(self) -> str:
        names = "\n".join(sorted(shard.name for shard in self.plan.shards))
        return hashlib.sha256(names.encode()).hexdigest()
