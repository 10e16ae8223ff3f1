"""Imported at the start of `moto_server`, since PYTHONPATH names this folder: one call at a time.

moto answers each request in a thread of its own, and its queues are plain lists that no lock
guards. `delete_message` makes a new list of what is left, and a message that is sent or moved to
the dead-letter queue meanwhile is lost with the old list, or comes back with the new one; two
receives hand out one message, or both move it and one of them answers 500. In each
of two long soaks three of 20,000 articles were missing, and the second saw that moto had never
handed them out; with this none was. SQS may deliver twice, which tests of receipts show, but it
does not lose what it has taken.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

from moto.sqs.models import Queue, SQSBackend

_ONE_AT_A_TIME = threading.RLock()
_CALLS = {
    SQSBackend: ("receive_message", "delete_message", "change_message_visibility"),
    Queue: ("add_message",),
}


def _locked(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def alone(*args: Any, **options: Any) -> Any:
        with _ONE_AT_A_TIME:
            return call(*args, **options)

    return alone


def _unlocked(wait: Callable[..., Any]) -> Callable[..., Any]:
    """For the long poll, from within the one receive that holds the lock."""

    @functools.wraps(wait)
    def aside(*args: Any, **options: Any) -> Any:
        _ONE_AT_A_TIME.release()
        try:
            return wait(*args, **options)
        finally:
            _ONE_AT_A_TIME.acquire()

    return aside


for _owner, _names in _CALLS.items():
    for _name in _names:
        setattr(_owner, _name, _locked(getattr(_owner, _name)))
Queue.wait_for_messages = _unlocked(Queue.wait_for_messages)
