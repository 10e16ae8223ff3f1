"""SIGTERM and SIGINT: stop soon, and with the right exit code."""

import os
import signal
import threading
from types import FrameType

from batchclf.errors import EXIT_TRY_AGAIN

# AWS Batch and ECS send SIGKILL 30 s after SIGTERM. What is not over by then is cut off by us, for
# a tidy exit code: a commit is one atomic step, so nothing half-done can be seen.
_GRACE_S = 20.0


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; a second one, or too long a wait, leaves at once."""
    interrupt = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's form
        if interrupt.is_set():
            os._exit(EXIT_TRY_AGAIN)
        interrupt.set()
        timer = threading.Timer(_GRACE_S, os._exit, [EXIT_TRY_AGAIN])
        timer.daemon = True
        timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return interrupt
