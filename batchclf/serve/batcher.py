"""Requests that arrive together share a batch.

A batch begins when it is full, when as many requests wait as shared the last one, when no more
arrive, or when the oldest has waited for `max_wait_s`. So a lone client never waits, and many
clients that come back at once are waited for, but no longer than that. Large requests are taken in
pieces, in turn with the others: an article does not wait behind a file.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from batchclf.predictions import Predictions, join_predictions
from batchclf.serve.refusal import Refusal

Texts = Sequence[str | None]
_MOST_RETRY_S = 60
# Turns of the event loop without a new request, after which no more are waited for. From its bytes
# to the queue a request takes three.
_QUIET_TURNS = 5
# Turns after a batch that was computed in the event loop, so that answers leave, and what arrived
# meanwhile is in the queue; else it would wait for several batches.
_TURNS_AFTER = 5


@dataclass(eq=False)
class _Ticket:
    """One request's texts, and the predictions of those that were computed."""

    texts: Texts
    costs: Sequence[int]
    done: asyncio.Future[Predictions]
    arrived_s: float
    next_row: int = 0
    parts: list[Predictions] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.texts) - self.next_row

    def take(self, most_tokens: int) -> tuple[Texts, int]:
        """The next rows, one or more, and about how many tokens they have."""
        first, cost = self.next_row, 0
        while self.num_left and (self.next_row == first or cost < most_tokens):
            cost += self.costs[self.next_row]
            self.next_row += 1
        return self.texts[first : self.next_row], cost


@dataclass(frozen=True)
class Batch:
    """What was computed at once, for whoever counts: rows of `requests` in `seconds`."""

    predictions: Predictions
    requests: int
    seconds: float
    longest_wait_s: float


class Batcher:
    """A bounded queue in front of the model.

    Args:
        predict: computes texts; called by one thread at a time.
        estimate_tokens: of a text, at least 1.
        batch_tokens: so many fill a batch.
        max_wait_s: how long a request may wait for others.
        max_queue_rows: rows that may wait.
        on_batch: told each batch.
        inline_tokens: a batch of no more is computed in the event loop. Two threads that take
            turns at Python's lock need more time together than one after the other: on two cores
            the small model answered 1.5 times as many short articles.
    """

    def __init__(
        self,
        predict: Callable[[Texts], Predictions],
        estimate_tokens: Callable[[str | None], int],
        *,
        batch_tokens: int,
        max_wait_s: float,
        max_queue_rows: int,
        on_batch: Callable[[Batch], None],
        inline_tokens: int = 0,
    ) -> None:
        self.num_waiting_rows = 0
        self._predict = predict
        self._estimate_tokens = estimate_tokens
        self._batch_tokens = batch_tokens
        self._max_wait_s = max_wait_s
        self._max_queue_rows = max_queue_rows
        self._on_batch = on_batch
        self._inline_tokens = inline_tokens
        self._waiting: deque[_Ticket] = deque()
        self._waiting_tokens = 0
        self._computing: list[_Ticket] = []
        self._arrived = asyncio.Event()
        self._last_requests = 1
        self._rows_per_s = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")

    def classify(self, texts: Texts) -> asyncio.Future[Predictions]:
        """The predictions of one request's texts, which share batches with those of others.

        Cancelling, or any other end of the future, gives up the texts that are not computed yet.

        Raises:
            Refusal: too many rows wait already; an empty queue takes any request.
        """
        if self.num_waiting_rows and self.num_waiting_rows + len(texts) > self._max_queue_rows:
            raise Refusal(
                429,
                "busy",
                f"{self.num_waiting_rows} rows wait for the model already; try again later",
                retry_after_s=self._retry_after_s(),
            )
        costs = [self._estimate_tokens(text) for text in texts]
        done: asyncio.Future[Predictions] = asyncio.get_running_loop().create_future()
        ticket = _Ticket(texts, costs, done, time.monotonic())
        self._waiting.append(ticket)
        self.num_waiting_rows += len(texts)
        self._waiting_tokens += sum(costs)
        self._arrived.set()
        done.add_done_callback(lambda _: self._forget(ticket))
        return done

    async def run(self) -> None:
        """Compute what waits, until cancelled. What `predict` raises ends it and all requests."""
        try:
            while True:
                await self._gather()
                taken, tokens = self._take()
                if not taken:  # all of them were given up
                    continue
                self._computing = [ticket for ticket, _ in taken]
                texts = [text for _, part in taken for text in part]
                is_inline = tokens <= self._inline_tokens
                began = time.monotonic()
                predictions = self._predict(texts) if is_inline else await self._in_thread(texts)
                seconds = time.monotonic() - began
                self._deliver(taken, predictions)
                self._last_requests = len(set(self._computing))
                self._rows_per_s = 0.8 * self._rows_per_s + 0.2 * len(texts) / max(seconds, 1e-6)
                longest = max(began - ticket.arrived_s for ticket in self._computing)
                self._on_batch(Batch(predictions, self._last_requests, seconds, longest))
                self._computing = []
                for _ in range(_TURNS_AFTER if is_inline else 0):
                    await asyncio.sleep(0)
        finally:
            stopped = Refusal(503, "stopped", "the server stopped before it had an answer")
            for ticket in (*self._waiting, *self._computing):
                if not ticket.done.done():
                    ticket.done.set_exception(stopped)
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, texts: Texts) -> Predictions:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._predict, texts)

    async def _gather(self) -> None:
        """Wait for a first request, then for companions."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        deadline = self._waiting[0].arrived_s + self._max_wait_s
        num_quiet = 0
        while (
            num_quiet < _QUIET_TURNS
            and self._waiting
            and len(self._waiting) < self._last_requests
            and self._waiting_tokens < self._batch_tokens
            and time.monotonic() < deadline
        ):
            before = len(self._waiting)
            await asyncio.sleep(0)
            num_quiet = num_quiet + 1 if len(self._waiting) == before else 0

    def _take(self) -> tuple[list[tuple[_Ticket, Texts]], int]:
        """Rows for one batch: from every request its share, oldest first, until it is full."""
        taken: list[tuple[_Ticket, Texts]] = []
        total = 0
        while self._waiting and total < self._batch_tokens:
            share = max(1, (self._batch_tokens - total) // len(self._waiting))
            for _ in range(len(self._waiting)):
                ticket = self._waiting.popleft()
                texts, cost = ticket.take(min(share, self._batch_tokens - total))
                taken.append((ticket, texts))
                total += cost
                self.num_waiting_rows -= len(texts)
                self._waiting_tokens -= cost
                if ticket.num_left:
                    self._waiting.append(ticket)
                if total >= self._batch_tokens:
                    break
        return taken, total

    def _deliver(self, taken: list[tuple[_Ticket, Texts]], predictions: Predictions) -> None:
        first = 0
        for ticket, texts in taken:
            ticket.parts.append(predictions.rows(first, first + len(texts)))
            first += len(texts)
        for ticket in self._computing:
            if not ticket.done.done() and sum(map(len, ticket.parts)) == len(ticket.texts):
                ticket.done.set_result(join_predictions(ticket.parts))

    def _forget(self, ticket: _Ticket) -> None:
        """Take away what is left of a request that was given up."""
        if ticket.num_left and ticket in self._waiting:
            self._waiting.remove(ticket)
            self.num_waiting_rows -= ticket.num_left
            self._waiting_tokens -= sum(ticket.costs[ticket.next_row :])

    def _retry_after_s(self) -> int:
        if not self._rows_per_s:
            return 1
        return min(max(1, math.ceil(self.num_waiting_rows / self._rows_per_s)), _MOST_RETRY_S)
