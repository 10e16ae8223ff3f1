"""Messages, and what stands between a worker and its queue."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
from fault_proxy import FaultProxy
from fault_rules import Edit, Fault, Match
from faults.commands import Run
from faults.places import S3Place
from servers import Queue

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

# Of a message that is held. Short, so that what a dead worker held comes again soon.
VISIBILITY_S = 4
# Longer than that and than the delays of a message that is tried again, all in one.
IDLE_S = 7
UNTIL_IDLE = ("--idle-exit", str(IDLE_S))
# A message with this timeout that is there again soon was given back.
HELD_FOR_LONG = ("--visibility-timeout", "600")
# So long that the heart has nothing to do while a test runs.
NEVER_EXTENDED = HELD_FOR_LONG
DEPTH_DEADLINE_S = 20.0
POLL_S = 0.05

RECEIVE = Match(operation="ReceiveMessage")
HEARTBEAT = Match(operation="ChangeMessageVisibilityBatch")
DELETE = Match(operation="DeleteMessageBatch")

# What no worker can do.
JUNK = (
    "not JSON",
    "[]",
    "5",
    '{"id": "an article without its text"}',
    '{"batchclf": 2, "source": "s3://news/in/a.csv", "etag": "a", "rows": [0, 1]}',
    '{"batchclf": 1, "source": "s3://elsewhere/in/a.csv", "etag": "a", "rows": [0, 1]}',
    '{"batchclf": 1, "source": "file:///etc/passwd", "etag": "a", "rows": [0, 1]}',
    '["com.amazon.sqs.javamessaging.MessageS3Pointer", {"s3BucketName": "b", "s3Key": "k"}]',
    json.dumps({"Type": "Notification", "TopicArn": "arn:aws:sns:x:1:t", "Message": "hello"}),
)


class Work(Protocol):
    """Run `batchclf work` to its end, with short times and `s3://bucket/in` allowed."""

    def __call__(
        self, place: S3Place, queue: Queue, *args: str, env: Mapping[str, str] | None = None
    ) -> Run: ...


class StartWork(Protocol):
    """Start `batchclf work`; see `end_of`."""

    def __call__(
        self, place: S3Place, queue: Queue, *args: str, model: "Path | None" = None
    ) -> "subprocess.Popen[str]": ...


def article_messages(table: pa.Table) -> list[str]:
    """The body of an article's message for each row."""
    return [json.dumps(row) for row in table.to_pylist()]


def shard_message(place: S3Place, uri: str, num_rows: int) -> str:
    """All rows of an object, as `enqueue` says it."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    etag = place.server.s3.head_object(Bucket=bucket, Key=key)["ETag"]
    return json.dumps({"batchclf": 1, "source": uri, "etag": etag, "rows": [0, num_rows]})


def notify(place: S3Place, queue: Queue) -> None:
    """Have the server tell the queue of every new object under `in/`, as S3 does."""
    rules = [{"Name": "prefix", "Value": "in/"}]
    place.server.s3.put_bucket_notification_configuration(
        Bucket=place.bucket,
        NotificationConfiguration={
            "QueueConfigurations": [
                {
                    "QueueArn": queue.arn,
                    "Events": ["s3:ObjectCreated:*"],
                    "Filter": {"Key": {"FilterRules": rules}},  # type: ignore[typeddict-item]
                }
            ]
        },
    )


def wait_for_visible(queue: Queue, count: int) -> None:
    """Wait until so many messages can be received; fail if that does not come."""
    deadline = time.monotonic() + DEPTH_DEADLINE_S
    while (backlog := queue.backlog()).num_visible != count:
        assert time.monotonic() < deadline, backlog
        time.sleep(POLL_S)


def each_message_once(place: S3Place) -> dict[str, str]:
    """By message id, the `id` of the rows labelled for it: all rows of a message are alike."""
    rows = place.rows()
    found: dict[str, str] = {}
    for message_id, name in zip(
        rows["message_id"].to_pylist(), rows["id"].to_pylist(), strict=True
    ):
        assert found.setdefault(message_id, name) == name
    return found


@dataclass
class BatchSpy:
    """Notes the entries of a batch call, and makes some of them fail.

    An entry that fails never comes to the server with a receipt handle that it knows.

    Attributes:
        match: the call.
        fails: whether an entry fails, by its receipt handle.
        code, sender_fault: how the server says so.
        seen: receipt handles of all entries, in order; those that failed too.
        timeouts: where the call sets any, the visibility timeouts by receipt handle, in order.
        failed: receipt handles of the entries that failed.
    """

    match: Match
    fails: Callable[[str], bool] = lambda _: False
    code: str = "InternalError"
    sender_fault: bool = False
    seen: list[str] = field(default_factory=list)
    timeouts: dict[str, list[int]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._of_this_call = threading.local()
        self.fault = Fault(self.match, Edit(self._request, self._reply))

    def watch(self, proxy: FaultProxy) -> "BatchSpy":
        proxy.add(self.fault)
        return self

    def _request(self, body: bytes) -> bytes:
        call = json.loads(body)
        failing: set[str] = set()
        with self._lock:
            for entry in call["Entries"]:
                handle = entry["ReceiptHandle"]
                self.seen.append(handle)
                if "VisibilityTimeout" in entry:
                    self.timeouts.setdefault(handle, []).append(entry["VisibilityTimeout"])
                if self.fails(handle):
                    failing.add(entry["Id"])
                    self.failed.append(handle)
                    entry["ReceiptHandle"] = f"of-another-time-{entry['Id']}"
        self._of_this_call.failing = failing
        return json.dumps(call).encode()

    def _reply(self, body: bytes) -> bytes:
        failing = self._of_this_call.failing
        if not failing:
            return body
        answer: dict[str, list[dict[str, Any]]] = json.loads(body)
        kept = {
            kind: [entry for entry in answer.get(kind, []) if entry["Id"] not in failing]
            for kind in ("Successful", "Failed")
        }
        kept["Failed"] += [
            {"Id": i, "SenderFault": self.sender_fault, "Code": self.code, "Message": "injected"}
            for i in sorted(failing)
        ]
        return json.dumps(kept).encode()


@dataclass
class ReceiveSpy:
    """Notes what the queue handed out, in order."""

    message_ids: list[str] = field(default_factory=list)
    handles: list[str] = field(default_factory=list)

    def watch(self, proxy: FaultProxy) -> "ReceiveSpy":
        proxy.add(Fault(RECEIVE, Edit(reply=self._reply)))
        return self

    def _reply(self, body: bytes) -> bytes:
        for message in json.loads(body).get("Messages") or []:
            self.message_ids.append(message["MessageId"])
            self.handles.append(message["ReceiptHandle"])
        return body
