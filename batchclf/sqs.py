"""SQS: receive, send, and calls in batches whose entries may fail one by one."""

import hashlib
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError as BotoConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
)

from batchclf.errors import BatchclfError, ConfigError, CredentialsError, QueueError
from batchclf.retries import (
    ATTEMPTS,
    BAD_CREDENTIALS,
    ONE_ATTEMPT,
    THROTTLED,
    code_of,
    may_pass,
    retry,
    status_of,
)

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

log = logging.getLogger(__name__)

# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html
BATCH_ENTRIES = 10  # of one batch call, and messages of one receive
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-visibility-timeout.html
MAX_HELD_S = 43_200  # visibility ends twelve hours after receipt, however often it was extended
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-short-and-long-polling.html
LONG_POLL_S = 20

_CONNECT_TIMEOUT_S = 5
_POLL_SLACK_S = 10  # beyond the long poll, until a receive counts as stalled
_MOST_CALL_S = 10.0  # until another call counts as stalled
# Until an extension does, or a release before the end of the process: after SIGTERM one of each may
# have to be waited for, each with two attempts, and there are 30 s for everything.
_MOST_EXTEND_S = 4.0
_EXTEND_ATTEMPTS = 2  # the next beat of the heart is another
_ENTRY_ATTEMPTS = 5  # of the entries that failed in a batch which itself did not
_ENTRY_WAIT_S = 0.2  # before the second; random, up to twice as long before each further one
_CALLS_AT_ONCE = 4

# sqs.eu-west-1.amazonaws.com, eu-west-1.queue.amazonaws.com, sqs-fips., sqs.eu-west-1.api.aws,
# vpce-1-2.sqs.eu-west-1.vpce.amazonaws.com
# https://docs.aws.amazon.com/general/latest/gr/sqs-service.html
_AWS_HOST = re.compile(
    r"(?:[\w-]+\.)?sqs(?:-fips)?\.(?P<region>[a-z]{2}[a-z0-9-]*-\d)\..+"
    r"|(?P<legacy>[a-z]{2}[a-z0-9-]*-\d)\.queue\.amazonaws\.com(?:\.cn)?"
)


@dataclass(eq=False)
class Delivery:
    """A message as it was received; the same message received again renews it.

    Attributes:
        receipt_handle: the newest.
        receive_count: how often the queue has given it out, this time included.
        sent_s: when it was sent, in seconds since 1970.
        received_s: monotonic, of the newest receipt.
        visible_s: monotonic, when others can receive it unless it is extended.
        size_bytes: about, of the body.
    """

    message_id: str
    receipt_handle: str
    body: str
    receive_count: int
    sent_s: float
    received_s: float
    visible_s: float
    size_bytes: int = 0


@dataclass(frozen=True)
class Refusal:
    """Why an entry of a batch failed.

    Attributes:
        is_final: asking again would not help.
        is_answered: the queue said so; otherwise it said nothing of the whole batch.
    """

    code: str
    reason: str
    is_final: bool
    is_answered: bool = True

    def __str__(self) -> str:
        return f"{self.code} {self.reason}".strip()


@dataclass(frozen=True)
class Depth:
    """About how many messages a queue has."""

    waiting: int
    in_flight: int
    delayed: int


