"""Calls to SQS as boto3 would make them, and what becomes of replies that are none."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given, strategies as st
from servers import Endpoint, Queue as ServedQueue

from batchclf import retries
from batchclf.errors import ConfigError, CredentialsError, QueueError
from batchclf.sqs import Delivery, Queue
from batchclf.sqs_calls import Caller, OverLimitError, Patience, signed_headers

URL = "https://sqs.eu-west-1.amazonaws.com/1/news"
NOW = "20240229T235959Z"
CALL = "ReceiveMessage"
Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


@given(
    token=st.one_of(st.none(), st.text("abc/+=", min_size=1)),
    secret_key=st.text("abc/+0", min_size=1),
    body=st.binary(max_size=100),
    host=st.sampled_from(["sqs.eu-west-1.amazonaws.com", "127.0.0.1:4566"]),
)
def test_a_call_is_signed_as_botocore_signs_it(
    token: str | None, secret_key: str, body: bytes, host: str
) -> None:
    keys = ReadOnlyCredentials("AKID", secret_key, token)
    ours = signed_headers(keys, "eu-west-1", host, "/", f"AmazonSQS.{CALL}", body, NOW)
    given_headers = {
        name: ours[name] for name in ("content-type", "host", "x-amz-target", "x-amzn-query-mode")
    }
    request = AWSRequest("POST", f"https://{host}/", given_headers, body)
    request.context["timestamp"] = NOW
    auth = SigV4Auth(keys, "sqs", "eu-west-1")
    request.headers["X-Amz-Date"] = NOW
    if token:
        request.headers["X-Amz-Security-Token"] = token
    text = auth.string_to_sign(request, auth.canonical_request(request))
    assert ours["authorization"].endswith(f"Signature={auth.signature(text, request)}")


class Answers:
    """What a server answers, call by call, and what it was asked."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []


@contextmanager
def answering(answers: Answers) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answers.asked.append((dict(self.headers), json.loads(body)))
            status, headers, reply = answers.replies.pop(0)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(reply))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            """Quietly."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one who may call, and no time lost with waits."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(retries, "_MOST_WAIT_S", 0.0)


def call(answers: Answers, attempts: int = 3) -> dict[str, Any]:
    with answering(answers) as endpoint_url:
        caller = Caller(URL, endpoint_url, "eu-west-1", 1)
        try:
            return caller.call(CALL, Patience(10, attempts), MaxNumberOfMessages=3)
        finally:
            caller.close()


OK: Reply = (200, {}, b'{"Messages": []}')


def test_a_call_names_operation_queue_and_parameters() -> None:
    answers = Answers(OK)
    assert call(answers) == {"Messages": []}
    ((headers, body),) = answers.asked
    assert headers["x-amz-target"] == f"AmazonSQS.{CALL}"
    assert headers["content-type"] == "application/x-amz-json-1.0"
    assert body == {"QueueUrl": URL, "MaxNumberOfMessages": 3}


@pytest.mark.parametrize(
    "reply",
    [
        (500, {}, b"<html>oops</html>"),
        (503, {}, b'{"__type": "com.amazonaws.sqs#ServiceUnavailable"}'),
        (400, {}, b'{"__type": "com.amazonaws.sqs#RequestThrottled", "message": "slowly"}'),
        (200, {}, b'{"Messages": [{'),
        (200, {}, b"[]"),
    ],
)
def test_what_may_pass_is_asked_again_as_often_as_allowed(
    reply: Reply,
) -> None:
    answers = Answers(reply, reply, OK)
    assert call(answers) == {"Messages": []}
    answers = Answers(reply, reply, reply, OK)
    with pytest.raises(QueueError):
        call(answers)
    assert len(answers.asked) == 3


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (
            (
                400,
                {"x-amzn-query-error": "AWS.SimpleQueueService.NonExistentQueue;Sender"},
                b'{"__type": "com.amazonaws.sqs#QueueDoesNotExist"}',
            ),
            ConfigError,
            "no such queue",
        ),
        ((400, {}, b'{"__type": "x#QueueDoesNotExist"}'), ConfigError, "no such queue"),
        ((400, {}, b'{"__type": "x#OverLimit"}'), OverLimitError, "too many messages"),
        ((403, {}, b'{"__type": "x#InvalidClientTokenId"}'), CredentialsError, "renew them"),
        (
            (403, {}, b'{"__type": "x#AccessDenied", "message": "not you"}'),
            ConfigError,
            "the queue answered 403 AccessDenied not you",
        ),
    ],
)
def test_what_will_not_pass_is_said_at_once(
    reply: Reply, error: type[Exception], words: str
) -> None:
    answers = Answers(reply)
    with pytest.raises(error, match=words):
        call(answers)
    assert len(answers.asked) == 1


def test_a_server_that_is_not_there_is_an_error_of_the_queue() -> None:
    caller = Caller(URL, "http://127.0.0.1:9", "eu-west-1", 1)
    with pytest.raises(QueueError, match="refused"):
        caller.call(CALL, Patience(10, 2))
    caller.close()


def test_a_reply_may_take_longer_than_it_takes_to_connect() -> None:
    timeout = Patience(30, 1).timeout
    assert (timeout.connect_timeout, timeout.read_timeout) == (5, 30)


def test_without_credentials_it_says_which_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    caller = Caller(URL, "http://127.0.0.1:9", "eu-west-1", 1)
    with pytest.raises(CredentialsError, match="Set AWS_ACCESS_KEY_ID"):
        caller.call(CALL, Patience(10, 2))
    caller.close()


def test_temporary_credentials_are_sent_with_their_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "for an hour")
    answers = Answers(OK)
    call(answers)
    headers, _ = answers.asked[0]
    assert headers["x-amz-security-token"] == "for an hour"
    assert "x-amz-security-token" in headers["authorization"]


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(OK)
    with answering(answers) as proxy_url:
        monkeypatch.setenv("http_proxy", proxy_url)
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.delenv("no_proxy", raising=False)
        caller = Caller(URL, "http://queues.example", "eu-west-1", 1)
        caller.call(CALL, Patience(10, 1))
        caller.close()
    headers, _ = answers.asked[0]
    assert headers["host"] == "queues.example"


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_comes_from_the_environment_where_the_url_has_none(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "eu-north-1")
    queue = Queue("http://127.0.0.1:9/1/news")
    queue.close()
    assert queue.caller.region == "eu-north-1"


def test_texts_of_every_script_come_back_as_they_were_sent(
    queue: ServedQueue, s3_server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    ours = Queue(queue.url, s3_server.endpoint_url)
    bodies = [
        json.dumps({"text": text}, ensure_ascii=False) for text in ("ü", "漢字", "🙂", "a\tb")
    ]
    ours.send(bodies, bodies, bodies)
    found: list[Delivery] = []
    while len(found) < len(bodies):
        found += ours.receive(10, wait_s=1)
    assert sorted(delivery.body for delivery in found) == sorted(bodies)
    assert ours.delete([delivery.receipt_handle for delivery in found]) == {}
    ours.close()
    assert queue.backlog().total == 0
