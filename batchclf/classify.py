"""The job of `batchclf classify`: plan, share, run, and say what was done."""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from batchclf.config import CutSettings, ModelSettings, PredictSettings, ReadSettings, Share
from batchclf.errors import BatchclfError, StoreError
from batchclf.fleet import Tell, run_fleet
from batchclf.labelling import Labelling
from batchclf.log import fields
from batchclf.notes import SUCCESS_NAME, read_note
from batchclf.planning import Plan, make_plan
from batchclf.progress import Listener
from batchclf.shards import Shard, check_same_cut, take_share
from batchclf.store import check_separate
from batchclf.totals import Totals
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


@dataclass(kw_only=True)
class Summary(Totals):
    """What a run did.

    Attributes:
        num_planned: shards of the whole job; `num_mine` of them are this worker's share.
        complete: every shard of the whole job is in the output.
    """

    num_planned: int
    num_mine: int
    errors: list[BatchclfError] = field(default_factory=list)
    complete: bool = False

    def join_parts(self, parts: Sequence["Summary"]) -> None:
        """As `join`, with what only this summary tells."""
        self.join(parts)
        for part in parts:
            known = {str(error) for error in self.errors}
            self.errors += [error for error in part.errors if str(error) not in known]
        self.complete = any(part.complete for part in parts)

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
            "errors": [str(error) for error in self.errors],
            **self.numbers(),
        }


class ClassifyJob:
    """A planned job. Making it reads the model's files and looks at the inputs; nothing is written.

    Attributes:
        summary: of what `run` has done so far.

    Raises:
        ConfigError, CheckpointError: the settings make no sense together.
        InputError: an input argument matches nothing.

    Args:
        settings: what was asked for.
        plan: of a job that this one is a part of; None makes one.
        devices: one process each; None: those that the settings name.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan | None = None,
        devices: Sequence[str] | None = None,
    ) -> None:
        self.settings = settings
        self._is_part = plan is not None
        check_separate(settings.inputs, settings.output)
        self.labelling = Labelling(
            settings.model,
            settings.read,
            settings.predict,
            settings.cut,
            settings.output,
            settings.endpoint_url,
        )
        self.labelling.sign_log()
        self.compute = self.labelling.compute
        self.devices = tuple(devices or self.labelling.devices)
        self.checkpoint = self.labelling.checkpoint
        self.folder = self.labelling.folder
        self.sink = self.labelling.sink
        self.plan: Plan = plan or make_plan(
            settings.inputs, settings.read, settings.cut, settings.endpoint_url
        )
        self.mine = take_share(self.plan.shards, settings.share)
        self.existing = frozenset(self.folder.sizes(self.sink.prefix))
        check_same_cut(self.plan.shards, list(self.existing))
        self.summary = Summary(
            num_planned=len(self.plan.shards),
            num_mine=len(self.mine),
            errors=list(self.plan.unreadable),
        )

    @property
    def output(self) -> str:
        """Where the labelled files are."""
        return self.labelling.output

    def is_done(self, shard: Shard) -> bool:
        """Whether an object of the shard's name was there when the job was planned."""
        return self.sink.name(shard) in self.existing

    def run(self, interrupt: threading.Event, progress: Listener) -> Summary:
        """Label this worker's shards, then write down what was done.

        Raises:
            Interrupted, StoreError: what was committed until then stays; run again.
            ErrorRateError: the first bad row under --on-error fail.
        """
        began = time.perf_counter()
        summary = self.summary
        if not self._is_part:
            for error in self.plan.unreadable:
                log.error("%s", error)
        if len(self.devices) > 1 and self.mine:
            parts = self._run_on_all(interrupt, progress)
            summary.end(began)
            summary.join_parts(parts)
            return summary
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
            summary.end(began)
            self._record_run(summary)
        return summary

    def _run_on_all(self, interrupt: threading.Event, progress: Listener) -> list[Summary]:
        """A process for each device, with a part of this worker's share each."""
        dtype = self.compute.dtype_name  # of them all, or each would write a fingerprint of its own
        tasks = []
        for index, device in enumerate(self.devices):
            share = self.settings.share.part(index, len(self.devices))
            if not take_share(self.plan.shards, share):
                continue
            model = replace(self.settings.model, device=device, dtype=dtype)
            tasks.append((device, (replace(self.settings, model=model, share=share), self.plan)))

        def on_told(told: tuple[str, int, int]) -> None:
            kind, first, second = told
            if kind == "batch":
                progress.batch(first, second)
            else:
                progress.shard(first, computed=bool(second))

        self.folder.prepare()
        return run_fleet(_run_part, tasks, interrupt, on_told)

    def _outcomes(
        self, interrupt: threading.Event, progress: Listener, summary: Summary
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
        if isinstance(outcome.error, StoreError):
            raise outcome.error  # it may pass: the next run reads this source
        if outcome.error is not None:
            summary.errors.append(outcome.error)
            log.error("%s", outcome.error, extra=fields(shard=outcome.shard.name))
        summary.add(outcome)

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


class _Relay:
    """Tells the process that started this one how far it is."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def batch(self, num_rows: int, num_tokens: int) -> None:
        self._tell(("batch", num_rows, num_tokens))

    def shard(self, num_rows: int, *, computed: bool) -> None:
        self._tell(("shard", num_rows, int(computed)))


def _run_part(task: tuple[Settings, Plan], interrupt: threading.Event, tell: Tell) -> Summary:
    """What one of several processes does."""
    settings, plan = task
    return ClassifyJob(settings, plan).run(interrupt, _Relay(tell))
