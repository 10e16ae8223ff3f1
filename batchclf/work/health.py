"""How a worker fares, every few seconds."""

import logging
import threading
import time
from types import TracebackType
from typing import Self

from batchclf.held import Held
from batchclf.log import fields
from batchclf.work.summary import Summary, Tally

log = logging.getLogger(__name__)

_EVERY_S = 10.0


class Health:
    """A thread that tells metrics and log the speed and what is held, from entry to exit."""

    def __init__(self, summary: Summary, tally: Tally, held: Held, *, on_log: bool) -> None:
        self._summary = summary
        self._tally = tally
        self._held = held
        self._on_log = on_log
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell_on, name="health", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _tell_on(self) -> None:
        before, then = 0, time.monotonic()
        is_over = False
        while not is_over:
            is_over = self._over.wait(_EVERY_S)
            num_rows, now = self._summary.counts.num_rows, time.monotonic()
            rows_per_s = (num_rows - before) / max(now - then, 1e-9)
            self._tally.gauge("articles_per_s", rows_per_s)
            if self._on_log and (num_rows > before or self._held):
                self._log(rows_per_s)
            before, then = num_rows, now

    def _log(self, rows_per_s: float) -> None:
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
