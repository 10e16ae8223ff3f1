"""Processes side by side: results, errors, words on the way, and how they stop."""

import itertools
import logging
import os
import signal
import threading
import time
from typing import Any

import pytest
from hypothesis import given, strategies as st

from batchclf.config import Share
from batchclf.errors import BatchclfError, InputError, Interrupted
from batchclf.fleet import Tell, run_fleet

log = logging.getLogger("batchclf.test_fleet")


def work(task: Any, interrupt: threading.Event, tell: Tell) -> Any:
    """What a member does in these tests: its task says what."""
    match task:
        case ("fail", error):
            raise error
        case ("die", number):
            os.kill(os.getpid(), number)
        case ("wait",):
            tell("waiting")
            interrupt.wait()
            raise Interrupted("asked to stop")
        case ("crash",):
            return 1 // 0
        case ("say", text):
            log.info("%s is said", text)
            tell(text)
    return task


def run(*tasks: Any, interrupt: threading.Event | None = None) -> tuple[list[Any], list[Any]]:
    told: list[Any] = []
    named = [(f"device {index}", task) for index, task in enumerate(tasks)]
    return run_fleet(work, named, interrupt or threading.Event(), told.append), told


def test_results_come_in_the_order_of_the_tasks_with_all_that_was_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "batchclf"):
        results, told = run(("say", "one"), ("say", "two"))
    assert results == [("say", "one"), ("say", "two")]
    assert sorted(told) == ["one", "two"]
    assert sorted(caplog.messages) == ["device 0: one is said", "device 1: two is said"]


def test_one_error_stops_the_others_and_is_the_one_that_is_raised() -> None:
    with pytest.raises(InputError, match="bad file"):
        run(("wait",), ("fail", InputError("bad file")))


def test_a_request_to_stop_reaches_all() -> None:
    interrupt = threading.Event()
    threading.Timer(0.1, interrupt.set).start()
    with pytest.raises(Interrupted):
        run(("wait",), ("wait",), interrupt=interrupt)


def test_what_may_pass_counts_more_than_a_bad_file() -> None:
    with pytest.raises(Interrupted, match="killed"):
        run(("die", signal.SIGKILL), ("fail", InputError("bad file")))


def test_a_member_that_is_killed_is_named_and_the_others_finish(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.INFO, "batchclf"),
        pytest.raises(Interrupted, match="device 0 was killed by SIGKILL"),
    ):
        run(("die", signal.SIGKILL), ("say", "still here"))
    assert "device 1: still here is said" in caplog.messages


def test_a_bug_in_a_member_is_a_bug(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BatchclfError, match="a bug") as raised:
        run(("crash",))
    assert raised.value.exit_code == 70
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_no_member_outlives_its_parent_s_interest() -> None:
    before = threading.active_count()
    began = time.monotonic()
    with pytest.raises(InputError):
        run(("wait",), ("wait",), ("fail", InputError("bad file")))
    assert time.monotonic() - began < 60
    assert threading.active_count() == before


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 40))
def test_the_parts_of_a_share_are_that_share(count: int, parts: int, num_shards: int) -> None:
    def taken(share: Share) -> list[int]:
        first = num_shards * share.index // share.count
        return list(range(first, num_shards * (share.index + 1) // share.count))

    for index in range(count):
        share = Share(index, count)
        together = [taken(share.part(part, parts)) for part in range(parts)]
        assert list(itertools.chain(*together)) == taken(share)
