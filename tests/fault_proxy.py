"""An HTTP/1.1 reverse proxy: all passes unchanged, except where a test asks otherwise.

    with FaultProxy(server.endpoint_url) as proxy:
        storm = proxy.add(Fault(Match(operation="PutObject"), Status(503), times=3))
        ...
        assert proxy.hits(storm) == 3

The Host header is passed on as the client wrote it, so signatures (AWS SigV4) stay valid and URLs
that a server builds from it (SQS queue URLs) lead through the proxy. Bodies are streamed, but for
the actions that need all of one in memory: Delay, Hold, LoseReply, Truncate, Flip*, Edit.
"""

import http.client
import json
import random
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

from fault_rules import (
    Action,
    Delay,
    Edit,
    Exchange,
    Fault,
    FlipReply,
    FlipRequest,
    Forward,
    Hold,
    LoseReply,
    Match,
    Request,
    Reset,
    Status,
    Truncate,
)

CHUNK_BYTES = 1 << 16
UPSTREAM_TIMEOUT_S = 120.0
MAX_LINE_BYTES = 1 << 16

# RFC 9110 section 7.6.1: these belong to one connection. Expect is answered by the proxy itself.
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "upgrade", "expect"}

# Error codes that S3 and SQS send with a status, unless the test names another.
S3_CODES = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    500: "InternalError",
    503: "SlowDown",
}
SQS_CODES = {
    400: "InvalidParameterValue",
    403: "AccessDenied",
    500: "InternalFailure",
    503: "ServiceUnavailable",
}


@dataclass
class _Armed:
    """A fault with its counts."""

    fault: Fault
    active: bool = True
    num_matched: int = 0
    num_fired: int = 0
    reached: list[Exchange] = field(default_factory=list)


class FaultProxy:
    """The proxy; a context manager that serves from threads of this process.

    The first fault added that fits and is not used up decides about a request. `probability` is
    drawn from a generator seeded with `seed`. Errors inside the proxy are raised by `close()`.
    """

    def __init__(self, upstream_url: str, *, seed: int = 0) -> None:
        parts = urlsplit(upstream_url)
        if parts.hostname is None or parts.port is None:
            raise ValueError(f"{upstream_url}: need http://host:port")
        self.upstream = (parts.hostname, parts.port)
        self.errors: list[BaseException] = []
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._armed: dict[Fault, _Armed] = {}
        self._log: list[Exchange] = []
        self._num_under_way = 0
        self._sockets: set[socket.socket] = set()
        self.closing = threading.Event()
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="fault-proxy"
        )

    @property
    def endpoint_url(self) -> str:
        """Where clients connect."""
        host, port = cast("tuple[str, int]", self._server.server_address)
        return f"http://{host}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset what is held, cut every connection, wait for the threads."""
        self._server.shutdown()
        self._thread.join()
        self.closing.set()
        self.clear()
        with self._changed:
            for open_socket in self._sockets:
                with suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        if self.errors:
            raise RuntimeError("the fault proxy failed") from self.errors[0]

    def add(self, fault: Fault) -> Fault:
        """Arm a fault; returns it, for `hits` and `wait_for`."""
        with self._changed:
            self._armed[fault] = _Armed(fault)
        return fault

    def clear(self) -> None:
        """Disarm all faults and reset what they hold; the log and the counts stay."""
        with self._changed:
            armed = list(self._armed.values())
            for entry in armed:
                entry.active = False
        for entry in armed:
            if isinstance(entry.fault.action, Hold):
                entry.fault.action.drop()

    def hits(self, fault: Fault) -> int:
        """How often the fault has taken effect."""
        with self._changed:
            return len(self._armed[fault].reached)

    def wait_for(self, fault: Fault, timeout: float = 30.0, times: int = 1) -> Exchange:
        """Block until the fault has taken effect so often; returns that exchange.

        Raises:
            TimeoutError: it did not happen in time; the message lists the requests seen.
        """
        with self._changed:
            reached = self._armed[fault].reached
            if not self._changed.wait_for(lambda: len(reached) >= times, timeout):
                seen = "\n".join(map(str, self._log)) or "none"
                raise TimeoutError(
                    f"{fault} took effect {len(reached)} of {times} times in {timeout} s; "
                    f"requests seen:\n{seen}"
                )
            return reached[times - 1]

    def log(self, match: Match | None = None) -> list[Exchange]:
        """Return the exchanges so far (those that fit) in the order in which requests arrived."""
        with self._changed:
            return [e for e in self._log if match is None or match.fits(e.request)]

    def wait_until_idle(self, timeout: float = 30.0) -> None:
        """Block until no request is under way, as after the release of a held one.

        Raises:
            TimeoutError: one still is.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_under_way == 0, timeout):
                raise TimeoutError(f"{self._num_under_way} requests under way after {timeout} s")

    @contextmanager
    def under_way(self, request: Request) -> Iterator[Exchange]:
        """Log a request and choose its fault."""
        with self._changed:
            exchange = Exchange(request, self._choose(request))
            self._log.append(exchange)
            self._num_under_way += 1
        try:
            yield exchange
        finally:
            with self._changed:
                self._num_under_way -= 1
                self._changed.notify_all()

    def _choose(self, request: Request) -> Fault | None:
        for entry in self._armed.values():
            fault = entry.fault
            used_up = fault.times is not None and entry.num_fired >= fault.times
            if not entry.active or used_up or not fault.match.fits(request):
                continue
            entry.num_matched += 1
            if entry.num_matched <= fault.skip or self._random.random() >= fault.probability:
                continue
            entry.num_fired += 1
            return fault
        return None

    def reach(self, exchange: Exchange) -> None:
        """Note that the exchange's fault takes effect now."""
        fault = exchange.fault
        if fault is None:
            return
        if fault.on_match is not None:
            fault.on_match(exchange)
        with self._changed:
            self._armed[fault].reached.append(exchange)
            self._changed.notify_all()

    @contextmanager
    def tracked(self, open_socket: socket.socket) -> Iterator[None]:
        """Have `close()` cut this socket, so that no thread stays blocked on it."""
        with self._changed:
            self._sockets.add(open_socket)
            if self.closing.is_set():
                with suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)
        try:
            yield
        finally:
            with self._changed:
                self._sockets.discard(open_socket)


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    request_queue_size = 128
    daemon_threads = False  # server_close() joins them

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Connection)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """Keep what a handler did not expect; FaultProxy.close() raises it."""
        error = sys.exc_info()[1]
        if error is not None:
            self.proxy.errors.append(error)


