"""The job of `batchclf work`: label what a queue's messages hold, delete each when that is durable.

    receive -> gather -> run_shards -> delete

A message is deleted only after the output with its rows was committed, so a worker that dies in
between leaves it to another: nothing is lost. What the other finds done it only deletes; a set of
articles is gathered anew, so an article may be labelled twice, as the queue may deliver it twice,
and its message id tells.

A worker stops in order: it receives no more, the heart beats on until the work has stopped, what
was committed is deleted, and the rest is given back.
"""

import hashlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from batchclf.config import (
    CutSettings,
    ModelSettings,
    PredictSettings,
    ReadSettings,
    Share,
)
from batchclf.errors import BatchclfError, ConfigError, ErrorRateError
from batchclf.held import Backoff, Held
from batchclf.intake import (
    Intake,
    Reading,
    ReadyArticle,
    ReadyShards,
    TakeSettings,
    tell_refused,
)
from batchclf.labelling import Labelling, peak_rss_mib
from batchclf.log import fields
from batchclf.messages import ARTICLES, AllowedSources
from batchclf.metrics import CountName, GaugeName, Metrics
from batchclf.shards import Shard
from batchclf.sink import Counts
from batchclf.source import QueuedArticle, article_batches, article_schema
from batchclf.sqs import MAX_IN_FLIGHT, Delivery, Depth, Queue
from batchclf.store import Source
from batchclf.worker import Arrived, Outcome, Pause, run_shards

log = logging.getLogger(__name__)

GATHERED_BYTES = 64 << 20  # of articles in one set
MAX_GATHER_ROWS = MAX_IN_FLIGHT // 12  # a worker holds three sets, and should not be alone
_SETS_HELD = 3  # one that is labelled, one to go on with, and one that is gathered
_WAIT_S = 0.2
_HEALTH_EVERY_S = 10.0
_SETTLERS = 2
# After SIGTERM, until messages are given back although the flow has not stopped: an upload may
# hang for longer than the process has left.
_PATIENCE_S = 8.0


@dataclass(frozen=True)
class QueueSettings:
    """Which queue, and what is taken from it when.

    Attributes:
        allowed_sources: `s3://` prefixes that messages may point to.
        visibility_s: how long a message stays hidden when its worker dies.
        retry_delay_s: until a message that failed is tried again; then twice as long each time.
        max_rows: no more messages are taken after so many rows.
    """

    url: str
    allowed_sources: tuple[str, ...] = ()
    gather_rows: int = 4096
    gather_s: float = 5.0
    visibility_s: int = 60
    retry_delay_s: int = 10
    max_messages: int | None = None
    max_rows: int | None = None
    idle_exit_s: float | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that `work` was asked for."""

    queue: QueueSettings
    output: str
    model: ModelSettings
    read: ReadSettings
    predict: PredictSettings
    cut: CutSettings
    share: Share = field(default_factory=Share)
    endpoint_url: str | None = None


@dataclass
class Summary:
    """What a worker did.

    Attributes:
        messages: received, deleted, released, refused, abandoned.
        counts, labels: rows that were committed here.
        num_sets: sets of articles committed; `num_shards` of files, `num_skipped` found done.
        reason: why it ended.
    """

    messages: Counter[CountName] = field(default_factory=Counter)
    num_sets: int = 0
    num_shards: int = 0
    num_skipped: int = 0
    counts: Counts = field(default_factory=Counts)
    labels: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    peak_rss_mib: int = 0
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The numbers, as JSON takes them."""
        return {
            "messages": {
                name: self.messages[name]
                for name in ("received", "deleted", "released", "refused", "abandoned")
            },
            "num_sets": self.num_sets,
            "num_shards": {"committed": self.num_shards, "done_before": self.num_skipped},
            "counts": asdict(self.counts),
            "labels": dict(self.labels),
            "seconds": round(self.seconds, 3),
            "articles_per_s": round(self.counts.num_rows / max(self.seconds, 1e-9), 2),
            "tokens_per_s": round(self.counts.num_tokens / max(self.seconds, 1e-9), 1),
            "busy": self.busy,
            "peak_rss_mib": self.peak_rss_mib,
            "ended": self.reason,
        }