class Queue:
    """A connection to one queue, safe to share between threads.

    Args:
        url: as AWS shows it.
        endpoint_url: another server of the SQS protocol; None: AWS_ENDPOINT_URL_SQS,
            AWS_ENDPOINT_URL, else the host in `url`.
        visibility_s: of received and of extended messages.

    Raises:
        ConfigError: the URL is none, or the AWS configuration makes no sense.
    """

    def __init__(
        self, url: str, endpoint_url: str | None = None, *, visibility_s: int = 60
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or len(parts.path) <= 1:
            raise ConfigError(f"--queue {url}: write the queue's URL, https://sqs.REGION...")
        self.url = url
        self.path = parts.path.strip("/")  # account and name
        self.name = self.path.rpartition("/")[2]
        self.is_fifo = self.name.endswith(".fifo")
        self.visibility_s = visibility_s
        configured = os.environ.get("AWS_ENDPOINT_URL_SQS", os.environ.get("AWS_ENDPOINT_URL"))
        endpoint_url = endpoint_url or configured or f"{parts.scheme}://{parts.netloc}"
        match = _AWS_HOST.fullmatch(parts.hostname)
        region = (match["region"] or match["legacy"]) if match else None
        connect = _connector(url, endpoint_url, region)
        # A stalled call must not cost the heartbeat the messages that it is there to keep.
        call_s = min(max(visibility_s / 4, 1.0), _MOST_EXTEND_S)
        self._receiving = connect(LONG_POLL_S + _POLL_SLACK_S, ATTEMPTS)
        self._calling = connect(_MOST_CALL_S, ATTEMPTS)
        self._extending = connect(call_s, _EXTEND_ATTEMPTS)
        self._pools = {
            name: ThreadPoolExecutor(_CALLS_AT_ONCE, thread_name_prefix=name)
            for name in ("extend", "settle")
        }

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
        for client in (self._receiving, self._calling, self._extending):
            client.close()

    def attributes(self) -> Mapping[str, str]:
        """All attributes of the queue.

        Raises:
            ConfigError: there is no such queue, or we may not ask.
        """
        with self._errors():
            reply = self._calling.get_queue_attributes(QueueUrl=self.url, AttributeNames=["All"])
        return {str(name): value for name, value in reply.get("Attributes", {}).items()}

    def depth(self) -> Depth:
        found = self.attributes()
        numbers = (
            int(found.get(f"ApproximateNumberOfMessages{kind}", 0))
            for kind in ("", "NotVisible", "Delayed")
        )
        return Depth(*numbers)

    def receive(self, most: int, wait_s: int) -> list[Delivery]:
        """Up to ten messages; none where none came within `wait_s`, or too many are in flight.

        Raises:
            QueueError, ConfigError: the call failed, also after retries.
        """
        # One name for all attempts of this call: after a lost reply the same messages come again.
        extra: Any = {"ReceiveRequestAttemptId": uuid.uuid4().hex} if self.is_fifo else {}
        asked_s = time.monotonic()
        try:
            with self._errors():
                reply = self._receiving.receive_message(
                    QueueUrl=self.url,
                    MaxNumberOfMessages=most,
                    WaitTimeSeconds=wait_s,
                    VisibilityTimeout=self.visibility_s,
                    MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
                    **extra,
                )
        except _OverLimitError as error:
            log.warning("%s", error)
            time.sleep(_jittered(_ENTRY_ATTEMPTS))
            return []
        now = time.monotonic()
        # What took longer than the poll may be the way back: the time of the messages runs already.
        taken_s = min(now, asked_s + wait_s)
        return [
            Delivery(
                message_id=message["MessageId"],
                receipt_handle=message["ReceiptHandle"],
                body=message["Body"],
                receive_count=int(message.get("Attributes", {}).get("ApproximateReceiveCount", 1)),
                sent_s=int(message.get("Attributes", {}).get("SentTimestamp", 0)) / 1000,
                received_s=now,
                visible_s=taken_s + self.visibility_s,
                size_bytes=len(message["Body"]),
            )
            for message in reply.get("Messages", [])
            if self._is_whole(message)
        ]

    def _is_whole(self, message: Mapping[str, Any]) -> bool:
        """Whether a body is what the queue holds. Else it comes again, like one of a lost reply."""
        body = message["Body"].encode("utf-8", "surrogatepass")
        digest = hashlib.md5(body, usedforsecurity=False).hexdigest()
        if message.get("MD5OfBody", digest) == digest:
            return True
        log.warning(
            "%s: the body of message %s was damaged on its way here; it comes again",
            self.name,
            message["MessageId"],
        )
        return False

    def delete(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:
        """Delete messages; those that could not be deleted, by position."""

        def call(entries: Sequence[tuple[str, str]]) -> Any:
            return self._calling.delete_message_batch(
                QueueUrl=self.url,
                Entries=[{"Id": name, "ReceiptHandle": handle} for name, handle in entries],
            )

        return self._in_batches("settle", receipt_handles, call, _ENTRY_ATTEMPTS)

    def release(
        self, receipt_handles: Sequence[str], delays_s: Sequence[int], *, in_haste: bool = False
    ) -> dict[int, Refusal]:
        """Make messages visible after so many seconds; those that could not be, by position.

        Args:
            receipt_handles: of the messages.
            delays_s: of each of them.
            in_haste: give up soon, since the process is about to end.
        """
        client = self._extending if in_haste else self._calling

        def call(entries: Sequence[tuple[str, tuple[str, int]]]) -> Any:
            return self._change_visibility(client, entries)

        receipts = list(zip(receipt_handles, delays_s, strict=True))
        return self._in_batches("settle", receipts, call, _ENTRY_ATTEMPTS)

    def extend(self, receipt_handles: Sequence[str]) -> dict[int, Refusal]:
        """Hide messages for another `visibility_s`; those that could not be, by position.

        There is little time, so a batch that fails as a whole does not keep the others waiting.
        """

        def call(entries: Sequence[tuple[str, str]]) -> Any:
            timed = [(name, (handle, self.visibility_s)) for name, handle in entries]
            try:
                with self._errors():
                    return self._change_visibility(self._extending, timed)
            except QueueError as error:
                return {"Failed": [{"Id": name, "Unanswered": str(error)} for name, _ in entries]}

        return self._in_batches("extend", receipt_handles, call, 1)

    def send(self, bodies: Sequence[str], groups: Sequence[str], names: Sequence[str]) -> None:
        """Send messages, in batches; entries that fail are sent again.

        Args:
            bodies: of the messages.
            groups: on a FIFO queue, the message group of each.
            names: on a FIFO queue, what tells a message from others: a repeat is dropped by SQS.

        Raises:
            QueueError, ConfigError: some were not sent.
        """

        def call(entries: Sequence[tuple[str, tuple[str, str, str]]]) -> Any:
            fifo = [
                {"MessageGroupId": group, "MessageDeduplicationId": name} if self.is_fifo else {}
                for _, (_, group, name) in entries
            ]
            return self._calling.send_message_batch(
                QueueUrl=self.url,
                Entries=[
                    {"Id": name, "MessageBody": body, **more}  # type: ignore[typeddict-item]
                    for (name, (body, _, _)), more in zip(entries, fifo, strict=True)
                ],
            )

        every = list(zip(bodies, groups, names, strict=True))
        failed = self._in_batches("settle", every, call, _ENTRY_ATTEMPTS)
        if failed:
            reason = next(iter(failed.values()))
            raise QueueError(
                f"{self.url}: {len(failed)} of {len(every)} messages were not taken ({reason}); "
                "run the same command again"
            )

    def _change_visibility(
        self, client: "SQSClient", entries: Sequence[tuple[str, tuple[str, int]]]
    ) -> Any:
        return client.change_message_visibility_batch(
            QueueUrl=self.url,
            Entries=[
                {"Id": name, "ReceiptHandle": handle, "VisibilityTimeout": seconds}
                for name, (handle, seconds) in entries
            ],
        )

    def _in_batches(
        self, pool: str, values: Sequence[Any], call: Callable[[Any], Any], attempts: int
    ) -> dict[int, Refusal]:
        """Call for ten values at a time, several batches at once; the values that failed."""

        def one(first: int) -> dict[int, Refusal]:
            entries = [
                (str(place), values[place])
                for place in range(first, min(first + BATCH_ENTRIES, len(values)))
            ]
            return self._batch(entries, call, attempts)

        starts = range(0, len(values), BATCH_ENTRIES)
        if len(starts) == 1:
            return one(0)
        failed: dict[int, Refusal] = {}
        for found in self._pools[pool].map(one, starts):
            failed |= found
        return failed

    def _batch(
        self, entries: Sequence[tuple[str, Any]], call: Callable[[Any], Any], attempts: int
    ) -> dict[int, Refusal]:
        """One batch call, made again for the entries that failed and may not fail the next time."""
        final: dict[int, Refusal] = {}
        for attempt in range(1, attempts + 1):
            with self._errors():
                reply = call(entries)
            failed = {int(entry["Id"]): _refusal(entry) for entry in reply.get("Failed", [])}
            again = {place for place, refusal in failed.items() if not refusal.is_final}
            if not again or attempt == attempts:
                return final | failed
            final |= {place: why for place, why in failed.items() if why.is_final}
            entries = [entry for entry in entries if int(entry[0]) in again]
            time.sleep(_jittered(attempt))
        raise AssertionError  # the last attempt returns

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise _translate(error, self.url) from error
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError) as error:
            raise CredentialsError(
                f"{self.url}: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, or give the machine a role"
            ) from error
        except (BotoConnectionError, HTTPClientError) as error:
            raise QueueError(f"{self.url}: {error}") from error
        except BotoCoreError as error:
            raise ConfigError(f"{self.url}: {error}") from error


class _OverLimitError(QueueError):
    """More messages are in flight than the queue allows; they have to be deleted first."""


def _connector(
    url: str, endpoint_url: str, region: str | None
) -> Callable[[float, int], "SQSClient"]:
    """What makes a client, given the seconds that a reply may take and the number of attempts."""

    def connect(read_timeout_s: float, attempts: int) -> "SQSClient":
        config = Config(
            connect_timeout=min(_CONNECT_TIMEOUT_S, read_timeout_s),
            read_timeout=read_timeout_s,
            retries=ONE_ATTEMPT,
            parameter_validation=False,  # a twentieth of the time of a call, and all are made here
            max_pool_connections=2 * _CALLS_AT_ONCE,
            user_agent=f"batchclf Boto3/{boto3.__version__}",  # else made anew: a tenth of a call
            tcp_keepalive=True,
        )
        try:
            client = session.client(
                "sqs", endpoint_url=endpoint_url, region_name=region, config=config
            )
        except NoRegionError as error:
            raise ConfigError(f"{url}: {error} Set AWS_REGION.") from error
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"{url}: {error}") from error
        retry(client, attempts)
        return client

    session = boto3.session.Session()
    # boto3 itself reads AWS_DEFAULT_REGION alone
    region = region or os.environ.get("AWS_REGION") or None
    return connect


