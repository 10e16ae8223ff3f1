"""Whether a store fails for one object, or for all alike."""

import threading
from collections.abc import Callable

from batchclf.errors import StoreError

MOST_FAILED = 5  # messages in a row


class OutageWatch:
    """Decides what it means that a store keeps failing for what a message points to.

    One object may stay damaged, or its part of the store be ill: that is a matter of its message
    alone. It is an outage, in which a worker had better leave its messages to a later one, if

    - the store of the output does not answer either, which is asked every time, or
    - it happened to `MOST_FAILED` different messages in a row, with nothing read in between.

    Args:
        ask: makes a small request of the store of the output.
    """

    def __init__(self, ask: Callable[[], object]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._failed: set[str] = set()

    def end(self) -> None:
        """The content of something could be read."""
        with self._lock:
            self._failed.clear()

    def check(self, message_id: str, error: StoreError) -> None:
        """Take note of a failure.

        Raises:
            StoreError: it is an outage.
            CredentialsError, ConfigError: the output may not be asked any more.
        """
        with self._lock:
            self._failed.add(message_id)
            num_failed = len(self._failed)
        if num_failed >= MOST_FAILED:
            raise StoreError(
                f"{error}; so it was with the objects of {num_failed} messages in a row"
            ) from error
        self._ask()
