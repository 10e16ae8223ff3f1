"""Bodies of requests, read under limits of size, time and memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from batchclf.serve.refusal import Refusal
from batchclf.serve.settings import Limits

if TYPE_CHECKING:
    from batchclf.serve.connections import LimitedProtocol

# A client that is slower than this on the whole runs out of time; one that is faster has all it
# needs for a large body.
_LEAST_BYTES_PER_S = 64 << 10
# So many bodies of the largest size may be in memory at once.
_MOST_BODIES = 8


class Bodies:
    """The bodies that are in memory, together bounded."""

    def __init__(self, limits: Limits) -> None:
        self.num_bytes = 0
        self._limits = limits

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request; its memory counts until the context ends.

        Raises:
            Refusal: it is too large, too slow, or there is no memory for it now.
            ClientDisconnect: the client left.
        """
        declared = _content_length(request)
        if declared > self._limits.max_body_bytes:
            raise self._too_large()
        held = 0
        try:
            held = self._hold(declared)
            chunks: list[bytes] = []
            size = 0
            async for chunk in self._chunks(request):
                chunks.append(chunk)
                size += len(chunk)
                if size > self._limits.max_body_bytes:
                    raise self._too_large()
                if size > held:
                    held += self._hold(size - held)
            yield b"".join(chunks)
        finally:
            self.num_bytes -= held

    async def _chunks(self, request: Request) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        connection: LimitedProtocol = request.scope["state"]["connection"]
        timeout_s = self._limits.client_timeout_s
        began = loop.time()
        size = 0
        more = True
        while more:
            latest = began + timeout_s + size / _LEAST_BYTES_PER_S
            if connection.has_whole_body:
                message = await request.receive()
            else:
                message = await _receive_until(request, min(latest, loop.time() + timeout_s))
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk = message.get("body", b"")
            size += len(chunk)
            more = message.get("more_body", False)
            yield chunk

    def _hold(self, num_bytes: int) -> int:
        most = _MOST_BODIES * self._limits.max_body_bytes
        if self.num_bytes + num_bytes > most:
            raise Refusal(
                429, "busy", "too much is being read already; try again later", retry_after_s=1
            )
        self.num_bytes += num_bytes
        return num_bytes

    def _too_large(self) -> Refusal:
        most = self._limits.max_body_bytes
        return Refusal(
            413, "body_too_large", f"the body is larger than {most:,} bytes; send it in parts"
        )


async def _receive_until(request: Request, deadline: float) -> Message:
    try:
        async with asyncio.timeout_at(deadline):
            return await request.receive()
    except TimeoutError:
        raise Refusal(408, "too_slow", "the body took too long to arrive; send it again") from None


def _content_length(request: Request) -> int:
    value = request.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() else 0
