"""How far a run is: a bar on a terminal, elsewhere one log line every few seconds."""

import logging
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Literal, Protocol, Self

from batchclf.log import fields

log = logging.getLogger(__name__)

_EVERY_S = 10.0

Style = Literal["bar", "lines", "none"]


def choose_style(wanted: bool, log_format: str) -> Style:
    """A bar only where a person sees it and no machine reads the same stream."""
    if not wanted:
        return "none"
    return "bar" if sys.stderr.isatty() and log_format == "text" else "lines"


class Listener(Protocol):
    """Whoever is told how far a run is."""

    def batch(self, num_rows: int, num_tokens: int) -> None:
        """Some rows were computed."""

    def shard(self, num_rows: int, *, computed: bool) -> None:
        """A shard is finished, or was found so."""


class Progress:
    """Told of batches by the predicting thread and of shards by the main one; never slows either.

    Args:
        total_rows: rows of this worker's share.
        style: where it is shown.
    """

    def __init__(self, total_rows: int, style: Style) -> None:
        self._total_rows = total_rows
        self._style = style
        self._began = self._last_line = time.monotonic()
        self._computed_rows = 0  # by batches, not all of them committed
        self._skipped_rows = 0
        self._finished_rows = 0  # of finished shards, rows with errors included
        self._tokens = 0

    def __enter__(self) -> Self:
        if self._style == "bar":
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress as Bar,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Bar(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("rows", total=self._total_rows, rates="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._style == "bar":
            self._bar.stop()

    def batch(self, num_rows: int, num_tokens: int) -> None:
        """Some rows were computed."""
        self._computed_rows += num_rows
        self._tokens += num_tokens
        self._show()

    def shard(self, num_rows: int, *, computed: bool) -> None:
        """A shard is finished, or was found so."""
        self._finished_rows += num_rows
        if not computed:
            self._skipped_rows += num_rows
        self._show()

    def _show(self) -> None:
        if self._style == "none":
            return
        now = time.monotonic()
        elapsed_s = max(now - self._began, 1e-9)
        rows_per_s, tokens_per_s = self._computed_rows / elapsed_s, self._tokens / elapsed_s
        done = min(
            max(self._computed_rows + self._skipped_rows, self._finished_rows), self._total_rows
        )
        if self._style == "bar":
            rates = f"{rows_per_s:,.0f} rows/s {tokens_per_s:,.0f} tokens/s"
            self._bar.update(self._task, completed=done, rates=rates)
        elif now - self._last_line >= _EVERY_S:
            self._last_line = now
            left_s = (self._total_rows - done) / rows_per_s if rows_per_s else None
            log.info(
                "%s of %s rows, %s rows/s, %s tokens/s%s",
                f"{done:,}",
                f"{self._total_rows:,}",
                f"{rows_per_s:,.1f}",
                f"{tokens_per_s:,.0f}",
                "" if left_s is None else f", {timedelta(seconds=round(left_s))} left",
                extra=fields(
                    rows=done,
                    of=self._total_rows,
                    rows_per_s=round(rows_per_s, 1),
                    tokens_per_s=round(tokens_per_s, 1),
                    left_s=None if left_s is None else round(left_s),
                ),
            )
