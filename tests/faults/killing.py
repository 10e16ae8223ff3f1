"""Workers that are killed at random moments, and started again until they are done."""

import os
import random
import select
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING

from faults.commands import END_S, end_of

if TYPE_CHECKING:
    from faults.forks import Fork

# What a worker says when it comes out of a phase.
LABELLING = b'"message": "labelling'
COMMITTED = b'"message": "committed'
PHASES = {
    "start": b"",  # the model, the plan, the question whether the store honours conditions
    "first": LABELLING,  # what was done before is looked up; the first rows are read and computed
    "commits": COMMITTED,  # shards are read, computed and published all at once
}
# In which phase the next kill is to fall. Most fall where rows can be lost.
ORDER = ("commits", "first", "commits", "start")


@dataclass(frozen=True)
class Pace:
    """Seconds that an undisturbed worker takes for its start, until its first commit, and for ten.

    Attributes:
        longest_s: by phase, the latest moment after the phase begins at which to kill.
    """

    longest_s: dict[str, float]

    @classmethod
    def of(cls, process: "Fork") -> "Pace":
        """Watch a worker from its start to its end, which must be success."""
        began, said = time.monotonic(), b""
        seen: list[float] = []
        while chunk := os.read(process.stderr.fileno(), 1 << 16):
            said += chunk
            now = time.monotonic() - began
            seen += [now] * (said.count(LABELLING) + said.count(COMMITTED) - len(seen))
        run = end_of(process)
        assert run.exit_code == 0, said.decode()
        start_s, first_s, last_s = seen[0], seen[1], seen[-1]
        ten_s = 10 * (last_s - first_s) / (len(seen) - 1)
        return cls({"start": start_s, "first": first_s - start_s, "commits": ten_s})


@dataclass
class Massacre:
    """Kills `num_kills` workers, each at a random moment of the phase whose turn it is.

    Attributes:
        killed: kills delivered to living workers, by the phase that they were in.
    """

    num_kills: int
    pace: Pace
    seed: int = 0
    killed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._left = self.num_kills
        self._phases = cycle(ORDER)
        self._chance = random.Random(self.seed)

    def run(self, num_workers: int, start: Callable[[int], "Fork"]) -> None:
        """Run all workers at once, each started again until it ends by itself, with success.

        Args:
            num_workers: how many.
            start: starts the worker of that number; its log comes out of a pipe.
        """
        with ThreadPoolExecutor(num_workers) as pool:
            for ended in [pool.submit(self._see_through, start, i) for i in range(num_workers)]:
                ended.result()

    def _see_through(self, start: Callable[[int], "Fork"], worker: int) -> None:
        while True:
            process = start(worker)
            moment = self._next_moment()
            if moment is not None and self._kill(process, *moment):
                continue
            run = end_of(process)
            assert run.exit_code == 0, run.said
            return

    def _next_moment(self) -> tuple[bytes, float] | None:
        """What to wait for and how many seconds then; None when there were kills enough."""
        with self._lock:
            if not self._left:
                return None
            self._left -= 1
            phase = next(self._phases)
            return PHASES[phase], self._chance.uniform(0, self.pace.longest_s[phase])

    def _kill(self, process: "Fork", mark: bytes, delay_s: float) -> bool:
        """Kill a worker so long after it said something; False if it ended before."""
        said = b""
        moment = None
        while True:
            if moment is None and mark in said:
                moment = time.monotonic() + delay_s
            left_s = END_S if moment is None else max(moment - time.monotonic(), 0)
            if not select.select([process.stderr.fileno()], [], [], left_s)[0]:
                break
            chunk = os.read(process.stderr.fileno(), 1 << 16)
            said += chunk
            if not chunk:
                break
        process.kill()
        _, rest = process.communicate(timeout=END_S)
        said += rest.encode()
        was_alive = process.returncode == -signal.SIGKILL
        with self._lock:
            if was_alive:
                self.killed[_phase_of(said)] += 1
            else:
                self._left += 1
        return was_alive


def _phase_of(said: bytes) -> str:
    return [phase for phase, mark in PHASES.items() if mark in said][-1]
