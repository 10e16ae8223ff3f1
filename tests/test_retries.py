"""Calls to AWS are tried again alike in every version of botocore."""

from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError, ParamValidationError
from fault_proxy import FaultProxy
from fault_rules import Fault, Match, Status
from hypothesis import given, strategies as st
from servers import Endpoint, Queue

from batchclf.errors import ConfigError
from batchclf.retries import ATTEMPTS, retry
from batchclf.sqs import Queue as OurQueue

RESET = EndpointConnectionError(endpoint_url="http://127.0.0.1:9")


class Client:
    """Keeps what is registered."""

    def __init__(self) -> None:
        self.meta = SimpleNamespace(events=SimpleNamespace(register=self._register))

    def _register(self, name: str, handler: Any) -> None:
        assert name == "needs-retry"
        self.wait_s = handler


def wait_s(
    attempt: int, status: int | None = None, code: str = "", error: Exception | None = None
) -> float | None:
    client = Client()
    retry(client)
    reply = None if status is None else (SimpleNamespace(status_code=status), {})
    if reply is not None and code:
        reply[1]["Error"] = {"Code": code}
    waits: float | None = client.wait_s(
        attempts=attempt, response=reply, caught_exception=error, event_name="needs-retry"
    )
    return waits


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 502},
        {"status": 503, "code": "SlowDown"},
        {"status": 504},
        {"status": 429},
        {"status": 400, "code": "RequestTimeout"},
        {"status": 400, "code": "ThrottlingException"},
        {"status": 400, "code": "KMS.ThrottlingException"},
        {"error": RESET},
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again_until_the_last_attempt(fault: dict[str, Any]) -> None:
    tried_again = [wait_s(attempt, **fault) is not None for attempt in range(1, ATTEMPTS + 1)]
    assert tried_again == [True] * (ATTEMPTS - 1) + [False]


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 200},
        {"status": 403, "code": "AccessDenied"},
        {"status": 404, "code": "NoSuchKey"},
        {"status": 412},
        {"status": 501},
        {"error": ParamValidationError(report="no bucket")},
    ],
    ids=str,
)
def test_what_will_not_pass_is_not(fault: dict[str, Any]) -> None:
    assert wait_s(1, **fault) is None


@given(attempt=st.integers(1, ATTEMPTS - 1))
def test_waits_grow_twofold_and_are_longer_for_who_is_too_fast(attempt: int) -> None:
    for fault, first_s in (({"status": 500}, 0.2), ({"status": 503, "code": "SlowDown"}, 1.0)):
        found = wait_s(attempt, **fault)
        assert found is not None
        assert 0 <= found <= min(first_s * 2 ** (attempt - 1), 20)


def test_a_number_of_attempts_that_is_none_is_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(ConfigError, match="AWS_MAX_ATTEMPTS=many"):
        retry(Client())


@pytest.mark.parametrize("s3_server", ["ministack"], indirect=True)
def test_many_calls_that_fail_a_few_times_each_all_come_through(
    queue: Queue, proxy: FaultProxy, proxied: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore's own quota of retries, of all calls together, is used up by then."""
    for name, value in proxied.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("batchclf.retries.random.uniform", lambda *_: 0.0)
    ours = OurQueue(queue.url)
    for _ in range(20):
        proxy.clear()
        fault = proxy.add(Fault(Match(), Status(500), times=4))
        ours.attributes()
        assert proxy.hits(fault) == 4
    ours.close()
