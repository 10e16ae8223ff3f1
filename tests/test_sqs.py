"""What is held: extended in time, settled once, and given back with growing delays."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, strategies as st

from batchclf.errors import ConfigError, QueueError
from batchclf.held import MAX_DELAY_S, Backoff, Held
from batchclf.sqs import MAX_HELD_S, Delivery, Queue, Refusal

VISIBILITY_S = 60
STALE = Refusal("ReceiptHandleIsInvalid", "of another time", is_final=True)
UNANSWERED = Refusal("", "timed out", is_final=False, is_answered=False)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeQueue:
    """Messages in memory, each known by the receipt handle that is valid.

    Attributes:
        refusals: what is wrong with a receipt handle, however it is used.
        extended, released: receipt handles of each call, and with those released the delay.
    """

    visibility_s: int = VISIBILITY_S
    refusals: dict[str, Refusal] = field(default_factory=dict)
    extended: list[list[str]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    released: list[tuple[str, int]] = field(default_factory=list)

    def extend(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:
        self.extended.append(list(receipt_handles))
        return self._refused(receipt_handles)

    def delete(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:
        refused = self._refused(receipt_handles)
        self.deleted += [h for place, h in enumerate(receipt_handles) if place not in refused]
        return refused

    def release(
        self,
        receipt_handles: Sequence[str],
        delays_s: Sequence[int],
        *,
        in_haste: bool,  # noqa: ARG002 - as the real one
    ) -> dict[int, Refusal]:
        refused = self._refused(receipt_handles)
        pairs = enumerate(zip(receipt_handles, delays_s, strict=True))
        self.released += [pair for place, pair in pairs if place not in refused]
        return refused

    def _refused(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:
        return {
            place: self.refusals[handle]
            for place, handle in enumerate(receipt_handles)
            if handle in self.refusals
        }


class Numbers:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.gauges: dict[str, float] = {}

    def count(self, name: str, n: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + n

    def gauge(self, name: str, value: float) -> None:
        self.gauges[name] = value


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue() -> FakeQueue:
    return FakeQueue()


@pytest.fixture
def numbers() -> Numbers:
    return Numbers()


@pytest.fixture
def held(queue: FakeQueue, numbers: Numbers, clock: Clock) -> Held:
    def fail(error: Exception) -> None:
        raise error

    return Held(queue, numbers, fail, clock)


def received(clock: Clock, name: str, handle: str = "", receive_count: int = 1) -> Delivery:
    return Delivery(
        message_id=name,
        receipt_handle=handle or f"{name}-1",
        body="{}",
        receive_count=receive_count,
        sent_s=0.0,
        received_s=clock.now,
        visible_s=clock.now + VISIBILITY_S,
        size_bytes=2,
    )


def test_a_message_is_not_extended_before_half_of_its_time(
    held: Held, queue: FakeQueue, clock: Clock
) -> None:
    held.add([received(clock, "a")])
    clock.now += VISIBILITY_S / 2 - 1
    held.beat()
    assert queue.extended == []


def test_a_message_past_half_of_its_time_is_extended_once(
    held: Held, queue: FakeQueue, clock: Clock
) -> None:
    held.add([received(clock, "a")])
    clock.now += VISIBILITY_S / 2
    held.beat()
    clock.now += 1
    held.beat()
    assert queue.extended == [["a-1"]]


def test_messages_are_extended_for_as_long_as_they_are_held(
    held: Held, queue: FakeQueue, clock: Clock
) -> None:
    held.add([received(clock, "a")])
    for _ in range(600):
        clock.now += 1
        held.beat()
    assert len(queue.extended) == 600 // (VISIBILITY_S // 2)


def test_the_heart_tells_how_late_it_is(held: Held, numbers: Numbers, clock: Clock) -> None:
    held.add([received(clock, "a")])
    clock.now += VISIBILITY_S / 2 + 7
    held.beat()
    assert numbers.gauges["heartbeat_lag_s"] == pytest.approx(7)


def test_only_the_message_whose_extension_fails_is_abandoned(
    held: Held, queue: FakeQueue, numbers: Numbers, clock: Clock
) -> None:
    kept, lost = received(clock, "kept"), received(clock, "lost")
    held.add([kept, lost])
    queue.refusals["lost-1"] = Refusal("InternalError", "", is_final=False)
    clock.now += VISIBILITY_S / 2
    held.beat()
    assert (kept in held, lost in held, numbers.counts) == (True, False, {"abandoned": 1})


def test_an_abandoned_message_is_never_deleted(held: Held, queue: FakeQueue, clock: Clock) -> None:
    lost = received(clock, "lost")
    held.add([lost])
    queue.refusals["lost-1"] = STALE
    clock.now += VISIBILITY_S / 2
    held.beat()
    queue.refusals.clear()
    held.delete([lost])
    assert queue.deleted == []


def test_a_call_without_answer_is_made_again_while_there_is_time(
    held: Held, queue: FakeQueue, clock: Clock
) -> None:
    message = received(clock, "a")
    held.add([message])
    queue.refusals["a-1"] = UNANSWERED
    clock.now += VISIBILITY_S / 2
    held.beat()
    queue.refusals.clear()
    clock.now += 1
    held.beat()
    assert message in held
    assert len(queue.extended) == 2


def test_a_message_is_abandoned_when_its_time_ran_out_without_answer(
    held: Held, queue: FakeQueue, clock: Clock
) -> None:
    message = received(clock, "a")
    held.add([message])
    queue.refusals["a-1"] = UNANSWERED
    clock.now += VISIBILITY_S
    held.beat()
    assert message not in held


def test_a_message_is_abandoned_before_its_twelve_hours_are_over(
    held: Held, queue: FakeQueue, clock: Clock
) -> None:
    message = received(clock, "a")
    held.add([message])
    until = clock.now + MAX_HELD_S - VISIBILITY_S
    while clock.now < until:
        assert message in held
        clock.now += VISIBILITY_S / 2
        held.beat()
    clock.now += VISIBILITY_S / 2
    asked = len(queue.extended)
    held.beat()
    assert message not in held
    assert len(queue.extended) == asked


def test_a_message_received_again_is_no_new_work(held: Held, clock: Clock) -> None:
    held.add([received(clock, "a")])
    assert held.add([received(clock, "a", "a-2", 2)]) == []


def test_the_newest_receipt_handle_deletes(held: Held, queue: FakeQueue, clock: Clock) -> None:
    message = received(clock, "a")
    held.add([message])
    held.add([received(clock, "a", "a-2", 2)])
    held.delete([message])
    assert queue.deleted == ["a-2"]


def test_the_newest_receipt_starts_the_twelve_hours_anew(held: Held, clock: Clock) -> None:
    message = received(clock, "a")
    held.add([message])
    clock.now += MAX_HELD_S / 2
    held.add([received(clock, "a", "a-2", 2)])
    clock.now += MAX_HELD_S / 2
    held.beat()
    assert message in held


def test_a_message_received_again_while_it_is_deleted_is_deleted_again(
    clock: Clock, numbers: Numbers
) -> None:
    class Racing(FakeQueue):
        def delete(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:
            if not self.deleted:
                held.add([received(clock, "a", "a-2", 2)])
            return super().delete(receipt_handles)

    queue = Racing()
    held = Held(queue, numbers, pytest.fail, clock)
    message = received(clock, "a")
    held.add([message])
    held.delete([message])
    assert queue.deleted == ["a-1", "a-2"]
    assert numbers.counts == {"deleted": 1}


def test_what_cannot_be_extended_because_it_was_just_deleted_counts_as_deleted(
    clock: Clock, numbers: Numbers
) -> None:
    """The queue has done the delete, and its reply is on the way when the heart beats."""

    class Beating(FakeQueue):
        def delete(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:
            done = super().delete(receipt_handles)
            self.refusals["a-1"] = STALE
            held.beat()
            return done

    queue = Beating()
    held = Held(queue, numbers, pytest.fail, clock)
    message = received(clock, "a")
    held.add([message])
    clock.now += VISIBILITY_S / 2
    held.delete([message])
    assert queue.extended == [["a-1"]]
    assert numbers.counts == {"deleted": 1}


def test_what_is_being_deleted_is_extended_meanwhile_and_not_given_back(
    clock: Clock, numbers: Numbers
) -> None:
    """A delete may take long and fail."""

    class Stopping(FakeQueue):
        def delete(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:
            held.beat()
            held.release_all()
            return super().delete(receipt_handles)

    queue = Stopping()
    held = Held(queue, numbers, pytest.fail, clock)
    messages = [received(clock, "done"), received(clock, "other")]
    held.add(messages)
    clock.now += VISIBILITY_S / 2
    held.delete(messages[:1])
    assert queue.extended == [["done-1", "other-1"]]
    assert (queue.released, queue.deleted) == ([("other-1", 0)], ["done-1"])
    assert numbers.counts == {"released": 1, "deleted": 1}


def test_what_could_not_be_deleted_is_kept_and_given_back(
    held: Held, queue: FakeQueue, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: object) -> dict[int, Refusal]:
        raise QueueError("gone")

    message = received(clock, "a")
    held.add([message])
    with monkeypatch.context() as broken:
        broken.setattr(queue, "delete", gone)
        with pytest.raises(QueueError):
            held.delete([message])
    assert message in held
    held.release_all()
    assert queue.released == [("a-1", 0)]


def test_nothing_is_idle_while_a_message_is_on_its_way_back(clock: Clock, numbers: Numbers) -> None:
    """Else a worker would leave, and not see that its last message is there again."""
    idle: list[bool] = []

    class Watched(FakeQueue):
        def release(
            self, receipt_handles: Sequence[str], delays_s: Sequence[int], *, in_haste: bool
        ) -> dict[int, Refusal]:
            idle.append(held.is_idle)
            return super().release(receipt_handles, delays_s, in_haste=in_haste)

    held = Held(Watched(), numbers, pytest.fail, clock)
    message = received(clock, "a")
    held.add([message])
    idle.append(held.is_idle)
    held.release([message], Backoff(0))
    idle.append(held.is_idle)
    assert idle == [False, False, True]


def test_a_heart_that_stops_for_a_bug_says_so(clock: Clock, numbers: Numbers) -> None:
    class Broken(FakeQueue):
        def extend(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:  # noqa: ARG002
            raise KeyError("a bug")

    told: list[Exception] = []
    failed = threading.Event()

    def fail(error: Exception) -> None:
        told.append(error)
        failed.set()

    held = Held(Broken(visibility_s=1), numbers, fail, clock)
    held.add([received(clock, "a")])
    clock.now += VISIBILITY_S
    with held:
        assert failed.wait(10)
    assert isinstance(told[0], KeyError)


def test_a_stale_receipt_on_delete_lets_go_of_that_message_alone(
    held: Held, queue: FakeQueue, numbers: Numbers, clock: Clock
) -> None:
    messages = [received(clock, "stale"), received(clock, "fine")]
    held.add(messages)
    queue.refusals["stale-1"] = STALE
    held.delete(messages)
    assert queue.deleted == ["fine-1"]
    assert numbers.counts == {"abandoned": 1, "deleted": 1}
    assert len(held) == 0


def test_what_failed_is_given_back_with_its_delay(
    held: Held, queue: FakeQueue, clock: Clock
) -> None:
    messages = [received(clock, str(count), receive_count=count) for count in (1, 2, 3)]
    held.add(messages)
    held.release(messages, Backoff(10))
    assert queue.released == [("1-1", 10), ("2-1", 20), ("3-1", 40)]


def test_at_the_end_everything_is_given_back_at_once(
    held: Held, queue: FakeQueue, clock: Clock
) -> None:
    held.add(received(clock, str(number)) for number in range(450))
    held.release_all()
    assert sorted(queue.released) == sorted((f"{number}-1", 0) for number in range(450))
    assert len(held) == 0


def test_a_release_waits_for_the_extension_of_its_message_that_is_under_way(
    clock: Clock, numbers: Numbers
) -> None:
    """Else the queue could hide the message once more after it was given back."""
    was_released = threading.Event()

    class Slow(FakeQueue):
        def extend(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:
            releasing.start()
            assert not was_released.wait(0.2)
            return super().extend(receipt_handles)

        def release(
            self, receipt_handles: Sequence[str], delays_s: Sequence[int], *, in_haste: bool
        ) -> dict[int, Refusal]:
            was_released.set()
            return super().release(receipt_handles, delays_s, in_haste=in_haste)

    queue = Slow()
    held = Held(queue, numbers, pytest.fail, clock)
    held.add([received(clock, "a")])
    releasing = threading.Thread(target=held.release_all)
    clock.now += VISIBILITY_S / 2
    held.beat()
    releasing.join()
    assert (queue.extended, queue.released) == ([["a-1"]], [("a-1", 0)])


def test_what_is_being_released_is_not_extended(clock: Clock, numbers: Numbers) -> None:
    class Beating(FakeQueue):
        def release(
            self, receipt_handles: Sequence[str], delays_s: Sequence[int], *, in_haste: bool
        ) -> dict[int, Refusal]:
            held.beat()
            return super().release(receipt_handles, delays_s, in_haste=in_haste)

    queue = Beating()
    held = Held(queue, numbers, pytest.fail, clock)
    messages = [received(clock, "a"), received(clock, "b")]
    held.add(messages)
    clock.now += VISIBILITY_S / 2
    held.release(messages[:1], Backoff(10))
    assert (queue.extended, queue.released) == ([["b-1"]], [("a-1", 10)])


def test_a_message_received_again_before_the_reply_to_its_release_is_new_work(
    clock: Clock, numbers: Numbers
) -> None:
    """Else it would be hidden, and nobody's, until its time is up."""
    again = received(clock, "a", "a-2", 2)
    new: list[Delivery] = []

    class Racing(FakeQueue):
        def release(
            self, receipt_handles: Sequence[str], delays_s: Sequence[int], *, in_haste: bool
        ) -> dict[int, Refusal]:
            new.extend(held.add([again]))
            return super().release(receipt_handles, delays_s, in_haste=in_haste)

    held = Held(Racing(), numbers, pytest.fail, clock)
    message = received(clock, "a")
    held.add([message])
    held.release([message], Backoff(0))
    assert new == [again]
    assert (again in held, numbers.counts) == (True, {"released": 1})


