"""What holds for every request: patience with slow readers, headers, the access log."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchclf.log import fields
from batchclf.serve.metrics import Metrics
from batchclf.serve.refusal import CLIENT_GONE

if TYPE_CHECKING:
    from batchclf.serve.connections import LimitedProtocol

log = logging.getLogger(__name__)

_PIECE_BYTES = 64 << 10  # of an answer, written at once
# A body that nobody wants is read and dropped for so long, so that its sender sees our answer
# rather than a reset connection.
_LINGER_S = 5.0

_SAFE_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}


class Door:
    """ASGI middleware around the whole application.

    Attributes:
        num_open: requests that have begun and not ended.
        num_cut_off: requests that ended because the server could wait no longer.
        draining: every answer asks its client to close the connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        client_timeout_s: float,
        route_of: Callable[[str], str],
    ) -> None:
        self.num_open = 0
        self.num_cut_off = 0
        self.draining = False
        self._app = app
        self._metrics = metrics
        self._client_timeout_s = client_timeout_s
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request and write its line of the access log."""
        request = _Exchange(scope, receive, send, self._client_timeout_s, self)
        self.num_open += 1
        try:
            await self._app(scope, request.receive, request.send)
        except asyncio.CancelledError:
            self.num_cut_off += 1
            raise
        finally:
            self.num_open -= 1
            self._record(scope, request)

    def _record(self, scope: Scope, request: "_Exchange") -> None:
        seconds = time.perf_counter() - request.began
        status = CLIENT_GONE if request.is_cut else request.status
        route = self._route_of(scope["path"])
        self._metrics.count_request(route, status, seconds)
        noted: dict[str, Any] = scope["state"].get("noted", {})
        # Health checks come every few seconds and say nothing as long as all is well.
        level = logging.DEBUG if route == "/ping" and status == 200 else logging.INFO  # noqa: PLR2004
        if not log.isEnabledFor(level):
            return
        said = fields(
            request_id=request.id,
            method=scope["method"],
            route=route,
            status=status,
            ms=round(seconds * 1000, 2),
            bytes_in=request.num_bytes_in,
            bytes_out=request.num_bytes_out,
            **noted,
        )
        message = f"{scope['method']} {route} {status} {seconds * 1000:.1f} ms"
        # Not `log.log`, which looks through the stack for its caller at every line.
        log.handle(log.makeRecord(log.name, level, __file__, 0, message, (), None, extra=said))


class _Exchange:
    """One request and its answer, between the server and the application."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, timeout_s: float, door: Door
    ) -> None:
        self.id = f"{random.getrandbits(64):016x}"
        self.began = time.perf_counter()
        self.status = 500
        self.is_cut = False
        self.num_bytes_in = 0
        self.num_bytes_out = 0
        self._scope = scope
        self._receive = receive
        self._send = send
        self._connection: LimitedProtocol = scope["state"]["connection"]
        self._timeout_s = timeout_s
        self._door = door
        self._body_ended = False

    @property
    def _is_small(self) -> bool:
        """Whether the body is said to be so small that it must be here already."""
        length = dict(self._scope["headers"]).get(b"content-length", b"")
        return length.isdigit() and int(length) <= _PIECE_BYTES

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.num_bytes_in += len(message.get("body", b""))
            self._body_ended = not message.get("more_body", False)
        else:
            self._body_ended = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status >= 400 and self._is_small:  # noqa: PLR2004
                await self._drop_rest()  # then the connection can go on
            headers = {**_SAFE_HEADERS, **dict(message["headers"])}
            headers[b"x-request-id"] = self.id.encode()
            if self._door.draining or (self.status >= 400 and not self._body_ended):  # noqa: PLR2004
                headers[b"connection"] = b"close"
            if self._scope["method"] != "HEAD" and not self._connection.is_congested:
                self._connection.keep_head()
            message["headers"] = list(headers.items())
            await self._write(message)
            return
        body = message.get("body", b"")
        is_last = not message.get("more_body", False)
        is_unread = self.status >= 400 and not self._body_ended  # noqa: PLR2004
        start = 0
        while len(body) - start > _PIECE_BYTES or (is_unread and start < len(body)):
            await self._write_body(body[start : start + _PIECE_BYTES], more=True)
            start += _PIECE_BYTES
        if is_last and is_unread:
            await self._drop_rest()
        await self._write_body(body[start:], more=not is_last)

    async def _write_body(self, piece: bytes, *, more: bool) -> None:
        self.num_bytes_out += len(piece)
        await self._write({"type": "http.response.body", "body": piece, "more_body": more})

    async def _write(self, message: Message) -> None:
        if self.is_cut:
            return
        if not self._connection.is_congested:
            await self._send(message)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:  # the client does not read
            self.is_cut = True
            self._connection.abort()

    async def _drop_rest(self) -> None:
        try:
            async with asyncio.timeout(_LINGER_S):
                while not self._body_ended:
                    await self.receive()
        except TimeoutError:
            return
