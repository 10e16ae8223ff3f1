"""How a run fares in numbers: for CloudWatch on standard output, for Prometheus over HTTP."""

import json
import logging
import math
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from batchclf.errors import ConfigError
from batchclf.log import fields
from batchclf.progress import Listener

if TYPE_CHECKING:
    from collections.abc import Iterator
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import Metric

log = logging.getLogger(__name__)

NAMESPACE = "batchclf"
EMF_EVERY_S = 60.0  # CloudWatch keeps a minute at its standard resolution

CountName = Literal[
    "received",
    "labelled",
    "deleted",
    "released",
    "abandoned",
    "refused",
    "failed",
    "committed",
    "undone",
]
GaugeName = Literal["oldest_message_age_s", "heartbeat_lag_s", "articles_per_s", "held"]


@dataclass(frozen=True)
class _Kind:
    """How one number is called.

    Attributes:
        cloudwatch: its name in CloudWatch.
        unit: one of https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/API_MetricDatum.html
        prometheus: its name for Prometheus, with the unit at its end.
        meaning: one line.
    """

    cloudwatch: str
    unit: str
    prometheus: str
    meaning: str


@dataclass(frozen=True)
class Subject:
    """What the numbers are of.

    Attributes:
        dimension: in CloudWatch; in small letters, the label for Prometheus.
        counts: told each time, so that an alarm sees a 0.
    """

    dimension: str
    counts: tuple[CountName, ...]


QUEUE = Subject("Queue", ("received", "labelled", "deleted", "released", "abandoned", "refused"))
COMMAND = Subject("Command", ("labelled", "failed", "committed", "undone"))

_COUNTS: dict[CountName, _Kind] = {
    "received": _Kind(
        "MessagesReceived", "Count", "batchclf_messages_received", "Messages taken from the queue"
    ),
    "labelled": _Kind(
        "ArticlesLabelled", "Count", "batchclf_articles_labelled", "Rows committed to the output"
    ),
    "deleted": _Kind(
        "MessagesDeleted", "Count", "batchclf_messages_deleted", "Messages deleted as done"
    ),
    "released": _Kind(
        "MessagesReleased",
        "Count",
        "batchclf_messages_released",
        "Messages given back to the queue to be tried again",
    ),
    "abandoned": _Kind(
        "MessagesAbandoned",
        "Count",
        "batchclf_messages_abandoned",
        "Messages that could not be kept from others, and were let go",
    ),
    "refused": _Kind(
        "MessagesRefused",
        "Count",
        "batchclf_messages_refused",
        "Messages that were not understood or whose source was not read",
    ),
    "failed": _Kind(
        "ArticlesFailed", "Count", "batchclf_articles_failed", "Rows committed without a label"
    ),
    "committed": _Kind(
        "ShardsCommitted", "Count", "batchclf_shards_committed", "Shards committed to the output"
    ),
    "undone": _Kind(
        "InputsNotDone",
        "Count",
        "batchclf_inputs_not_done",
        "Inputs and shards that could not be read, or not labelled",
    ),
}
_GAUGES: dict[GaugeName, _Kind] = {
    "oldest_message_age_s": _Kind(
        "OldestMessageAge",
        "Seconds",
        "batchclf_oldest_message_age_seconds",
        "Time since the oldest message held here was sent",
    ),
    "heartbeat_lag_s": _Kind(
        "HeartbeatLag",
        "Seconds",
        "batchclf_heartbeat_lag_seconds",
        "How late the last extension of visibility was",
    ),
    "articles_per_s": _Kind(
        "ArticlesPerSecond", "Count/Second", "batchclf_articles_per_second", "Rows labelled"
    ),
    "held": _Kind(
        "MessagesHeld", "Count", "batchclf_messages_held", "Messages received and not yet settled"
    ),
}


class CountingListener:
    """Counts what it is told of a run, and passes it on."""

    def __init__(self, listener: Listener, metrics: "Metrics") -> None:
        self._listener = listener
        self._metrics = metrics

    def batch(self, num_rows: int, num_tokens: int) -> None:
        self._listener.batch(num_rows, num_tokens)

    def shard(self, num_rows: int, *, computed: bool) -> None:
        if computed:
            self._metrics.count("labelled", num_rows)
            self._metrics.count("committed")
        self._listener.shard(num_rows, computed=computed)


