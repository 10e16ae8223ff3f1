"""What a test tells the fault proxy: which requests (`Match`), what to do (an action), how often.

An action takes effect at one of these moments, and that is when `FaultProxy.wait_for` returns:

    head read    request read     server replied     half the reply sent
    ---------    ------------     --------------     -------------------
    Reset        Forward          LoseReply          Hold("body")
                 Status           Delay(after)
                 Delay            Hold("after")
                 Hold             Truncate
                 FlipRequest      FlipReply, Edit
"""

import http.client
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qs, unquote

# (is there a key?, method, query argument or "") -> operation, as AWS names them.
S3_OPERATIONS = {
    (True, "GET", "uploadId"): "ListParts",
    (True, "GET", "attributes"): "GetObjectAttributes",
    (True, "GET", ""): "GetObject",
    (True, "HEAD", ""): "HeadObject",
    (True, "PUT", "partNumber"): "UploadPart",
    (True, "PUT", ""): "PutObject",
    (True, "POST", "uploads"): "CreateMultipartUpload",
    (True, "POST", "uploadId"): "CompleteMultipartUpload",
    (True, "DELETE", "uploadId"): "AbortMultipartUpload",
    (True, "DELETE", ""): "DeleteObject",
    (False, "GET", "list-type"): "ListObjectsV2",
    (False, "GET", "uploads"): "ListMultipartUploads",
    (False, "GET", ""): "ListObjects",
    (False, "HEAD", ""): "HeadBucket",
    (False, "PUT", ""): "CreateBucket",
    (False, "POST", "delete"): "DeleteObjects",
    (False, "DELETE", ""): "DeleteBucket",
}


@dataclass(frozen=True)
class Request:
    """The head of a request; `path` is percent-decoded, `headers` ignore case."""

    method: str
    target: str
    headers: http.client.HTTPMessage

    @property
    def path(self) -> str:
        """Path without the query, decoded."""
        return unquote(self.target.partition("?")[0])

    @property
    def query(self) -> dict[str, str]:
        """Query arguments; of a repeated one the last."""
        found = parse_qs(self.target.partition("?")[2], keep_blank_values=True)
        return {name: values[-1] for name, values in found.items()}

    @property
    def amz_target(self) -> str:
        """`X-Amz-Target`, such as `AmazonSQS.ReceiveMessage`; empty for S3."""
        return self.headers.get("X-Amz-Target", "")

    @property
    def operation(self) -> str:
        """What AWS calls it: `PutObject`, `ReceiveMessage`, ...; the method when it is neither."""
        if self.amz_target:
            return self.amz_target.rpartition(".")[2]
        has_key = bool(self.path.lstrip("/").partition("/")[2])
        for argument in (*self.query, ""):
            if (has_key, self.method, argument) in S3_OPERATIONS:
                return S3_OPERATIONS[has_key, self.method, argument]
        return self.method


@dataclass
class Exchange:
    """One request and what became of it.

    `server_status` is what the server answered (None: it was not asked, or gave no answer) and
    `status` what the client was sent (None: nothing, the connection was reset).
    """

    request: Request
    fault: "Fault | None" = None
    server_status: int | None = None
    status: int | None = None

    def __str__(self) -> str:
        return f"{self.request.method} {self.request.target} -> {self.server_status}/{self.status}"


@dataclass(frozen=True)
class Match:
    """Which requests; every field that is given must fit.

    `path`, `amz_target` and the values of `query` and `headers` are regular expressions that are
    searched for, `path` in the decoded path. `method` and `operation` are compared whole.
    """

    operation: str | None = None
    method: str | None = None
    path: str = ""
    amz_target: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def fits(self, request: Request) -> bool:
        """Whether the request is one of those meant."""
        query = request.query
        return (
            self.method in (None, request.method)
            and self.operation in (None, request.operation)
            and re.search(self.path, request.path) is not None
            and re.search(self.amz_target, request.amz_target) is not None
            and all(n in query and re.search(p, query[n]) for n, p in self.query.items())
            and all(
                n in request.headers and re.search(p, request.headers[n])
                for n, p in self.headers.items()
            )
        )


@dataclass(frozen=True)
class Forward:
    """Change nothing; for `wait_for` and `on_match`."""


@dataclass(frozen=True)
class Status:
    """Answer with this status instead of the server: XML for S3, JSON for SQS.

    `code` is the error code (default: the usual one of the status), `body` replaces all of it.
    """

    status: int
    code: str | None = None
    message: str = "injected by the fault proxy"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


@dataclass(frozen=True)
class Reset:
    """Reset the connection (TCP RST) as soon as the head is read; the server sees nothing."""


@dataclass(frozen=True)
class LoseReply:
    """Let the server do it, then reset the connection instead of replying."""


@dataclass(frozen=True)
class Delay:
    """Wait before forwarding, or with `after` before replying."""

    seconds: float
    after: bool = False


@dataclass(frozen=True)
class Truncate:
    """Announce the whole body, send this share of it, close."""

    keep: float = 0.5


@dataclass(frozen=True)
class FlipReply:
    """Flip the lowest bit of one byte of the reply's body (default: the middle one)."""

    index: int | None = None


@dataclass(frozen=True)
class FlipRequest:
    """Flip the lowest bit of one byte of the request's payload (default: the middle one)."""

    index: int | None = None


@dataclass(frozen=True)
class Edit:
    """Pass the bodies through functions, lengths adapted; not for chunked requests."""

    request: Callable[[bytes], bytes] | None = None
    reply: Callable[[bytes], bytes] | None = None


class Hold:
    """Hold requests until the test calls `release()` (go on) or `drop()` (reset the connection).

    `"before"`: the request has arrived whole, the server has seen nothing of it; a release forwards
    it even when the client is dead by then, as the network would.
    `"after"`: the server has replied, the client has seen nothing.
    `"body"`: the client has the head and half of the body of the reply.
    """

    def __init__(self, moment: Literal["before", "after", "body"] = "before") -> None:
        self.moment = moment
        self._decided = threading.Event()
        self._goes_on = False

    def release(self) -> None:
        """Let held and later requests go on."""
        self._goes_on = True
        self._decided.set()

    def drop(self) -> None:
        """Reset the connections of held and later requests."""
        self._decided.set()

    def wait(self) -> bool:
        """Block until the test decides; True to go on."""
        self._decided.wait()
        return self._goes_on


Action = (
    Forward | Status | Reset | LoseReply | Delay | Truncate | FlipReply | FlipRequest | Edit | Hold
)


@dataclass(frozen=True, eq=False)
class Fault:
    """An action for matching requests: after `skip` of them, at most `times` (None: always).

    `on_match` is called on the proxy's thread at the moment the action takes effect, before it.
    """

    match: Match
    action: Action
    times: int | None = None
    skip: int = 0
    probability: float = 1.0
    on_match: Callable[[Exchange], None] | None = None
