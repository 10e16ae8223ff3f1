"""What was received and is neither deleted nor given back yet, and the heart that keeps it ours."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from batchclf.errors import BatchclfError
from batchclf.log import fields
from batchclf.metrics import CountName, GaugeName
from batchclf.sqs import MAX_HELD_S, Delivery, Refusal

log = logging.getLogger(__name__)

MAX_DELAY_S = 900  # until a message that failed is tried again
_BEATS = 8  # in the time of one visibility timeout
_MOST_BEAT_S = 1.0
_RELEASED_AT_ONCE = 200


class Receipts(Protocol):
    """What of a queue is needed to keep, delete and release messages; see `sqs.Queue`."""

    visibility_s: int

    def delete(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]: ...

    def release(
        self, receipt_handles: Sequence[str], delays_s: Sequence[int], *, in_haste: bool
    ) -> dict[int, Refusal]: ...

    def extend(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]: ...


class Numbers(Protocol):
    """What of `metrics.Metrics` is told."""

    def count(self, name: CountName, n: int = 1) -> None: ...

    def gauge(self, name: GaugeName, value: float) -> None: ...


@dataclass(frozen=True)
class Backoff:
    """How long a message that failed stays hidden: twice as long after each receipt."""

    first_s: int = 10
    most_s: int = MAX_DELAY_S

    def delay_s(self, receive_count: int) -> int:
        doublings = min(max(receive_count, 1) - 1, 30)
        return int(min(self.first_s * 2**doublings, self.most_s))


class Held:
    """Messages that are ours: extended by one thread from receipt until they are settled.

    A message is settled when it was deleted or released, and also when it was abandoned: others
    may have it then, so it is never deleted, and its work here is worth nothing more.

    One call at a time changes the visibility of a message. An extension that reached the queue
    after a release would hide the message from all; so a release waits for the extension under
    way, and the heart passes over what is being released. A delete does not wait, nor does it keep
    the heart from extending: it may take long, and fail. So a refusal to extend says nothing while
    the message may just have been deleted.

    Args:
        queue: where they are from.
        numbers: told how many were settled in each way, and how late the heart beats.
        on_failure: told the error for which nothing can be kept any more, such as expired
            credentials, or a bug; called by the heart's thread.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        queue: Receipts,
        numbers: Numbers,
        on_failure: Callable[[Exception], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._numbers = numbers
        self._on_failure = on_failure
        self._clock = clock
        self._lock = threading.Lock()
        self._unchanged = threading.Condition(self._lock)
        self._changing: set[Delivery] = set()  # whose visibility a call is about to change
        self._deleting: set[Delivery] = set()
        self._deliveries: dict[str, Delivery] = {}
        self._num_bytes = 0
        self._ending = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._heart.join()

    def __len__(self) -> int:
        return len(self._deliveries)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held, and nothing is on its way back to the queue."""
        with self._lock:
            return not self._deliveries and not self._changing

    @property
    def num_bytes(self) -> int:
        """Of all bodies."""
        return self._num_bytes

    def weigh(self, delivery: Delivery, size_bytes: int) -> None:
        """Say how large a body is that was found elsewhere."""
        with self._lock:
            if delivery in self:
                self._num_bytes += size_bytes - delivery.size_bytes
                delivery.size_bytes = size_bytes

    def __contains__(self, delivery: Delivery) -> bool:
        return self._deliveries.get(delivery.message_id) is delivery

    def add(self, received: Iterable[Delivery]) -> list[Delivery]:
        """Keep what was received; returns what was not held before.

        Of a message that was, the newest receipt counts, and no work is done twice.
        """
        new = []
        with self._lock:
            for delivery in received:
                held = self._deliveries.setdefault(delivery.message_id, delivery)
                if held is delivery:
                    new.append(delivery)
                    self._num_bytes += delivery.size_bytes
                else:
                    held.receipt_handle = delivery.receipt_handle
                    held.receive_count = delivery.receive_count
                    held.received_s = delivery.received_s
                    held.visible_s = delivery.visible_s
        return new

    def oldest_s(self) -> float:
        """Seconds since the oldest message here was sent, by the clocks of the queue and ours."""
        with self._lock:
            sent = min((delivery.sent_s for delivery in self._deliveries.values()), default=None)
        return 0.0 if sent is None else max(time.time() - sent, 0.0)

    def beat(self) -> None:
        """Extend what is past half of its time; abandon what cannot be extended any more."""
        visibility_s = self._queue.visibility_s
        now = self._clock()
        with self._lock:
            due = [d for d in self._deliveries.values() if now >= d.visible_s - visibility_s / 2]
            old = [d for d in due if now + visibility_s > d.received_s + MAX_HELD_S]
            old = [d for d in old if d not in self._deleting]
        self._abandon(old, "twelve hours after its receipt the queue gives it to others")
        with self._change(due, wait=False) as due:
            late_s = max((now - (d.visible_s - visibility_s / 2) for d in due), default=0.0)
            self._numbers.gauge("heartbeat_lag_s", late_s)
            self._numbers.gauge("held", len(self))
            self._numbers.gauge("oldest_message_age_s", self.oldest_s())
            if due:
                self._extend(due)

    @contextmanager
    def _change(self, deliveries: Sequence[Delivery], *, wait: bool) -> Iterator[list[Delivery]]:
        """Those that are still held, for one who alone changes their visibility in the meantime.

        Args:
            deliveries: to be changed.
            wait: for whoever changes some of them; else those are left out.
        """
        with self._unchanged:
            if wait:
                self._unchanged.wait_for(lambda: self._changing.isdisjoint(deliveries))
            ours = [d for d in deliveries if d in self and d not in self._changing]
            self._changing.update(ours)
        try:
            yield ours
        finally:
            with self._unchanged:
                self._changing.difference_update(ours)
                self._unchanged.notify_all()

    def _extend(self, due: Sequence[Delivery]) -> None:
        handles = [delivery.receipt_handle for delivery in due]
        asked_s = self._clock()
        refusals = self._queue.extend(handles)
        answered_s = self._clock()
        for place, delivery in enumerate(due):
            refusal = refusals.get(place)
            if delivery.receipt_handle != handles[place]:
                continue  # received once more in the meantime, which is as good
            if refusal is None:
                delivery.visible_s = asked_s + self._queue.visibility_s
            elif delivery in self._deleting:
                continue  # it may be gone already; the delete tells
            elif refusal.is_answered or delivery.visible_s <= answered_s:
                self._abandon([delivery], f"its visibility could not be extended: {refusal}")

    def delete(self, deliveries: Iterable[Delivery]) -> None:
        """Delete what is still held, with the newest receipts.

        A stale receipt is refused for good: the message comes again and is found done.
        """
        with self._lock:
            ours = [d for d in deliveries if d in self and d not in self._deleting]
            self._deleting.update(ours)
        try:
            left = ours
            while left:
                left = self._delete_once(left)
        finally:
            with self._lock:
                self._deleting.difference_update(ours)

    def _delete_once(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Those that were received once more while they were being deleted."""
        receipts = {delivery: delivery.receipt_handle for delivery in deliveries}
        refusals = self._queue.delete(list(receipts.values()))
        refused = {deliveries[place]: why for place, why in refusals.items()}
        with self._lock:  # no receipt comes between the look at the newest and the end
            again = [d for d, used in receipts.items() if d in self and d.receipt_handle != used]
            settled = self._let_go(d for d, used in receipts.items() if d.receipt_handle == used)
        deleted = [delivery for delivery in settled if delivery not in refused]
        self._numbers.count("deleted", len(deleted))
        for delivery in settled:
            if delivery in refused:
                self._tell_abandoned(delivery, f"it could not be deleted: {refused[delivery]}")
        return again

    def release(self, deliveries: Iterable[Delivery], backoff: Backoff) -> None:
        """Give messages back, to be tried again after a delay that grows with each receipt."""
        self._release(list(deliveries), lambda each: backoff.delay_s(each.receive_count))

    def release_all(self) -> None:
        """Give back everything at once, but for what is being deleted.

        What cannot be given back comes back when its visibility ends.
        """
        with self._lock:
            left = [d for d in self._deliveries.values() if d not in self._deleting]
        try:
            for first in range(0, len(left), _RELEASED_AT_ONCE):
                some = left[first : first + _RELEASED_AT_ONCE]
                self._release(some, lambda _: 0, in_haste=True)
        except BatchclfError as error:
            log.warning("%d messages come back when their time is up: %s", len(self), error)

    def _release(
        self,
        deliveries: Sequence[Delivery],
        delay_s: Callable[[Delivery], int],
        *,
        in_haste: bool = False,
    ) -> None:
        with self._change(deliveries, wait=True) as left:
            if not left:
                return
            # Let go of them first: what is visible again may be received again before the reply
            # is here, and is new then.
            self._settle(left)
            handles = [delivery.receipt_handle for delivery in left]
            delays_s = [delay_s(delivery) for delivery in left]
            try:
                refusals = self._queue.release(handles, delays_s, in_haste=in_haste)
            except BatchclfError:
                self._take_back(left)
                raise
            for place, refusal in refusals.items():
                self._tell_abandoned(left[place], f"it could not be given back: {refusal}")
            self._numbers.count("released", len(left) - len(refusals))

    def _take_back(self, deliveries: Sequence[Delivery]) -> None:
        """Hold again what was let go of, but for what was received again meanwhile."""
        with self._lock:
            for delivery in deliveries:
                if delivery.message_id not in self._deliveries:
                    self._deliveries[delivery.message_id] = delivery
                    self._num_bytes += delivery.size_bytes

    def _abandon(self, deliveries: Sequence[Delivery], reason: str) -> None:
        for delivery in self._settle(deliveries):
            self._tell_abandoned(delivery, reason)

    def _tell_abandoned(self, delivery: Delivery, reason: str) -> None:
        self._numbers.count("abandoned")
        log.warning(
            "abandoned message %s: %s",
            delivery.message_id,
            reason,
            extra=fields(message_id=delivery.message_id, reason=reason),
        )

    def _settle(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Let go of messages; those that were held until now."""
        with self._lock:
            return self._let_go(deliveries)

    def _let_go(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """As `_settle`, for one who holds the lock."""
        held = [delivery for delivery in deliveries if delivery in self]
        for delivery in held:
            del self._deliveries[delivery.message_id]
            self._num_bytes -= delivery.size_bytes
        return held

    def _beat_on(self) -> None:
        every_s = min(self._queue.visibility_s / _BEATS, _MOST_BEAT_S)
        while not self._ending.wait(every_s):
            try:
                self.beat()
            except Exception as error:  # noqa: BLE001 - raised again by whoever takes what is ready
                self._on_failure(error)
                return