def test_what_could_not_be_released_is_extended_again(
    held: Held, queue: FakeQueue, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: object, **options: object) -> dict[int, Refusal]:
        raise QueueError("gone")

    message = received(clock, "a")
    held.add([message])
    monkeypatch.setattr(queue, "release", gone)
    with pytest.raises(QueueError):
        held.release([message], Backoff(10))
    clock.now += VISIBILITY_S / 2
    held.beat()
    assert queue.extended == [["a-1"]]


def test_a_queue_that_is_gone_does_not_stop_the_end(
    held: Held, queue: FakeQueue, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: object, **options: object) -> dict[int, Refusal]:
        raise QueueError("gone")

    held.add([received(clock, "a")])
    monkeypatch.setattr(queue, "release", gone)
    held.release_all()
    assert len(held) == 1


def test_bodies_are_weighed_while_they_are_held(held: Held, clock: Clock) -> None:
    first, second = received(clock, "a"), received(clock, "b")
    held.add([first, second])
    held.weigh(second, 100)
    assert held.num_bytes == 102
    held.delete([second])
    assert held.num_bytes == 2


@given(st.integers(0, 900), st.integers(-1, 10_000))
def test_delays_double_up_to_a_quarter_of_an_hour(first_s: int, receive_count: int) -> None:
    backoff = Backoff(first_s)
    delay_s = backoff.delay_s(receive_count)
    assert first_s <= delay_s <= MAX_DELAY_S
    assert backoff.delay_s(max(receive_count, 1) + 1) == min(2 * delay_s, MAX_DELAY_S)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of AWS but keys."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")


