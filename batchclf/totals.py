"""What a run of many shards came to."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from batchclf.log import fields
from batchclf.sink import Counts
from batchclf.worker import Outcome

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Totals:
    """What every summary of a run says.

    Attributes:
        num_committed: shards that this run committed; `num_skipped` it found done.
        counts, labels: rows of those that it committed.
        busy: each stage's share of the time in which it worked.
        peak_rss_mib: most memory that this process has held.
    """

    num_committed: int = 0
    num_skipped: int = 0
    counts: Counts = field(default_factory=Counts)
    labels: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    peak_rss_mib: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count a shard that is in the output, and tell of it; one that failed changes nothing."""
        shard, receipt = outcome.shard, outcome.receipt
        if receipt is None:
            return
        which = {"shard": shard.name, "attempt": receipt.attempt}
        if not outcome.is_new:
            self.num_skipped += 1
            log.info("done before: %s", shard, extra=fields(**which))
            return
        self.num_committed += 1
        self.counts += receipt.counts
        self.labels.update(receipt.labels)
        numbers = {**asdict(receipt.counts), "stage_s": outcome.stage_s}
        log.info("committed %s", shard, extra=fields(**which, **numbers))

    def join(self, parts: Sequence["Totals"]) -> None:
        """Take over what several processes of one run did side by side."""
        for part in parts:
            self.num_committed += part.num_committed
            self.num_skipped += part.num_skipped
            self.counts += part.counts
            self.labels.update(part.labels)
            for stage, share in part.busy.items():
                mean = self.busy.get(stage, 0.0) + share / len(parts)
                self.busy[stage] = round(mean, 4)
            self.peak_rss_mib += part.peak_rss_mib

    def end(self, began: float) -> None:
        """Note the time since `began`, of `time.perf_counter`, and the memory."""
        self.seconds = time.perf_counter() - began
        self.peak_rss_mib = peak_rss_mib()

    @property
    def articles_per_s(self) -> float:
        """Rows that this run committed, in a second of it."""
        return self.counts.num_rows / max(self.seconds, 1e-9)

    def numbers(self) -> dict[str, Any]:
        """As JSON takes them."""
        return {
            "counts": asdict(self.counts),
            "labels": dict(self.labels),
            "seconds": round(self.seconds, 3),
            "articles_per_s": round(self.articles_per_s, 2),
            "tokens_per_s": round(self.counts.num_tokens / max(self.seconds, 1e-9), 1),
            "busy": self.busy,
            "peak_rss_mib": self.peak_rss_mib,
        }


def peak_rss_mib() -> int:
    """Of this process alone; getrusage would also tell of the one that it was forked from."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return 0
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)
