import threading
import time
from collections.abc import Iterator

import pytest

from batchclf.errors import InputError, Interrupted
from batchclf.stages import Flow

PATIENCE_S = 30  # only a test that fails waits so long


@pytest.fixture
def interrupt() -> threading.Event:
    return threading.Event()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def counted(last: int, made: list[int]) -> Iterator[int]:
    for number in range(last):
        made.append(number)
        yield number


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_results_keep_their_order_through_all_stages(
    interrupt: threading.Event, depth: int
) -> None:
    with Flow(interrupt) as flow:
        numbers = flow.stage("numbers", range(500), depth)
        doubled = flow.stage("doubled", (2 * number for number in numbers), depth)
        assert list(doubled) == list(range(0, 1000, 2))


def test_a_stage_without_results_just_ends(interrupt: threading.Event) -> None:
    with Flow(interrupt) as flow:
        assert list(flow.stage("nothing", [], 1)) == []


def test_none_and_other_false_things_are_results(interrupt: threading.Event) -> None:
    with Flow(interrupt) as flow:
        assert list(flow.stage("things", [None, 0, "", []], 1)) == [None, 0, "", []]


@pytest.mark.parametrize("num_stages", [1, 3])
def test_an_error_arrives_after_the_results_that_came_before_it(
    interrupt: threading.Event, num_stages: int
) -> None:
    def three_then_an_error() -> Iterator[int]:
        yield from range(3)
        raise InputError("the fourth")

    arrived: list[int] = []
    with Flow(interrupt) as flow:
        stage = flow.stage("first", three_then_an_error(), 10)
        for _ in range(1, num_stages):
            stage = flow.stage("next", (number for number in stage), 10)
        with pytest.raises(InputError, match=r"^the fourth$"):
            arrived.extend(stage)
    assert arrived == [0, 1, 2]


@pytest.mark.parametrize("depth", [1, 4])
def test_a_stage_runs_ahead_as_far_as_its_depth_and_one_result_in_hand(
    interrupt: threading.Event, depth: int
) -> None:
    far_ahead = threading.Event()
    asked = 0
    ahead: list[int] = []

    def results() -> Iterator[int]:
        for number in range(60):
            ahead.append(number + 1 - asked)
            if number == depth:
                far_ahead.set()
            yield number

    with Flow(interrupt) as flow:
        reader = iter(flow.stage("results", results(), depth))
        assert far_ahead.wait(PATIENCE_S)  # before anything was asked for
        for number in range(60):
            asked += 1
            assert next(reader) == number
    assert max(ahead) == depth + 1


def test_leaving_early_ends_stages_that_have_more_to_give(interrupt: threading.Event) -> None:
    made: list[int] = []
    with Flow(interrupt) as flow:
        first = flow.stage("first", counted(10**9, made), 2)
        second = flow.stage("second", (number for number in first), 2)
        assert next(iter(second)) == 0
    assert len(made) < 20


def test_leaving_by_an_error_ends_the_stages_and_raises_that_error(
    interrupt: threading.Event,
) -> None:
    def fail() -> None:
        with Flow(interrupt) as flow:
            flow.stage("numbers", counted(10**9, []), 2)
            raise InputError("of the reader")

    with pytest.raises(InputError, match="of the reader"):
        fail()


def test_leaving_early_is_no_end_of_results_for_a_stage_that_waits(
    interrupt: threading.Event,
) -> None:
    released = threading.Event()
    ends: list[str] = []

    def never_ready() -> Iterator[int]:
        assert released.wait(PATIENCE_S)
        yield 0

    def gather(numbers: Iterator[int]) -> Iterator[int]:
        try:
            gathered = list(numbers)
            ends.append("normal")  # and would now compute with a part of the results
            yield from gathered
        except Interrupted:
            ends.append("interrupted")
            released.set()

    with Flow(interrupt) as flow:
        first = flow.stage("first", never_ready(), 1)
        flow.stage("second", gather(iter(first)), 1)
    assert ends == ["interrupted"]


def test_leaving_early_closes_what_a_stage_has_open(interrupt: threading.Event) -> None:
    closed = threading.Event()

    def with_a_file() -> Iterator[int]:
        try:
            yield from counted(10**9, [])
        finally:
            closed.set()

    with Flow(interrupt) as flow:
        next(iter(flow.stage("file", with_a_file(), 1)))
    assert closed.is_set()


def test_a_flow_waits_for_its_threads(interrupt: threading.Event) -> None:
    with Flow(interrupt) as flow:
        next(iter(flow.stage("numbers", counted(10**9, []), 1)))
        assert [thread.name for thread in threading.enumerate()].count("numbers") == 1
    assert "numbers" not in [thread.name for thread in threading.enumerate()]


def test_an_interrupt_reaches_a_reader_that_waits(interrupt: threading.Event) -> None:
    released = threading.Event()

    def never_ready() -> Iterator[int]:
        interrupt.set()
        assert released.wait(PATIENCE_S)
        yield 0

    with Flow(interrupt) as flow:
        stage = flow.stage("never ready", never_ready(), 1)
        with pytest.raises(Interrupted, match="asked to stop"):
            next(iter(stage))
        released.set()


def test_an_interrupt_comes_before_results_that_are_ready(interrupt: threading.Event) -> None:
    full = threading.Event()

    def results() -> Iterator[int]:
        yield from range(3)
        full.set()

    with Flow(interrupt) as flow:
        stage = flow.stage("results", results(), 10)
        assert full.wait(PATIENCE_S)
        interrupt.set()
        with pytest.raises(Interrupted):
            list(stage)


def test_an_interrupt_passes_through_stages_that_wait_for_each_other(
    interrupt: threading.Event,
) -> None:
    released = threading.Event()

    def never_ready() -> Iterator[int]:
        assert released.wait(PATIENCE_S)
        yield 0

    with Flow(interrupt) as flow:
        first = flow.stage("first", never_ready(), 1)
        second = flow.stage("second", (number for number in first), 1)
        threading.Timer(0, interrupt.set).start()
        with pytest.raises(Interrupted):
            list(second)
        released.set()


def test_a_long_computation_can_ask_whether_it_was_interrupted(interrupt: threading.Event) -> None:
    with Flow(interrupt) as flow:
        flow.check()
        interrupt.set()
        with pytest.raises(Interrupted):
            flow.check()


def test_the_time_of_a_stage_is_its_own_and_not_that_of_what_it_waits_for(
    interrupt: threading.Event,
) -> None:
    def busy_s(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def slow() -> Iterator[int]:
        for number in range(10):
            busy_s(0.02)
            yield number

    with Flow(interrupt) as flow:
        first = flow.stage("slow", slow(), 2)
        second = flow.stage("quick", (number for number in first), 2)
        list(second)
        shares = flow.busy_shares("last")
    assert list(shares) == ["slow", "quick", "last"]
    assert all(0 <= share <= 1 for share in shares.values())
    assert shares["slow"] > 0.6
    assert max(shares["quick"], shares["last"]) < 0.3