@pytest.mark.parametrize(
    ("url", "region", "endpoint"),
    [
        ("https://sqs.eu-west-1.amazonaws.com/1/news", "eu-west-1", None),
        ("https://sqs.cn-north-1.amazonaws.com.cn/1/news", "cn-north-1", None),
        ("https://sqs-fips.us-gov-west-1.amazonaws.com/1/news", "us-gov-west-1", None),
        ("https://sqs.eu-west-1.api.aws/1/news", "eu-west-1", None),
        ("https://eu-west-1.queue.amazonaws.com/1/news", "eu-west-1", None),
        ("https://vpce-1-2.sqs.eu-west-1.vpce.amazonaws.com/1/news", "eu-west-1", None),
        ("https://sqs.eu-west-1.amazonaws.com/1/news", "eu-west-1", "http://127.0.0.1:9"),
    ],
)
def test_the_url_of_a_queue_decides_its_region_and_an_endpoint_where_calls_go(
    alone: None, url: str, region: str, endpoint: str | None
) -> None:
    queue = Queue(url, endpoint)
    meta = queue._calling.meta
    queue.close()
    assert meta.region_name == region
    assert meta.endpoint_url == (endpoint or url.removesuffix("/1/news"))


@pytest.mark.parametrize(
    "url", ["news", "arn:aws:sqs:eu-west-1:1:news", "https://host", "ftp://h/q"]
)
def test_what_is_no_url_of_a_queue_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="write the queue's URL"):
        Queue(url)


