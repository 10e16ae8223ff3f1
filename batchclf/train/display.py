"""How far training is: a bar on a terminal, elsewhere one log line every few seconds."""

import logging
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from batchclf.log import fields
from batchclf.progress import Style

log = logging.getLogger(__name__)

_EVERY_S = 10.0


class TrainingDisplay:
    """Told of every step.

    Args:
        style: where it is shown.
    """

    def __init__(self, style: Style = "none") -> None:
        self._style = style
        self._total_rows = self._rows = self._rows_before = 0
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._style == "bar":
            from rich.console import Console
            from rich.progress import BarColumn, Progress as Bar, TextColumn

            self._bar = Bar(
                BarColumn(bar_width=12),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None)
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

    def begin(self, total_rows: int, rows_before: int) -> None:
        """Training begins, or goes on.

        Args:
            total_rows: of all epochs.
            rows_before: of them, trained on by an earlier run.
        """
        self._total_rows = total_rows
        self._rows = self._rows_before = rows_before
        self._began = self._last_line = time.monotonic()

    def step(self, num_rows: int, *, epoch: int, loss: float, accuracy: float) -> None:
        """A step is done; loss and accuracy are means of the epoch so far."""
        self._rows += num_rows
        now = time.monotonic()
        if self._style == "none" or (self._style == "lines" and now - self._last_line < _EVERY_S):
            return
        self._last_line = now
        rows_per_s = (self._rows - self._rows_before) / max(now - self._began, 1e-9)
        left_s = round((self._total_rows - self._rows) / rows_per_s)
        reached = (
            f"loss {loss:.4f}, accuracy {accuracy:.3f}, {rows_per_s:,.1f} articles/s, "
            f"{timedelta(seconds=left_s)} left"
        )
        if self._style == "bar":
            self._bar.update(
                self._task,
                completed=self._rows,
                total=self._total_rows,
                description=f"epoch {epoch}: {reached}",
            )
            return
        log.info(
            "epoch %d: %s of %s articles, %s",
            epoch,
            f"{self._rows:,}",
            f"{self._total_rows:,}",
            reached,
            extra=fields(
                epoch=epoch,
                articles=self._rows,
                of=self._total_rows,
                loss=loss,
                accuracy=accuracy,
                articles_per_s=round(rows_per_s, 1),
                left_s=left_s,
            ),
        )