class _ResetError(Exception):
    """Reset the client's connection."""


class _ClientGoneError(Exception):
    """The client hung up in the middle of its request."""


@dataclass
class _Reply:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: Iterable[bytes]
    num_bytes: int | None = None  # of the body; None: unknown until it ends
    chunked: bool = False
    truncated: bool = False  # the body stops short; close the connection after it


class _Connection(socketserver.StreamRequestHandler):
    """One client connection: requests one after another."""

    disable_nagle_algorithm = True
    _body_read = False  # a request that is not read to its end spoils the connection

    @property
    def proxy(self) -> FaultProxy:
        return cast("_Server", self.server).proxy

    def handle(self) -> None:
        with self.proxy.tracked(self.connection):
            try:
                while self._serve_one():
                    pass
            except (_ResetError, http.client.HTTPException):
                self._reset()
            except (_ClientGoneError, OSError):
                pass

    def _reset(self) -> None:
        """Have the kernel send RST when the last reference is closed, by finish()."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _serve_one(self) -> bool:
        """Serve one request; False when the connection is done."""
        line = self.rfile.readline(MAX_LINE_BYTES)
        if not line:
            return False
        method, target, version = line.decode("latin-1").split()
        request = Request(method, target, http.client.parse_headers(self.rfile))
        self._body_read = False
        with self.proxy.under_way(request) as exchange:
            persistent = self._exchange(exchange)
        wants_close = version == "HTTP/1.0" or request.headers.get("Connection") == "close"
        return persistent and self._body_read and not wants_close

    def _exchange(self, exchange: Exchange) -> bool:
        """Apply the fault and reply; False when the connection must be closed to end the reply."""
        request = exchange.request
        action = Forward() if exchange.fault is None else exchange.fault.action
        if isinstance(action, Reset):
            self.proxy.reach(exchange)
            raise _ResetError
        body = self._request_body(request)
        if isinstance(action, Status):
            for _ in body:
                pass
            self.proxy.reach(exchange)
            return self._send(exchange, _injected(action, request))
        with self._forward(exchange, self._before(exchange, action, body)) as reply:
            self._after(exchange, action, reply)
            return self._send(exchange, reply)

    def _request_body(self, request: Request) -> Iterator[bytes]:
        """Yield the body as it is on the wire, chunk framing and trailers included."""
        if request.headers.get("Expect", "").lower() == "100-continue":
            with suppress(OSError):  # a client that is gone shows when its body is read
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.headers.get("Transfer-Encoding", "").lower() == "chunked":
            size = -1
            while size != 0:
                line = self._line()
                size = int(line.partition(b";")[0], 16)
                yield line
                if size:
                    yield self._exactly(size + 2)
            while line != b"\r\n":
                line = self._line()
                yield line
        else:
            left = int(request.headers.get("Content-Length", 0))
            while left:
                piece = self._exactly(min(left, CHUNK_BYTES))
                left -= len(piece)
                yield piece
        self._body_read = True

    def _line(self) -> bytes:
        try:
            line = self.rfile.readline(MAX_LINE_BYTES)
        except OSError as error:
            raise _ClientGoneError from error
        if not line.endswith(b"\n"):
            raise _ClientGoneError
        return line

    def _exactly(self, size: int) -> bytes:
        try:
            piece = self.rfile.read(size)
        except OSError as error:
            raise _ClientGoneError from error
        if len(piece) != size:
            raise _ClientGoneError
        return piece

    def _before(self, exchange: Exchange, action: Action, body: Iterable[bytes]) -> Iterable[bytes]:
        """Apply what comes before forwarding; returns the body to forward."""
        headers = exchange.request.headers
        match action:
            case Forward():
                self.proxy.reach(exchange)
            case Delay(after=False):
                body = list(body)
                self.proxy.reach(exchange)
                self.proxy.closing.wait(action.seconds)
            case Hold(moment="before"):
                body = list(body)
                self._hold(exchange, action)
            case FlipRequest():
                body = [_flip_payload(b"".join(body), headers, action.index)]
                self.proxy.reach(exchange)
            case Edit(request=edit) if edit is not None:
                edited = edit(b"".join(body))
                del headers["Content-Length"]
                headers["Content-Length"] = str(len(edited))
                body = [edited]
        return body

    def _hold(self, exchange: Exchange, hold: Hold) -> None:
        self.proxy.reach(exchange)
        if not hold.wait():
            raise _ResetError

    @contextmanager
    def _forward(self, exchange: Exchange, body: Iterable[bytes]) -> Iterator[_Reply]:
        """Send the request to the server; yields its reply, body still to be read.

        A server that cannot be reached or hangs up looks to the client as without the proxy.
        """
        request = exchange.request
        host, port = self.proxy.upstream
        upstream = http.client.HTTPConnection(host, port, timeout=UPSTREAM_TIMEOUT_S)
        with closing(upstream):
            try:
                upstream.connect()
                upstream_socket = cast("socket.socket", upstream.sock)
            except OSError as error:
                raise _ResetError from error
            with self.proxy.tracked(upstream_socket):
                try:
                    answer = _ask(upstream, request, body)
                except (OSError, http.client.HTTPException) as error:
                    raise _ResetError from error
                with closing(answer):
                    exchange.server_status = answer.status
                    yield _reply_of(answer, request.method)

    def _after(self, exchange: Exchange, action: Action, reply: _Reply) -> None:
        """Apply what comes between the server's reply and ours; changes the reply."""
        match action:
            case LoseReply():
                _read_all(reply)
                self.proxy.reach(exchange)
                raise _ResetError
            case Delay(after=True):
                _read_all(reply)
                self.proxy.reach(exchange)
                self.proxy.closing.wait(action.seconds)
            case Hold(moment="after"):
                _read_all(reply)
                self._hold(exchange, action)
            case Hold(moment="body"):
                whole = _read_all(reply)
                reply.body = self._halves(exchange, action, whole)
            case Truncate():
                whole = _read_all(reply)
                reply.body = [whole[: int(len(whole) * action.keep)]]
                reply.truncated = True
                self.proxy.reach(exchange)
            case FlipReply():
                reply.body = [_flip(_read_all(reply), action.index)]
                self.proxy.reach(exchange)
            case Edit():
                whole = _read_all(reply)
                edited = whole if action.reply is None else action.reply(whole)
                reply.body, reply.num_bytes, reply.chunked = [edited], len(edited), False
                self.proxy.reach(exchange)

    def _halves(self, exchange: Exchange, hold: Hold, whole: bytes) -> Iterator[bytes]:
        middle = len(whole) // 2
        yield whole[:middle]
        self._hold(exchange, hold)
        yield whole[middle:]

    def _send(self, exchange: Exchange, reply: _Reply) -> bool:
        """Send a reply; False when the connection must be closed to end it."""
        exchange.status = reply.status
        has_body = exchange.request.method != "HEAD" and reply.status not in (204, 304)
        headers = list(reply.headers)
        if reply.chunked:
            headers.append(("Transfer-Encoding", "chunked"))
        elif reply.num_bytes is not None:
            headers.append(("Content-Length", str(reply.num_bytes)))
        elif has_body:
            headers.append(("Connection", "close"))
        lines = [f"HTTP/1.1 {reply.status} {reply.reason}", *(f"{n}: {v}" for n, v in headers)]
        self.wfile.write("".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1"))
        if not has_body:
            return True
        num_sent = 0
        for piece in reply.body:
            num_sent += len(piece)
            if reply.chunked and piece:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            else:
                self.wfile.write(piece)
        if reply.chunked and not reply.truncated:
            self.wfile.write(b"0\r\n\r\n")
            return True
        return num_sent == reply.num_bytes


def _ask(
    upstream: http.client.HTTPConnection, request: Request, body: Iterable[bytes]
) -> http.client.HTTPResponse:
    upstream.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
    for name, value in request.headers.items():
        if name.lower() not in HOP_BY_HOP:
            upstream.putheader(name, value)
    upstream.putheader("Connection", "close")
    upstream.endheaders()
    # A server may answer and hang up before it has read all; its answer can still be read then.
    with suppress(BrokenPipeError, ConnectionResetError):
        for piece in body:
            upstream.send(piece)
    return upstream.getresponse()


def _reply_of(answer: http.client.HTTPResponse, method: str) -> _Reply:
    framing = HOP_BY_HOP | {"transfer-encoding", "content-length"}
    length = answer.headers.get("Content-Length")
    return _Reply(
        status=answer.status,
        reason=answer.reason,
        headers=[(n, v) for n, v in answer.headers.items() if n.lower() not in framing],
        body=iter(lambda: answer.read(CHUNK_BYTES), b""),
        num_bytes=None if length is None else int(length),
        chunked=bool(answer.chunked) and method != "HEAD",
    )


def _read_all(reply: _Reply) -> bytes:
    whole = b"".join(reply.body)
    reply.body = [whole]
    return whole


def _flip(body: bytes, index: int | None) -> bytes:
    """Flip the lowest bit of one byte (default: the middle one); an empty body stays as it is."""
    if not body:
        return body
    flipped = bytearray(body)
    flipped[len(body) // 2 if index is None else index] ^= 1
    return bytes(flipped)


def _flip_payload(body: bytes, headers: http.client.HTTPMessage, index: int | None) -> bytes:
    """Flip a bit inside the payload: of a chunked body (HTTP's or AWS's) inside its first chunk."""
    encodings = (headers.get("Transfer-Encoding", ""), headers.get("Content-Encoding", ""))
    if not any("chunked" in encoding.lower() for encoding in encodings):
        return _flip(body, index)
    line, newline, rest = body.partition(b"\r\n")
    size = int(line.partition(b";")[0], 16)
    return line + newline + _flip(rest[:size], index) + rest[size:]


def _injected(action: Status, request: Request) -> _Reply:
    if request.amz_target:
        code = action.code or SQS_CODES.get(action.status, "InternalFailure")
        blame = "Receiver" if action.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR else "Sender"
        headers = {
            "Content-Type": "application/x-amz-json-1.0",
            "x-amzn-query-error": f"{code};{blame}",
        }
        text = json.dumps({"__type": f"com.amazonaws.sqs#{code}", "message": action.message})
    else:
        code = action.code or S3_CODES.get(action.status, "InternalError")
        headers = {"Content-Type": "application/xml"}
        text = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{escape(code)}</Code><Message>{escape(action.message)}</Message>"
            f"<Resource>{escape(request.path)}</Resource></Error>"
        )
    body = text.encode() if action.body is None else action.body
    return _Reply(
        status=action.status,
        reason=http.client.responses.get(action.status, "Injected"),
        headers=list((headers | dict(action.headers)).items()),
        body=[body],
        num_bytes=len(body),
    )