class _Tally:
    """Counts for the summary and for whoever watches the metrics."""

    def __init__(self, summary: Summary, metrics: Metrics) -> None:
        self._summary = summary
        self._metrics = metrics
        self._lock = threading.Lock()

    def count(self, name: CountName, n: int = 1) -> None:
        with self._lock:
            self._summary.messages[name] += n
        self._metrics.count(name, n)

    def gauge(self, name: GaugeName, value: float) -> None:
        self._metrics.gauge(name, value)


class WorkJob:
    """A worker that is ready to start. Making it reads the model and asks the queue; no writes.

    Raises:
        ConfigError, CheckpointError: the settings make no sense together, or there is no queue.
        QueueError: the queue kept failing.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        asked = settings.queue
        self._allowed = AllowedSources(asked.allowed_sources)
        if self._allowed.covers_folder(settings.output):
            raise ConfigError(
                f"the output {settings.output} lies inside an --allow-source, so the worker could "
                "be told to label its own output; choose an output beside it"
            )
        self.labelling = Labelling(
            settings.model,
            settings.read,
            settings.predict,
            settings.cut,
            settings.output,
            settings.endpoint_url,
        )
        self.labelling.folder.sizes(self.labelling.sink.prefix + "_")  # may it be read at all?
        self.queue = Queue(asked.url, settings.endpoint_url, visibility_s=asked.visibility_s)
        self.redrives = "RedrivePolicy" in self.queue.attributes()

    def depth(self) -> Depth:
        """About how many messages the queue has."""
        return self.queue.depth()

    def run(
        self, interrupt: threading.Event, metrics: Metrics, *, show_health: bool = True
    ) -> Summary:
        """Work until told to stop, or until the settings say that it is enough.

        Raises:
            Interrupted: after SIGTERM or SIGINT; everything held was given back.
            QueueError, StoreError, ConfigError: likewise, for what fails all messages alike.
        """
        if not self.redrives:
            log.warning(
                "%s has no redrive policy: a message that cannot be labelled comes back until its "
                "retention ends; give the queue a dead-letter queue",
                self.queue.name,
            )
        return _Run(self, interrupt, metrics, show_health=show_health).run()


class _Run:
    """One life of a worker: its threads, and what it holds."""

    def __init__(
        self, job: WorkJob, interrupt: threading.Event, metrics: Metrics, *, show_health: bool
    ) -> None:
        settings, asked = job.settings, job.settings.queue
        self._labelling = job.labelling
        self._settings = settings
        self._queue = job.queue
        self._interrupt = interrupt
        self._show_health = show_health
        self._summary = Summary()
        self._tally = _Tally(self._summary, metrics)
        self._backoff = Backoff(asked.retry_delay_s)
        self._held = Held(job.queue, self._tally, self._fail)
        self._intake = Intake(
            job.queue,
            self._held,
            Reading(settings.read, settings.cut, job._allowed, settings.endpoint_url),  # noqa: SLF001 - one room
            TakeSettings(
                max_held=_SETS_HELD * asked.gather_rows,
                max_held_bytes=_SETS_HELD * GATHERED_BYTES,
                max_messages=asked.max_messages,
                max_rows=asked.max_rows,
                idle_exit_s=asked.idle_exit_s,
            ),
            self._backoff,
            self._tally,
            interrupt,
        )
        self._settlers = ThreadPoolExecutor(_SETTLERS, thread_name_prefix="settle")
        self._under_way = _UnderWay()
        self._again: deque[ReadyArticle] = deque()  # whose set failed for another's sake
        self._stopping = threading.Event()
        self._over = threading.Event()

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
                stack.callback(self._end_health, self._start_health())
                stack.enter_context(self._held)
                stack.callback(self._stop)
                threading.Thread(target=self._stop_anyway, name="stop", daemon=True).start()
                self._intake.start()
                shards = run_shards(
                    self._shards(), tools, self._interrupt, _ignore, summary.busy.update
                )
                for outcome in shards:
                    self._settle(outcome)
            summary.reason = "done"
        except BatchclfError as error:
            summary.reason = str(error)
            raise
        finally:
            summary.seconds = time.perf_counter() - began
            summary.peak_rss_mib = peak_rss_mib()
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

    def _fail(self, error: BatchclfError) -> None:
        self._intake.fail(error)

    def _shards(self) -> Iterator[Shard | Arrived | Pause]:
        """What is to be labelled, as it comes; runs in the first stage of the flow."""
        gathered = _Gathered(self._settings.queue, self._queue.path, self._settings.read)
        while True:
            ready = self._intake.take(gathered.wait_s())
            while self._again:
                gathered.add(self._again.popleft())
            for each in ready or ():
                if isinstance(each, ReadyShards):
                    yield from self._under_way.begin(each)
                    continue
                gathered.add(each)
                if gathered.is_full:
                    yield from self._close(gathered)
            if ready is None or gathered.is_due:
                yield from self._close(gathered)
            if not ready:
                yield Pause.PAUSE
            if ready is None:
                if not self._under_way and not self._again:
                    return
                time.sleep(_WAIT_S)

    def _close(self, gathered: "_Gathered") -> Iterator[Arrived | Pause]:
        """One set of articles, of those that are still ours."""
        found = [each for each in gathered.take() if each.delivery in self._held]
        if found:
            yield self._under_way.begin_set(found, gathered.make_set(found))
            yield Pause.PAUSE

    def _settle(self, outcome: Outcome) -> None:
        """The one place where messages are deleted, or given back for what is wrong with them."""
        self._count(outcome)
        articles, finished = self._under_way.end(outcome)
        if outcome.error is None:
            done = [each.delivery for each in articles]
            done += [each.delivery for each in finished if not each.errors]
            self._later(self._held.delete, done)
        elif isinstance(outcome.error, ErrorRateError):
            # The rows with errors are at fault; the others are gathered again.
            failed = set(outcome.failed_rows)
            self._refuse([each.delivery for i, each in enumerate(articles) if i in failed], outcome)
            self._again.extend(each for i, each in enumerate(articles) if i not in failed)
        else:
            self._refuse([each.delivery for each in articles], outcome)
        for each in finished:
            if each.errors:
                self._tell(each.delivery, each.errors[0])
                self._later(self._release, [each.delivery])

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
        if isinstance(error, BatchclfError):
            self._fail(error)
        elif error is not None:
            raise error

    def _count(self, outcome: Outcome) -> None:
        summary, receipt, shard = self._summary, outcome.receipt, outcome.shard
        if receipt is None:
            return
        if not outcome.is_new:
            summary.num_skipped += 1
            log.info("done before: %s", shard, extra=fields(shard=shard.name))
            return
        if shard.source.uri.startswith(ARTICLES):
            summary.num_sets += 1
        else:
            summary.num_shards += 1
        summary.counts += receipt.counts
        summary.labels.update(receipt.labels)
        self._tally.count("labelled", receipt.counts.num_rows)
        counts = fields(shard=shard.name, **asdict(receipt.counts))
        log.info("committed %s", shard, extra=counts)

    def _start_health(self) -> threading.Thread:
        thread = threading.Thread(target=self._tell_health, name="health", daemon=True)
        thread.start()
        return thread

    def _end_health(self, thread: threading.Thread) -> None:
        self._over.set()
        thread.join()

    def _tell_health(self) -> None:
        before, then = 0, time.monotonic()
        is_over = False
        while not is_over:
            is_over = self._over.wait(_HEALTH_EVERY_S)
            num_rows, now = self._summary.counts.num_rows, time.monotonic()
            rows_per_s = (num_rows - before) / max(now - then, 1e-9)
            self._tally.gauge("articles_per_s", rows_per_s)
            if self._show_health and (num_rows > before or self._held):
                self._log_health(rows_per_s)
            before, then = num_rows, now

    def _log_health(self, rows_per_s: float) -> None:
        messages, oldest_s = self._summary.messages, self._held.oldest_s()
        log.info(
            "%s rows labelled, %s rows/s; messages: %s received, %s deleted, %s held, the oldest "
            "%.0f s old",
            f"{self._summary.counts.num_rows:,}",
            f"{rows_per_s:,.1f}",
            f"{messages['received']:,}",
            f"{messages['deleted']:,}",
            f"{len(self._held):,}",
            oldest_s,
            extra=fields(
                rows=self._summary.counts.num_rows,
                rows_per_s=round(rows_per_s, 1),
                held=len(self._held),
                oldest_s=round(oldest_s, 1),
                **{str(name): n for name, n in messages.items()},
            ),
        )


class _Gathered:
    """Articles that wait to be labelled as one sorted set."""

    def __init__(self, settings: QueueSettings, queue_path: str, read: ReadSettings) -> None:
        self._settings = settings
        self._uri = f"{ARTICLES}{queue_path}"
        self._read = read
        self._articles: list[ReadyArticle] = []
        self._num_bytes = 0

    def add(self, ready: ReadyArticle) -> None:
        self._articles.append(ready)
        self._num_bytes += ready.article.size_bytes

    def take(self) -> list[ReadyArticle]:
        taken, self._articles, self._num_bytes = self._articles, [], 0
        return taken

    @property
    def is_full(self) -> bool:
        return (
            len(self._articles) >= self._settings.gather_rows or self._num_bytes >= GATHERED_BYTES
        )

    @property
    def is_due(self) -> bool:
        return bool(self._articles) and self._left_s() <= 0

    def wait_s(self) -> float:
        """Until there is something to do here, or to look at the flow."""
        return min(max(self._left_s(), 0), _WAIT_S) if self._articles else _WAIT_S

    def _left_s(self) -> float:
        first = self._articles[0].delivery
        return first.received_s + self._settings.gather_s - time.monotonic()

    def make_set(self, ready: Sequence[ReadyArticle]) -> Arrived:
        """Known by its queue and its message ids; its rows are in the order of receipt."""
        articles = [each.article for each in ready]
        shard = Shard(Source(self._uri, _version(articles), 0), 0, len(articles))
        return Arrived(shard, article_schema(self._read), article_batches(articles, self._read))


def _version(articles: Sequence[QueuedArticle]) -> str:
    ids = "\n".join(article.message_id for article in articles)
    return f"sha256:{hashlib.sha256(ids.encode()).hexdigest()}"


class _UnderWay:
    """Which messages wait for which shards, from the first stage of the flow to its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sets: dict[Shard, Sequence[ReadyArticle]] = {}
        self._messages: dict[Shard, list[ReadyShards]] = {}

    def __bool__(self) -> bool:
        return bool(self._sets or self._messages)

    def begin(self, ready: ReadyShards) -> list[Shard]:
        """The shards of a message that are not under way for another one, in their order."""
        with self._lock:
            new = [shard for shard in ready.left if shard not in self._messages]
            for shard in ready.left:
                self._messages.setdefault(shard, []).append(ready)
        return sorted(new, key=lambda shard: (shard.source.uri, shard.start))

    def begin_set(self, articles: Sequence[ReadyArticle], arrived: Arrived) -> Arrived:
        with self._lock:
            self._sets[arrived.shard] = articles
        return arrived

    def end(self, outcome: Outcome) -> tuple[Sequence[ReadyArticle], list[ReadyShards]]:
        """The articles of a set that came out, and the messages whose last shard this was."""
        with self._lock:
            articles = self._sets.pop(outcome.shard, ())
            waiting = self._messages.pop(outcome.shard, [])
            for each in waiting:
                each.left.discard(outcome.shard)
                if outcome.error is not None:
                    each.errors.append(outcome.error)
            return articles, [each for each in waiting if not each.left]


def _ignore(num_examples: int, num_tokens: int) -> None:
    """Batches are not shown one by one: health is told by the row."""
