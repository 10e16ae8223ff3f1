"""What the server counts, as Prometheus reads it."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from batchclf.predictions import Predictions
from batchclf.serve.batcher import Batch

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "batchclf_requests", "Answers given", ["route", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "batchclf_request_seconds",
            "From the headers to the end of the answer",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._rows = Counter("batchclf_rows", "Rows answered", ["outcome"], registry=registry)
        self._tokens = Counter("batchclf_tokens", "Tokens that the model saw", registry=registry)
        self._batch_rows = Histogram(
            "batchclf_batch_rows", "Rows computed at once", registry=registry, buckets=_COUNTS
        )
        self._batch_requests = Histogram(
            "batchclf_batch_requests",
            "Requests that shared a batch",
            registry=registry,
            buckets=_COUNTS,
        )
        self._batch_seconds = Histogram(
            "batchclf_batch_seconds", "Computing one batch", registry=registry, buckets=_SECONDS
        )
        self._wait_seconds = Histogram(
            "batchclf_wait_seconds",
            "From the arrival of a batch's oldest request to its start",
            registry=registry,
            buckets=_SECONDS,
        )
        self.refused_connections = Counter(
            "batchclf_refused_connections", "Connections beyond the limit", registry=registry
        )

    def watch(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Show a number that is read when it is asked for."""
        Gauge(name, meaning, registry=self._registry).set_function(read)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """One answer, or a client that left before it."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def count_rows(self, predictions: Predictions) -> None:
        """The rows of one answer, by what became of them."""
        num_failed = int((predictions.label < 0).sum())
        num_abstained = int(predictions.abstained.sum())
        num_labelled = len(predictions) - num_failed - num_abstained
        for outcome, count in (
            ("labelled", num_labelled),
            ("abstained", num_abstained),
            ("failed", num_failed),
        ):
            self._rows.labels(outcome).inc(count)
        self._tokens.inc(int(predictions.num_tokens.sum()))

    def count_batch(self, batch: Batch) -> None:
        """One batch that was computed."""
        self._batch_rows.observe(batch.rows)
        self._batch_requests.observe(batch.requests)
        self._batch_seconds.observe(batch.seconds)
        self._wait_seconds.observe(batch.longest_wait_s)

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
