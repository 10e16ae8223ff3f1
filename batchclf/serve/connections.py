"""Connections under limits that uvicorn leaves to a proxy: their number, and slow headers."""

from asyncio import TimerHandle, Transport
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from batchclf.serve.metrics import Metrics

_MOST_HEAD_BYTES = 64 << 10
_LINGER_S = 1.0  # after the last word, for the client to read it
# A connection beyond the limit may say within so long that it is a health check.
_OVERFLOW_HEAD_S = 1.0
# A client may have sent a request on an idle connection when it hears that we stop.
_DRAIN_S = 1.0


def _answer(status: str, code: str, message: str, more: str = "") -> bytes:
    body = f'{{"error":{{"code":"{code}","message":"{message}"}}}}'
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n{more}\r\n{body}"
    ).encode("ascii")


_TOO_MANY = _answer(
    "503 Service Unavailable",
    "too_many_connections",
    "too many connections are open; try again later",
    "retry-after: 1\r\n",
)
_TOO_SLOW = _answer(
    "408 Request Timeout", "too_slow", "the headers took too long to arrive; send them again"
)
_TOO_LONG = _answer(
    "431 Request Header Fields Too Large", "headers_too_large", "the headers are too large"
)


@dataclass
class Entrance:
    """How many connections may be open, and how many were refused and linger.

    Attributes:
        most: served at once.
        most_refused: told at once why they are not; more are closed without a word.
        head_timeout_s: for a client to send the headers of a request.
    """

    most: int
    most_refused: int
    head_timeout_s: float
    metrics: Metrics
    num_refused: int = 0


class _Joining:
    """A transport that can keep one write back and send it with the next: one packet less."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._is_keeping = False
        self._kept = b""

    def keep_next(self) -> None:
        """Keep the next write back until the one after it."""
        self._is_keeping = True

    def write(self, content: bytes) -> None:
        if self._is_keeping:
            self._is_keeping = False
            self._kept = content
            return
        if self._kept:
            content, self._kept = self._kept + content, b""
        self._transport.write(content)

    def close(self) -> None:
        if self._kept:
            self.write(b"")
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class LimitedProtocol(HttpToolsProtocol):
    """One connection, as uvicorn serves it, under the limits of its entrance.

    One beyond the limit is heard if it asks for /ping at once, since a full server is a healthy
    one, and is told to come back later otherwise.
    """

    entrance: ClassVar[Entrance]
    _joining: _Joining
    _head_timer: TimerHandle | None = None
    _head_bytes = 0
    _is_in_head = False
    _is_overflow = False
    _is_refused = False
    _on_gone: Callable[[], None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._joining = _Joining(transport)
        super().connection_made(cast("Transport", self._joining))
        if len(self.connections) <= self.entrance.most:
            self._expect_head()
            return
        self._is_overflow = True
        self.connections.discard(self)
        self.entrance.num_refused += 1
        if self.entrance.num_refused > self.entrance.most_refused:
            self._is_refused = True
            self.entrance.metrics.refused_connections.inc()
            self.transport.abort()
        else:
            self._head_timer = self.loop.call_later(_OVERFLOW_HEAD_S, self._refuse)

    def _refuse(self) -> None:
        self._stop_head_timer()
        self.entrance.metrics.refused_connections.inc()
        self._say(_TOO_MANY)

    def _say(self, answer: bytes) -> None:
        """A last word. What the client still sends is read and dropped, lest it be a reset."""
        self._is_refused = True
        self.transport.write(answer)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        if self._is_overflow:
            self.entrance.num_refused -= 1
        if self._on_gone is not None:
            self._on_gone()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._head_timer is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        is_idle = self.cycle is None or self.cycle.response_complete
        if self._head_timer is not None and self._head_bytes > _MOST_HEAD_BYTES:
            self._stop_head_timer()
            self._say(_TOO_LONG)
        elif self._head_timer is None and (
            self._is_in_head or (is_idle and self.timeout_keep_alive_task is None)
        ):
            self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["connection"] = self
        self._is_in_head = True

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_head_timer()
        if self._is_refused:  # a second request with the one that was refused
            return
        if self._is_overflow and self.url != b"/ping":
            self._refuse()
            return
        super().on_headers_complete()
        if self._is_overflow:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_refused:
            super().on_message_complete()

    @property
    def is_congested(self) -> bool:
        """Whether the client leaves so much unread that the next write waits for it."""
        return self.flow.write_paused

    @property
    def has_whole_body(self) -> bool:
        """Whether all of the body is here already; it may be, too, where this is false."""
        return self.cycle is not None and not self.cycle.more_body

    def keep_head(self) -> None:
        """Send the head of an answer, which is written next, together with what follows it."""
        self._joining.keep_next()

    @contextmanager
    def watched(self, on_gone: Callable[[], None]) -> Iterator[None]:
        """Call `on_gone` should the client leave within the context, or if it has left already."""
        self.flow.resume_reading()  # or we would not hear of it after a large body
        if self.transport.is_closing():
            on_gone()
        self._on_gone = on_gone
        try:
            yield
        finally:
            self._on_gone = None

    def abort(self) -> None:
        """Give the client up."""
        self.transport.abort()

    def _expect_head(self) -> None:
        if self._is_refused:
            return
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.entrance.head_timeout_s, self._on_slow_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_slow_head(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._head_bytes:
            self._say(_TOO_SLOW)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # but not before the client has read all of it
            self.loop.call_later(self.entrance.head_timeout_s, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(_DRAIN_S, super().shutdown)
        else:
            super().shutdown()


def limited_protocol(entrance: Entrance) -> type[LimitedProtocol]:
    """The protocol of all connections of one entrance; uvicorn makes an instance of each."""
    return type("Protocol", (LimitedProtocol,), {"entrance": entrance})
