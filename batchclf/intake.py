"""Messages in: received by a few threads, understood, and handed on as articles or as shards."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from batchclf.config import CutSettings, ReadSettings
from batchclf.errors import (
    ConfigError,
    CredentialsError,
    InputChangedError,
    InputError,
    MessageError,
    OutOfSpaceError,
    OutputError,
    QueueError,
    StoreError,
)
from batchclf.held import Backoff, Held, Numbers
from batchclf.log import fields
from batchclf.messages import (
    MAX_BODY_BYTES,
    AllowedSources,
    Article,
    ObjectRefs,
    Pointer,
    ShardRef,
    parse,
)
from batchclf.outage import OutageWatch
from batchclf.planning import cut_source
from batchclf.shards import Shard
from batchclf.source import QueuedArticle
from batchclf.sqs import BATCH_ENTRIES, Delivery, Queue
from batchclf.store import find_object, read_object

log = logging.getLogger(__name__)

_RECEIVERS = 4
# Long enough to cost next to nothing on an empty queue, and short enough to wait for it before
# leaving: a message that arrives for a process that is gone stays hidden until its time is up.
_POLL_S = 5
_WAIT_S = 0.2  # how soon a waiting receiver sees that there is room, or that it should stop
# Messages of shards that are held at once: one that is labelled and one to go on with. A third
# could be with another worker.
_SHARDS_AHEAD = 2
_MOST_SHOWN = 200  # characters of a body, in a line of level debug


@dataclass(frozen=True)
class TakeSettings:
    """How much is taken from a queue, and when it is enough.

    Attributes:
        max_held: messages held at once.
        max_held_bytes: of their bodies.
        max_messages, max_rows: after so many no more are taken.
        idle_exit_s: no more are taken after so long without any.
    """

    max_held: int
    max_held_bytes: int
    max_messages: int | None = None
    max_rows: int | None = None
    idle_exit_s: float | None = None


@dataclass(frozen=True)
class ReadyArticle:
    """A message that is a row."""

    delivery: Delivery
    article: QueuedArticle


@dataclass(eq=False)
class ReadyShards:
    """A message that is done when all its shards are.

    Attributes:
        left: shards that are not done.
        errors: why some of its shards, or objects, cannot be.
    """

    delivery: Delivery
    left: set[Shard]
    errors: list[InputError | OutputError | StoreError] = field(default_factory=list)


Ready = ReadyArticle | ReadyShards


class Reading:
    """What a message asks for, with the sources that it may name.

    Args:
        read, cut: as for the sources of `classify`.
        allowed: what messages may point to.
        outage: told of each object whose content could be read.
        endpoint_url: of the store.
    """

    def __init__(
        self,
        read: ReadSettings,
        cut: CutSettings,
        allowed: AllowedSources,
        outage: OutageWatch,
        endpoint_url: str | None,
    ) -> None:
        self._read = read
        self._cut = cut
        self._allowed = allowed
        self._outage = outage
        self._endpoint_url = endpoint_url

    def resolve(self, delivery: Delivery, held: Held) -> Ready | None:
        """What is ready with this message; None: nothing is to be done, so it is.

        Raises:
            InputError: the message is not understood, or may not or cannot be followed.
            StoreError: the store keeps failing for what it points to.
            OutOfSpaceError, CredentialsError: that would be so for every message.
        """
        message = parse(delivery.body, self._read.text_columns)
        if isinstance(message, Pointer):
            self._allowed.check(message.uri)
            content = read_object(message.uri, MAX_BODY_BYTES, self._endpoint_url)
            self._outage.end()
            held.weigh(delivery, len(content))
            message = parse(content, self._read.text_columns)
            if not isinstance(message, Article):
                raise MessageError("points to a body that is no article")
        match message:
            case Article(found):
                delivery.body = ""  # it has done its work, and may be most of the memory
                article = QueuedArticle(
                    found, delivery.message_id, delivery.receive_count, delivery.size_bytes
                )
                return ReadyArticle(delivery, article)
            case ShardRef():
                return ReadyShards(delivery, {self._find_shard(message)})
            case ObjectRefs(uris):
                return self._cut_objects(delivery, uris)
        return None

    def _find_shard(self, ref: ShardRef) -> Shard:
        self._allowed.check(ref.source_uri)
        source = find_object(ref.source_uri, self._endpoint_url)
        if source.version.strip('"') != ref.etag.strip('"'):
            raise InputChangedError(f"{source}: replaced since its shards were sent; send it again")
        return Shard(source, ref.start, ref.stop)

    def _cut_objects(self, delivery: Delivery, uris: Sequence[str]) -> ReadyShards:
        """The shards of all objects that can be read; the others are told of at the end."""
        ready = ReadyShards(delivery, set())
        for uri in uris:
            self._allowed.check(uri)
        for uri in uris:
            try:
                source = find_object(uri, self._endpoint_url)
                ready.left.update(cut_source(source, self._read, self._cut, self._endpoint_url))
                self._outage.end()
            except OutOfSpaceError:
                raise
            except (InputError, StoreError) as error:
                ready.errors.append(error)
        if not ready.left:
            raise ready.errors[0]
        return ready


class Intake:
    """Receives while there is room, and hands on what is ready.

    One thread receives until the queue is seen to hold many articles; then all do. Shards are taken
    one at a time, since each is minutes of work that another worker could begin.

    Args:
        outage: tells a store that fails for one message from one that fails for all.
        interrupt: stops receiving.
    """

    def __init__(
        self,
        queue: Queue,
        held: Held,
        reading: Reading,
        settings: TakeSettings,
        backoff: Backoff,
        numbers: Numbers,
        outage: OutageWatch,
        interrupt: threading.Event,
    ) -> None:
        self._queue = queue
        self._held = held
        self._reading = reading
        self._outage = outage
        self._settings = settings
        self._backoff = backoff
        self._numbers = numbers
        self._interrupt = interrupt
        self._changed = threading.Condition()
        self._ready: deque[Ready] = deque()
        self._failure: Exception | None = None
        self._closing = False
        self._num_asked = 0  # messages of the receives under way
        self._num_receiving = 0
        self._num_replies = 0
        self._num_taken = 0
        self._num_rows = 0
        self._shards: list[Delivery] = []  # messages of shards
        self._sees_articles = False  # the last reply held articles
        self._is_flowing = False  # the last reply was as large as it could be
        self._last_busy_s = time.monotonic()
        self._threads = [
            threading.Thread(target=self._receive_on, name=f"receive-{number}", daemon=True)
            for number in range(_RECEIVERS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop receiving; returns when nothing is on the way here any more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + 2 * _POLL_S
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def fail(self, error: Exception) -> None:
        """End with this error whoever takes what is ready."""
        with self._changed:
            self._failure = self._failure or error
            self._closing = True
            self._changed.notify_all()

    def take(self, timeout_s: float) -> list[Ready] | None:
        """Whatever is ready, after a while nothing, and None when no more will come.

        Raises:
            QueueError, StoreError, ConfigError: the queue or the store fails for all alike.
        """
        with self._changed:
            if not self._ready and not self._is_over:
                self._changed.wait(timeout_s)
            self.check()
            ready = list(self._ready)
            self._ready.clear()
            return ready or (None if self._is_over else [])

    def check(self) -> None:
        """Raise the error that ended this, also where nothing is taken any more."""
        if self._failure is not None:
            raise self._failure

    @property
    def _is_over(self) -> bool:
        return self._closing and not any(thread.is_alive() for thread in self._threads)

    def _receive_on(self) -> None:
        wait_s = _POLL_S
        if self._settings.idle_exit_s is not None:
            wait_s = min(wait_s, max(1, math.ceil(self._settings.idle_exit_s)))
        try:
            while most := self._admit():
                received = []
                new: list[Delivery] = []
                try:
                    received = self._receive(most, wait_s)
                    new = self._held.add(received)
                finally:
                    self._replied(most, len(received), len(new))
                if new:
                    self._hand_on(new, is_full=len(received) == most)
        except Exception as error:  # noqa: BLE001 - raised again by `take`
            self.fail(error)
        finally:
            with self._changed:
                self._changed.notify_all()

    def _receive(self, most: int, wait_s: int) -> list[Delivery]:
        """Messages; none where this call failed, and another of ours may yet be answered.

        The queue itself fails if the last receive under way does and none was answered meanwhile.
        """
        num_replies = self._num_replies
        try:
            received = self._queue.receive(most, wait_s)
        except QueueError as error:
            with self._changed:
                is_last = self._num_receiving == 1
            if is_last and self._num_replies == num_replies:
                raise
            log.warning("%s; as not all receives fail, this goes on", error)
            return []
        self._num_replies += 1
        return received

    def _admit(self) -> int:
        """Wait until a receive makes sense; how many to ask for, or 0 for never again."""
        with self._changed:
            while not (self._closing or self._interrupt.is_set() or self._is_enough()):
                room = self._room()
                if room > 0 and (not self._num_receiving or self._is_flowing):
                    self._num_receiving += 1
                    self._num_asked += room
                    return room
                self._changed.wait(_WAIT_S)
            self._closing = True
            return 0

    def _is_enough(self) -> bool:
        limits, now = self._settings, time.monotonic()
        if self._num_receiving == 0 and (
            (limits.max_messages is not None and self._num_taken >= limits.max_messages)
            or (limits.max_rows is not None and self._num_rows >= limits.max_rows)
        ):
            return True
        if not self._held.is_idle:
            self._last_busy_s = now
        return (
            limits.idle_exit_s is not None
            and self._num_receiving == 0
            and now - self._last_busy_s >= limits.idle_exit_s
        )

    def _room(self) -> int:
        limits = self._settings
        self._shards = [delivery for delivery in self._shards if delivery in self._held]
        if len(self._shards) >= _SHARDS_AHEAD or self._held.num_bytes >= limits.max_held_bytes:
            return 0
        room = limits.max_held - len(self._held)
        if limits.max_messages is not None:
            room = min(room, limits.max_messages - self._num_taken)
        if limits.max_rows is not None:
            room = min(room, limits.max_rows - self._num_rows)
        return min(room - self._num_asked, BATCH_ENTRIES if self._sees_articles else 1)

    def _replied(self, num_asked: int, num_received: int, num_new: int) -> None:
        with self._changed:
            self._num_receiving -= 1
            self._num_asked -= num_asked
            self._num_taken += num_new
            if num_received:
                self._last_busy_s = time.monotonic()
            self._is_flowing = self._sees_articles and num_received == num_asked
            self._changed.notify_all()
        self._numbers.count("received", num_new)

    def _hand_on(self, new: Sequence[Delivery], *, is_full: bool) -> None:
        ready: list[Ready] = []
        refused = []
        done = []
        for delivery in new:
            try:
                found = self._resolve(delivery)
            except (InputError, OutputError, StoreError) as error:
                refused.append(delivery)
                tell_refused(delivery, error, self._backoff)
                if isinstance(error, StoreError):
                    self._outage.check(delivery.message_id, error)
                continue
            if found is None:
                done.append(delivery)
            else:
                ready.append(found)
        shards = [each for each in ready if isinstance(each, ReadyShards)]
        rows_of_shards = sum(shard.num_rows for each in shards for shard in each.left)
        with self._changed:
            self._ready += ready
            self._shards += [each.delivery for each in shards]
            self._num_rows += len(ready) - len(shards) + rows_of_shards
            self._sees_articles = not shards
            self._is_flowing = self._sees_articles and is_full
            self._changed.notify_all()
        if done:
            self._held.delete(done)
        if refused:
            self._numbers.count("refused", len(refused))
            self._held.release(refused, self._backoff)

    def _resolve(self, delivery: Delivery) -> Ready | None:
        try:
            return self._reading.resolve(delivery, self._held)
        except CredentialsError:
            raise
        except ConfigError as error:  # of the one bucket that this message names
            raise MessageError(str(error)) from error


def tell_refused(
    delivery: Delivery, error: InputError | OutputError | StoreError, backoff: Backoff
) -> None:
    """Log why a message is given back, for its redrive policy to take in the end.

    How its body begins stands in a line of level debug alone. An article that was understood has
    none any more; its text is shown by whoever labels it.
    """
    delay_s = backoff.delay_s(delivery.receive_count)
    log.error(
        "message %s, received %d times: %s; to be tried again in %d s",
        delivery.message_id,
        delivery.receive_count,
        error,
        delay_s,
        extra=fields(
            message_id=delivery.message_id,
            receive_count=delivery.receive_count,
            reason=str(error),
            delay_s=delay_s,
        ),
    )
    if delivery.body and log.isEnabledFor(logging.DEBUG):
        begins = delivery.body[:_MOST_SHOWN]
        log.debug(
            "message %s begins %r",
            delivery.message_id,
            begins,
            extra=fields(message_id=delivery.message_id, body_begins=begins),
        )
