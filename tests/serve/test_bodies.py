"""What the bodies of requests take in memory."""

import asyncio
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from starlette.requests import Request
from starlette.types import Message

from batchclf.serve.bodies import Bodies
from batchclf.serve.refusal import Refusal
from batchclf.serve.settings import MIB, Limits

NUM_PIECES = 8
LIMITS = Limits(max_body_bytes=NUM_PIECES * MIB)


def request_in_pieces(num_pieces: int) -> Request:
    """A body of so many pieces of one MiB, without a declared length."""
    left = num_pieces

    async def receive() -> Message:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": bytes(MIB), "more_body": left > 0}

    connection = SimpleNamespace(has_whole_body=True)
    return Request({"type": "http", "headers": [], "state": {"connection": connection}}, receive)


def measured(bodies: Bodies, num_pieces: int, measure: Callable[[], int]) -> int:
    """What `measure` tells while a body is in use."""

    async def run() -> int:
        async with bodies.read(request_in_pieces(num_pieces)):
            return measure()

    return asyncio.run(run())


def test_a_body_in_use_is_in_memory_once() -> None:
    tracemalloc.start()
    try:
        held = measured(Bodies(LIMITS), NUM_PIECES, lambda: tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held < 1.5 * NUM_PIECES * MIB


def test_a_body_in_use_is_counted() -> None:
    bodies = Bodies(LIMITS)
    assert measured(bodies, NUM_PIECES, lambda: bodies.num_bytes) == NUM_PIECES * MIB


def test_a_body_that_was_used_is_not_counted_any_more() -> None:
    bodies = Bodies(LIMITS)
    measured(bodies, NUM_PIECES, lambda: 0)
    assert bodies.num_bytes == 0


def test_a_body_that_is_refused_on_the_way_is_not_counted_any_more() -> None:
    bodies = Bodies(LIMITS)
    with pytest.raises(Refusal, match="larger than"):
        measured(bodies, NUM_PIECES + 1, lambda: 0)
    assert bodies.num_bytes == 0
