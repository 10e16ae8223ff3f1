"""What a worker did, in numbers, while it works and at its end."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from batchclf.messages import ARTICLES
from batchclf.metrics import CountName, GaugeName, Metrics
from batchclf.totals import Totals
from batchclf.worker import Outcome


@dataclass(kw_only=True)
class Summary(Totals):
    """What a worker did.

    Attributes:
        messages: received, deleted, released, refused, abandoned.
        num_sets: sets of articles, of all that was committed.
        reason: why it ended.
    """

    messages: Counter[CountName] = field(default_factory=Counter)
    num_sets: int = 0
    reason: str = ""

    @property
    def num_shards(self) -> int:
        """Shards of files that were committed."""
        return self.num_committed - self.num_sets

    def add(self, outcome: Outcome) -> None:
        super().add(outcome)
        if outcome.is_new and outcome.shard.source.uri.startswith(ARTICLES):
            self.num_sets += 1

    def join_parts(self, parts: Sequence["Summary"]) -> None:
        """As `join`, with what only this summary tells."""
        self.join(parts)
        for part in parts:
            self.messages.update(part.messages)
            self.num_sets += part.num_sets

    def as_dict(self) -> dict[str, Any]:
        """The numbers, as JSON takes them."""
        return {
            "messages": {
                name: self.messages[name]
                for name in ("received", "deleted", "released", "refused", "abandoned")
            },
            "num_sets": self.num_sets,
            "num_shards": {"committed": self.num_shards, "done_before": self.num_skipped},
            **self.numbers(),
            "ended": self.reason,
        }


class Tally:
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
