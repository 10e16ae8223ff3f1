"""A worker for each GPU of this host, all on the same queue: it shares the messages out."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from batchclf.fleet import Tell, run_fleet
from batchclf.metrics import CountName, GaugeName, Metrics
from batchclf.work.job import WorkJob
from batchclf.work.settings import Settings
from batchclf.work.summary import Summary

_MEMBER_GAUGES_ADD_UP = frozenset({"articles_per_s", "held"})  # of the others the largest counts


def work_side_by_side(
    settings: Settings,
    devices: Sequence[str],
    interrupt: threading.Event,
    metrics: Metrics,
    *,
    show_health: bool = True,
) -> Summary:
    """Work on all devices until told to stop, or until the settings say that it is enough.

    Args:
        settings: those of each worker, but for the device; a limit on messages or rows is shared
            out among them.
        devices: one worker each.
        interrupt: asks all to stop.
        metrics: told the numbers of all together.
        show_health: each worker logs how it is.

    Raises:
        Interrupted, QueueError, StoreError, ConfigError: that of the worker whose error says most.
    """
    began = time.perf_counter()
    tasks = [
        (device, (index, replace(settings, queue=queue, model=model), show_health))
        for index, device in enumerate(devices)
        for model in [replace(settings.model, device=device)]
        for queue in [
            replace(
                settings.queue,
                max_messages=_part(settings.queue.max_messages, index, len(devices)),
                max_rows=_part(settings.queue.max_rows, index, len(devices)),
            )
        ]
        if queue.max_messages != 0 and queue.max_rows != 0
    ]
    gauges: dict[GaugeName, dict[int, float]] = {}

    def on_told(told: tuple[CountName, int] | tuple[GaugeName, float, int]) -> None:
        if len(told) == 2:  # noqa: PLR2004 - a count has no index
            metrics.count(*told)
            return
        name, value, index = told
        values = gauges.setdefault(name, {})
        values[index] = value
        together = sum if name in _MEMBER_GAUGES_ADD_UP else max
        metrics.gauge(name, together(values.values()))

    parts = run_fleet(_work, tasks, interrupt, on_told)
    summary = Summary(reason=parts[0].reason)
    summary.end(began)
    summary.join_parts(parts)
    return summary


def _part(limit: int | None, index: int, count: int) -> int | None:
    """This worker's part of a limit; all parts together are the limit."""
    return None if limit is None else limit * (index + 1) // count - limit * index // count


class _Relay(Metrics):
    """Tells the process that started this one, which shows the numbers of all."""

    def __init__(self, tell: Tell, index: int) -> None:
        super().__init__("")
        self._tell = tell
        self._index = index

    def count(self, name: CountName, n: int = 1) -> None:
        self._tell((name, n))

    def gauge(self, name: GaugeName, value: float) -> None:
        self._tell((name, value, self._index))


def _work(task: tuple[int, Settings, bool], interrupt: threading.Event, tell: Tell) -> Summary:
    """What one of several processes does."""
    index, settings, show_health = task
    return WorkJob(settings).run(interrupt, _Relay(tell, index), show_health=show_health)