def answering(monkeypatch: pytest.MonkeyPatch, took_s: float, *bodies: str, **more: Any) -> Queue:
    """A queue whose next receive is answered after a while, by our clock."""
    times = iter([1000.0, 1000.0 + took_s])
    queue = Queue("https://sqs.eu-west-1.amazonaws.com/1/news")
    messages = [
        {"MessageId": body, "ReceiptHandle": f"{body}-1", "Body": body, **more} for body in bodies
    ]
    monkeypatch.setattr(queue._receiving, "receive_message", lambda **_: {"Messages": messages})
    monkeypatch.setattr("batchclf.sqs.time.monotonic", lambda: next(times))
    return queue


@pytest.mark.parametrize(("took_s", "visible_s"), [(0.1, 1060.1), (5, 1065), (25, 1065)])
def test_the_time_of_a_message_runs_while_its_reply_is_late(
    alone: None, monkeypatch: pytest.MonkeyPatch, took_s: float, visible_s: float
) -> None:
    queue = answering(monkeypatch, took_s, "a")
    (delivery,) = queue.receive(10, wait_s=5)
    queue.close()
    assert delivery.visible_s == pytest.approx(visible_s)


def test_a_body_that_does_not_fit_its_checksum_is_not_taken(
    alone: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    md5_of_a = "0cc175b9c0f1b6a831c399e269772661"
    queue = answering(monkeypatch, 0, "a", "b", MD5OfBody=md5_of_a)
    assert [delivery.body for delivery in queue.receive(10, wait_s=5)] == ["a"]
    queue.close()
    assert "the body of message b was damaged" in caplog.text


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_of_a_queue_elsewhere_is_that_of_the_environment(
    alone: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "eu-north-1")
    queue = Queue("http://127.0.0.1:9/1/news")
    assert queue._calling.meta.region_name == "eu-north-1"
    queue.close()


def test_a_queue_elsewhere_without_a_region_says_what_to_set(alone: None) -> None:
    with pytest.raises(ConfigError, match="Set AWS_REGION"):
        Queue("http://127.0.0.1:9/1/news")
