"""The job of `batchclf enqueue`: one message a shard, for workers to share out among themselves."""

import hashlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from batchclf.config import CutSettings, ReadSettings
from batchclf.errors import ConfigError, Interrupted
from batchclf.log import fields
from batchclf.messages import format_shard
from batchclf.planning import Plan, make_plan
from batchclf.shards import source_digest
from batchclf.sqs import Queue

log = logging.getLogger(__name__)

_SENT_AT_ONCE = 200


@dataclass(frozen=True)
class Settings:
    """Everything that `enqueue` was asked for."""

    inputs: tuple[str, ...]
    queue: str
    read: ReadSettings
    cut: CutSettings
    endpoint_url: str | None = None


class EnqueueJob:
    """A planned job. Making it looks at the inputs and at the queue; nothing is sent.

    Raises:
        ConfigError: an input is not on S3, or there is no such queue.
        InputError: an input argument matches nothing.
    """

    def __init__(self, settings: Settings) -> None:
        for given in settings.inputs:
            if not given.startswith("s3://"):
                raise ConfigError(
                    f"{given}: workers on other machines read the inputs, so they must be on S3; "
                    "write s3://bucket/prefix"
                )
        self.queue = Queue(settings.queue, settings.endpoint_url)
        self.queue.attributes()  # is it there?
        self.plan: Plan = make_plan(
            settings.inputs, settings.read, settings.cut, settings.endpoint_url
        )

    def run(self, interrupt: threading.Event) -> Iterator[int]:
        """Send a message for every shard, telling how many went each time.

        On a FIFO queue the shards of one source follow each other, and a repeat within five
        minutes is dropped by SQS.

        Raises:
            Interrupted, QueueError: some were not sent; sending all again does no harm.
        """
        for error in self.plan.unreadable:
            log.error("%s", error)
        shards = self.plan.shards
        for first in range(0, len(shards), _SENT_AT_ONCE):
            if interrupt.is_set():
                raise Interrupted(f"sent {first} of {len(shards)}; run the same command again")
            some = shards[first : first + _SENT_AT_ONCE]
            self.queue.send(
                [format_shard(shard) for shard in some],
                [source_digest(shard.source) for shard in some],
                [hashlib.sha256(shard.name.encode()).hexdigest() for shard in some],
            )
            log.info("sent %d of %d", first + len(some), len(shards), extra=fields(n=len(some)))
            yield len(some)
