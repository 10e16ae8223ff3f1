"""One life of a worker: what comes in, what is labelled, and what becomes of each message."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from batchclf.errors import BatchclfError, StoreError
from batchclf.held import Backoff, Held
from batchclf.intake import (
    Intake,
    Reading,
    ReadyShards,
    TakeSettings,
    tell_refused,
)
from batchclf.labelling import Labelling
from batchclf.log import fields
from batchclf.messages import ARTICLES, AllowedSources
from batchclf.metrics import Metrics
from batchclf.notes import SUCCESS_NAME
from batchclf.outage import OutageWatch
from batchclf.shards import Shard
from batchclf.sqs import Delivery, Queue
from batchclf.work.gathered import GATHERED_BYTES, WAIT_S, Gathered
from batchclf.work.health import Health
from batchclf.work.settings import Settings
from batchclf.work.summary import Summary, Tally
from batchclf.work.under_way import UnderWay
from batchclf.worker import Arrived, Outcome, Pause, run_shards

log = logging.getLogger(__name__)

_SETS_HELD = 3  # one that is labelled, one to go on with, and one that is gathered
_SETTLERS = 2
# After SIGTERM, until messages are given back although the flow has not stopped: an upload may
# hang for longer than the process has left.
_PATIENCE_S = 8.0


class Run:
    """One life of a worker: its threads, and what it holds."""

    def __init__(
        self,
        settings: Settings,
        labelling: Labelling,
        queue: Queue,
        allowed: AllowedSources,
        metrics: Metrics,
        interrupt: threading.Event,
        *,
        show_health: bool,
    ) -> None:
        asked = settings.queue
        self._settings = settings
        self._labelling = labelling
        self._queue = queue
        self._interrupt = interrupt
        self._summary = Summary()
        self._tally = Tally(self._summary, metrics)
        self._backoff = Backoff(asked.retry_delay_s)
        self._held = Held(queue, self._tally, self._fail)
        self._health = Health(self._summary, self._tally, self._held, on_log=show_health)
        self._outage = OutageWatch(
            lambda: labelling.folder.sizes(labelling.sink.prefix + SUCCESS_NAME)
        )
        self._intake = Intake(
            queue,
            self._held,
            Reading(settings.read, settings.cut, allowed, self._outage, settings.endpoint_url),
            TakeSettings(
                max_held=_SETS_HELD * asked.gather_rows,
                max_held_bytes=_SETS_HELD * GATHERED_BYTES,
                max_messages=asked.max_messages,
                max_rows=asked.max_rows,
                idle_exit_s=asked.idle_exit_s,
            ),
            self._backoff,
            self._tally,
            self._outage,
            interrupt,
        )
        self._settlers = ThreadPoolExecutor(_SETTLERS, thread_name_prefix="settle")
        self._under_way = UnderWay()
        self._stopping = threading.Event()

    def run(self) -> Summary:
        self._labelling.folder.prepare()
        tools = self._labelling.tools()
        compute = self._labelling.compute
        log.info(
            "working on %s on %s in %s",
            self._queue.name,
            compute.device,
            compute.dtype_name,
            extra=fields(
                queue=self._queue.url,
                device=str(compute.device),
                dtype=compute.dtype_name,
                output=self._labelling.output,
                share=f"{self._settings.share.index} of {self._settings.share.count}",
            ),
        )
        began = time.perf_counter()
        summary = self._summary
        try:
            with ExitStack() as stack:
                stack.enter_context(self._health)
                stack.enter_context(self._held)
                stack.callback(self._stop)
                threading.Thread(target=self._stop_anyway, name="stop", daemon=True).start()
                self._intake.start()
                shards = run_shards(
                    self._shards(), tools, self._interrupt, _ignore, summary.busy.update
                )
                for outcome in shards:
                    self._settle(outcome)
            self._intake.check()  # the last deletes are made on the way out
            summary.reason = "done"
        except BatchclfError as error:
            summary.reason = str(error)
            raise
        finally:
            summary.end(began)
            self._queue.close()
            if summary.messages["received"]:
                self._labelling.record_run(asdict(self._settings), summary.as_dict())
        return summary

    def _stop(self) -> None:
        """Receive no more, delete what is committed, give back the rest; the heart beats on."""
        self._stopping.set()
        self._intake.close()
        self._settlers.shutdown()
        self._held.release_all()

    def _stop_anyway(self) -> None:
        """Give everything back where the work does not stop in time: its end is worth nothing then.

        What it commits all the same is found done by whoever receives the message next.
        """
        self._interrupt.wait()
        if not self._stopping.wait(_PATIENCE_S):
            self._intake.close()
            self._held.release_all()

    def _fail(self, error: Exception) -> None:
        self._intake.fail(error)

    def _shards(self) -> Iterator[Shard | Arrived | Pause]:
        """What is to be labelled, as it comes; runs in the first stage of the flow."""
        gathered = Gathered(self._settings.queue, self._queue.path, self._settings.read)
        while True:
            ready = self._intake.take(gathered.wait_s())
            for article in self._under_way.take_again():
                gathered.add(article)
            for each in ready or ():
                if isinstance(each, ReadyShards):
                    yield from self._under_way.begin(each)
                    continue
                gathered.add(each)
                if gathered.is_full or (gathered.is_worth_it and self._under_way.is_hungry):
                    yield from self._close(gathered)
            if ready is None or gathered.is_due:
                yield from self._close(gathered)
            if not ready:
                yield Pause.PAUSE
            if ready is None:
                if not self._under_way:
                    return
                time.sleep(WAIT_S)

    def _close(self, gathered: Gathered) -> Iterator[Arrived | Pause]:
        """One set of articles, of those that are still ours."""
        found = [each for each in gathered.take() if each.delivery in self._held]
        if found:
            yield self._under_way.begin_set(found, gathered.make_set(found))
            yield Pause.PAUSE

    def _settle(self, outcome: Outcome) -> None:
        """The one place where messages are deleted, or given back for what is wrong with them."""
        self._summary.add(outcome)
        if outcome.is_new and outcome.receipt is not None:
            self._tally.count("labelled", outcome.receipt.counts.num_rows)
            if not outcome.shard.source.uri.startswith(ARTICLES):
                self._outage.end()
        articles, finished = self._under_way.end(outcome)
        if outcome.error is None:
            done = [each.delivery for each in articles]
            done += [each.delivery for each in finished if not each.errors]
            self._later(self._held.delete, done)
        else:
            self._refuse([each.delivery for each in articles], outcome)
        for each in finished:
            if each.errors:
                self._tell(each.delivery, each.errors[0])
                self._later(self._release, [each.delivery])
                self._look_for_outage(each)

    def _look_for_outage(self, ready: ReadyShards) -> None:
        failures = [error for error in ready.errors if isinstance(error, StoreError)]
        if failures:
            self._outage.check(ready.delivery.message_id, failures[0])

    def _refuse(self, deliveries: Sequence[Delivery], outcome: Outcome) -> None:
        for delivery in deliveries:
            if outcome.error is not None:
                self._tell(delivery, outcome.error)
        self._later(self._release, deliveries)

    def _tell(self, delivery: Delivery, error: Any) -> None:
        self._tally.count("refused")
        tell_refused(delivery, error, self._backoff)

    def _release(self, deliveries: Sequence[Delivery]) -> None:
        self._held.release(deliveries, self._backoff)

    def _later(
        self, call: Callable[[Sequence[Delivery]], None], deliveries: Sequence[Delivery]
    ) -> None:
        """Call in another thread, so that labelling goes on."""
        if deliveries:
            self._settlers.submit(call, deliveries).add_done_callback(self._settled)

    def _settled(self, future: "Future[None]") -> None:
        error = future.exception()
        if isinstance(error, Exception):
            self._fail(error)


def _ignore(num_examples: int, num_tokens: int) -> None:
    """Batches are not shown one by one: health is told by the row."""
