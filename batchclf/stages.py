"""Stages that overlap: each one a thread that fills a bounded queue, so memory stays bounded."""

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Generic, Self, TypeVar

from batchclf.errors import Interrupted

T = TypeVar("T")

_POLL_S = 0.2  # how soon a waiting stage sees that the flow was stopped


class Flow:
    """A chain of stages, stopped and waited for on leaving.

    Args:
        interrupt: when somebody sets it, readers of the stages get Interrupted instead of a result.
    """

    def __init__(self, interrupt: threading.Event) -> None:
        self._interrupt = interrupt
        self._stop = threading.Event()
        self._stages: list[Stage[Any]] = []
        self._began = time.perf_counter()

    def stage(self, name: str, results: Iterable[T], depth: int) -> "Stage[T]":
        """Run `results` in a thread, at most `depth` ahead of whoever iterates over the stage."""
        stage = Stage(name, results, depth, self)
        self._stages.append(stage)
        stage.start()
        return stage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for stage in self._stages:
            stage.join()

    def check(self) -> None:
        """Raise Interrupted if the flow was interrupted or left. For long work within a stage."""
        if self.stopped:
            raise Interrupted("asked to stop; run the same command again to go on")

    @property
    def stopped(self) -> bool:
        return self._stop.is_set() or self._interrupt.is_set()

    def busy_s(self, last_name: str) -> dict[str, float]:
        """Seconds in which each stage worked since the flow began, and did not wait.

        Args:
            last_name: name for what reads from the last stage, in the caller's own thread.
        """
        seconds = {}
        waited_s = 0.0
        for stage in self._stages:
            seconds[stage.name] = max(stage.produced_s - waited_s, 0.0)
            waited_s = stage.starved_s
        seconds[last_name] = max(time.perf_counter() - self._began - waited_s, 0.0)
        return seconds

    def busy_shares(self, last_name: str) -> dict[str, float]:
        """The same as shares of the time since the flow began."""
        total_s = max(time.perf_counter() - self._began, 1e-9)
        return {name: round(s / total_s, 4) for name, s in self.busy_s(last_name).items()}


class Stage(Generic[T]):
    """One thread and its queue; iterate over it once.

    An exception in the thread is raised to the reader, after the results that came before it.

    Attributes:
        produced_s: seconds the thread spent making results, waits for its own input included.
        starved_s: seconds its reader waited for one.
    """

    def __init__(self, name: str, results: Iterable[T], depth: int, flow: Flow) -> None:
        self.name = name
        self.produced_s = 0.0
        self.starved_s = 0.0
        self._results = iter(results)
        self._queue: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
        self._flow = flow
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            began = time.perf_counter()
            item = self._take()
            self.starved_s += time.perf_counter() - began
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    def _take(self) -> "T | _End":
        while True:
            self._flow.check()  # an end here would look to the reader as if it had seen everything
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_S)

    def _put(self, item: "T | _End") -> None:
        while not self._flow.stopped:
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_S)
                return

    def _run(self) -> None:
        end = _End(None)
        try:
            while not self._flow.stopped:
                began = time.perf_counter()
                try:
                    item = next(self._results)
                except StopIteration:
                    break
                finally:
                    self.produced_s += time.perf_counter() - began
                self._put(item)
        except BaseException as error:  # noqa: BLE001 - raised again in the reader's thread
            end = _End(error)
        finally:
            if isinstance(self._results, Generator):
                self._results.close()
        self._put(end)


class _End:
    """The last thing in a queue: why the stage ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
