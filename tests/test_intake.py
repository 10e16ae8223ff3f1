"""Receiving: one call that fails is no failure of the queue, all of them are."""
# ruff: noqa: ARG002 - the fake queue takes what the real one takes

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from batchclf.config import CutSettings, ReadSettings
from batchclf.errors import BatchclfError, QueueError
from batchclf.held import Backoff, Held
from batchclf.intake import Intake, Reading, Ready, TakeSettings
from batchclf.messages import AllowedSources
from batchclf.outage import OutageWatch
from batchclf.sqs import BATCH_ENTRIES, Delivery, Refusal

END_S = 30.0
NUM_RECEIVERS = 4


class FakeQueue:
    """Full of articles. From the third receive on, those that come meet each other first."""

    visibility_s = 600

    def __init__(self, *, num_failing: int) -> None:
        self.num_failing = num_failing
        self.bug: Exception | None = None
        self._meeting = threading.Barrier(NUM_RECEIVERS, timeout=END_S)
        self._lock = threading.Lock()
        self._num_calls = 0
        self.num_failed = 0

    def receive(self, most: int, wait_s: int) -> list[Delivery]:
        with self._lock:
            number = self._num_calls = self._num_calls + 1
        if 2 < number <= 2 + NUM_RECEIVERS:
            self._meeting.wait()
        if self.bug is not None:
            raise self.bug
        if 2 < number <= 2 + self.num_failing or (number > 2 and self.num_failing == NUM_RECEIVERS):
            with self._lock:
                self.num_failed += 1
            raise QueueError("500")
        return [article(f"{number}-{place}") for place in range(most)]

    def extend(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:
        return {}

    delete = extend

    def release(self, *args: Any, **options: Any) -> dict[int, Refusal]:
        return {}


class Numbers:
    def count(self, name: str, n: int = 1) -> None: ...

    def gauge(self, name: str, value: float) -> None: ...


def article(name: str) -> Delivery:
    now = time.monotonic()
    return Delivery(name, name, '{"text": "news"}', 1, time.time(), now, now + 600, 16)


@contextmanager
def started(queue: FakeQueue) -> Iterator[Intake]:
    held = Held(queue, Numbers(), pytest.fail)  # type: ignore[arg-type]
    outage = OutageWatch(lambda: None)
    reading = Reading(ReadSettings(), CutSettings(), AllowedSources(()), outage, None)
    limits = TakeSettings(max_held=100 * BATCH_ENTRIES, max_held_bytes=1 << 20)
    stop = threading.Event()
    intake = Intake(queue, held, reading, limits, Backoff(), Numbers(), outage, stop)  # type: ignore[arg-type]
    intake.start()
    try:
        yield intake
    finally:
        stop.set()
        intake.close()


def take_until(intake: Intake, count: int) -> list[Ready]:
    deadline = time.monotonic() + END_S
    found: list[Ready] = []
    while len(found) < count:
        assert time.monotonic() < deadline
        found += intake.take(0.1) or []
    return found


def test_receives_that_fail_beside_one_that_is_answered_do_not_end_the_worker() -> None:
    queue = FakeQueue(num_failing=NUM_RECEIVERS - 1)
    with started(queue) as intake:
        found = take_until(intake, 1 + 20 * BATCH_ENTRIES)
    assert queue.num_failed == NUM_RECEIVERS - 1
    assert len(found) > 20 * BATCH_ENTRIES


def test_a_queue_that_answers_no_receive_any_more_is_an_error() -> None:
    queue = FakeQueue(num_failing=NUM_RECEIVERS)
    with started(queue) as intake, pytest.raises(BatchclfError, match="500"):
        take_until(intake, 1_000_000)


def test_a_bug_in_a_receiver_ends_the_worker_rather_than_its_thread_alone() -> None:
    queue = FakeQueue(num_failing=0)
    queue.bug = KeyError("MessageId")
    with started(queue) as intake, pytest.raises(KeyError, match="MessageId"):
        take_until(intake, 1)