class Metrics:
    """Numbers that any thread may tell, shown while the context lasts.

    Args:
        name: of the queue or command; the dimension and label of every number.
        emf: write the numbers to standard output every minute and at the end, one JSON object a
            line in the embedded metric format: counts since the line before, gauges as they are.
        port: serve them as Prometheus text; 0 takes a free port, None none.
        host: the address to serve them on.
        worker: which worker this is, told beside the numbers and no dimension of them.
        subject: what is told, and of what.
        every_s: seconds between two lines.

    Raises:
        ConfigError: on entering, the port cannot be had.
    """

    def __init__(
        self,
        name: str,
        *,
        emf: bool = False,
        port: int | None = None,
        host: str = "127.0.0.1",
        worker: str = "",
        subject: Subject = QUEUE,
        every_s: float = EMF_EVERY_S,
    ) -> None:
        self.port = port
        self._name = name
        self._subject = subject
        self._emf = emf
        self._host = host
        self._worker = worker
        self._every_s = every_s
        self._lock = threading.Lock()
        self._counts: Counter[CountName] = Counter()
        self._told: Counter[CountName] = Counter()  # of the counts, what the lines said so far
        self._gauges: dict[GaugeName, float] = {}
        self._ending = threading.Event()
        self._writer: threading.Thread | None = None
        self._server: WSGIServer | None = None

    def count(self, name: CountName, n: int = 1) -> None:
        """Add to a number that only grows."""
        with self._lock:
            self._counts[name] += n

    def gauge(self, name: GaugeName, value: float) -> None:
        """Set a number that goes up and down."""
        with self._lock:
            self._gauges[name] = value

    def __enter__(self) -> Self:
        if self.port is not None:
            self._serve(self.port)
        if self._emf:
            self._writer = threading.Thread(target=self._write_lines, name="metrics", daemon=True)
            self._writer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        if self._writer is not None:
            self._writer.join()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def collect(self) -> "Iterator[Metric]":
        """What Prometheus is shown, as its client library asks a collector for it."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            counts, gauges = self._counts.copy(), self._gauges.copy()
        labels = [self._subject.dimension.lower()]
        for count_name in self._subject.counts:
            kind = _COUNTS[count_name]
            counter = CounterMetricFamily(kind.prometheus, kind.meaning, labels=labels)
            counter.add_metric([self._name], counts[count_name])
            yield counter
        for gauge_name, value in gauges.items():
            kind = _GAUGES[gauge_name]
            gauge = GaugeMetricFamily(kind.prometheus, kind.meaning, labels=labels)
            gauge.add_metric([self._name], value)
            yield gauge

    def _serve(self, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, _ = start_http_server(port, self._host, registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--metrics-port {port}: {error}; choose another port") from error
        self.port = self._server.server_port
        log.info(
            "metrics on http://%s:%d/metrics", self._host, self.port, extra=fields(port=self.port)
        )

    def _write_lines(self) -> None:
        ended = False
        while not ended:
            ended = self._ending.wait(self._every_s)
            try:
                sys.stdout.write(f"{json.dumps(self._emf_document())}\n")
                sys.stdout.flush()
            except OSError as error:
                log.warning("no metrics from here on, standard output is gone: %s", error)
                return

    def _emf_document(self) -> dict[str, Any]:
        """One line of the embedded metric format.

        https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
        """
        with self._lock:
            news = {name: self._counts[name] - self._told[name] for name in self._subject.counts}
            self._told = self._counts.copy()
            gauges = {name: value for name, value in self._gauges.items() if math.isfinite(value)}
        numbers = [
            *((_COUNTS[name], number) for name, number in news.items()),
            *((_GAUGES[name], value) for name, value in gauges.items()),
        ]
        directive = {
            "Namespace": NAMESPACE,
            "Dimensions": [[self._subject.dimension]],
            "Metrics": [{"Name": kind.cloudwatch, "Unit": kind.unit} for kind, _ in numbers],
        }
        return {
            "_aws": {"Timestamp": int(time.time() * 1000), "CloudWatchMetrics": [directive]},
            self._subject.dimension: self._name,
            "Worker": self._worker,
            **{kind.cloudwatch: number for kind, number in numbers},
        }
