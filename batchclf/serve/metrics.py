"""What the server counts, as Prometheus reads it."""

from collections.abc import Callable

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

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
        rows = Counter("batchclf_rows", "Rows computed", ["outcome"], registry=registry)
        self._labelled, self._abstained, self._failed = map(
            rows.labels, ("labelled", "abstained", "failed")
        )
        self._tokens = Counter("batchclf_tokens", "Tokens that the model saw", registry=registry)
        self._of_request: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
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
        # To look a counter up costs more than to count.
        key = route, status
        if key not in self._of_request:
            self._of_request[key] = (
                self._requests.labels(route, str(status)),
                self._request_seconds.labels(route),
            )
        counter, histogram = self._of_request[key]
        counter.inc()
        histogram.observe(seconds)

    def count_batch(self, batch: Batch) -> None:
        """One batch that was computed, and its rows by what became of them."""
        predictions = batch.predictions
        num_failed = int(np.count_nonzero(predictions.label < 0))
        num_abstained = int(np.count_nonzero(predictions.abstained))
        self._labelled.inc(len(predictions) - num_failed - num_abstained)
        self._failed.inc(num_failed)
        self._abstained.inc(num_abstained)
        self._tokens.inc(int(predictions.num_tokens.sum()))
        self._batch_rows.observe(len(predictions))
        self._batch_requests.observe(batch.requests)
        self._batch_seconds.observe(batch.seconds)
        self._wait_seconds.observe(batch.longest_wait_s)

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