def _jittered(attempt: int) -> float:
    """Seconds to wait after the n-th attempt: random, up to twice as many each time."""
    return random.uniform(0, _ENTRY_WAIT_S * 2**attempt)


_NO_QUEUE = {"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "InvalidAddress"}
_OVER_LIMIT = {"OverLimit", "AWS.SimpleQueueService.OverLimit"}


def _refusal(entry: Mapping[str, Any]) -> Refusal:
    if "Unanswered" in entry:
        return Refusal("", entry["Unanswered"], is_final=False, is_answered=False)
    code = str(entry.get("Code", ""))
    is_final = bool(entry.get("SenderFault")) and code not in THROTTLED
    return Refusal(code, str(entry.get("Message", "")), is_final)


def _translate(error: ClientError, url: str) -> BatchclfError:
    code, status = code_of(error), status_of(error)
    said = f"{code} {error.response.get('Error', {}).get('Message', '')}".strip()
    if code in BAD_CREDENTIALS:
        return CredentialsError(f"{url}: the credentials are not accepted ({said}); renew them")
    if code in _NO_QUEUE:
        return ConfigError(f"{url}: there is no such queue")
    if code in _OVER_LIMIT:
        return _OverLimitError(f"{url}: too many messages are in flight ({said})")
    if may_pass(code, status):
        return QueueError(f"{url}: the queue keeps answering {status} {said}; try again later")
    return ConfigError(f"{url}: the queue answered {status} {said}")
