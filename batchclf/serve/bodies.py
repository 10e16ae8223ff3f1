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
        """The body of a request; its memory counts as long as the context lasts.

        Raises:
            Refusal: it is too large, too slow, or there is no memory for it now.
            ClientDisconnect: the client left.
        """
        declared = _content_length(request)
        if declared > self._limits.max_body_bytes:
            raise self._too_large()
        held = self._hold(declared)
        try:
            chunks: list[bytes] = []
            size = 0
            began = asyncio.get_running_loop().time()
            more = True
            while more:
                message = await self._receive(request, began, size)
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk = message.get("body", b"")
                chunks.append(chunk)
                size += len(chunk)
                if size > self._limits.max_body_bytes:
                    raise self._too_large()
                if size > held:
                    held += self._hold(size - held)
                more = message.get("more_body", False)
            body = b"".join(chunks)
            del chunks, chunk, message  # or the body would be in memory twice
            yield body
        finally:
            self.num_bytes -= held

    async def _receive(self, request: Request, began: float, size: int) -> Message:
        """The next piece of a body, of which `size` bytes came since `began`."""
        connection: LimitedProtocol = request.scope["state"]["connection"]
        if connection.has_whole_body:
            return await request.receive()
        timeout_s = self._limits.client_timeout_s
        latest = began + timeout_s + size / _LEAST_BYTES_PER_S
        return await _receive_until(
            request, min(latest, asyncio.get_running_loop().time() + timeout_s)
        )

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
    value: bytes = dict(request.scope["headers"]).get(b"content-length", b"")
    return int(value) if value.isdigit() else 0
