"""What clients, and those who stop the server, can do to it."""

import http.client
import json
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from serve.running import JSON, Server, running, wait_until

TEXT = "Striker scores twice in the cup final after extra time, says the coach of the champions."
BODY = json.dumps({"text": TEXT}).encode()
HEAD = (
    b"POST /invocations HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n"
)
REQUEST = HEAD % len(BODY) + BODY
MIB = 1 << 20


@pytest.fixture(scope="module")
def articles(sample: Path) -> list[str]:
    texts: list[str] = pq.read_table(sample / "news-1.parquet")["text"].to_pylist()
    return texts


@pytest.fixture(scope="module")
def strict(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with little patience and little room."""
    limits = ("--client-timeout", "1", "--max-body-mib", "8", "--max-connections", "20")
    log = tmp_path_factory.mktemp("strict") / "log"
    with running(log, "--model", model, *limits) as server:
        yield server


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    while chunk := connection.recv(1 << 16):
        received += chunk
    return received


def status_of(answer: bytes) -> int:
    found = re.match(rb"HTTP/1.1 (\d+) ", answer)
    assert found, answer[:200]
    return int(found.group(1))


def still_answers(server: Server) -> bool:
    return server.ask("GET", "/ping").status == 200 and server.invoke({"text": TEXT}).status == 200


def test_a_client_that_leaves_takes_its_rows_with_it(server: Server, articles: list[str]) -> None:
    gone_before = server.metric('batchclf_requests_total{route="/invocations",status="499"}')
    texts = [f"{number} {articles[number % len(articles)]}" for number in range(3000)]
    body = json.dumps(texts).encode()
    with server.connect() as connection:
        connection.sendall(HEAD % len(body) + body)
        wait_until(lambda: server.metric("batchclf_waiting_rows") > 0, "waiting rows")
    wait_until(lambda: server.metric("batchclf_waiting_rows") == 0, "an empty queue")
    wait_until(lambda: server.metric("batchclf_body_bytes") == 0, "no body in memory")
    gone = server.metric('batchclf_requests_total{route="/invocations",status="499"}')
    assert gone == gone_before + 1
    assert still_answers(server)


def test_a_client_that_leaves_in_its_body_does_no_harm(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(HEAD % 1000 + b'{"text": "')
    assert still_answers(server)


@pytest.mark.parametrize(
    "start", [b"POST /invocations HTTP/1.1\r\nhost: te", HEAD % 1000 + b'{"text": "']
)
def test_a_client_that_stops_sending_is_told_and_cut_off(strict: Server, start: bytes) -> None:
    with strict.connect() as connection:
        connection.sendall(start)
        assert status_of(read_all(connection)) == 408
    assert still_answers(strict)


def test_a_client_that_sends_drop_by_drop_is_cut_off(strict: Server) -> None:
    with strict.connect() as connection:
        connection.sendall(HEAD % 10_000)
        connection.settimeout(0.1)
        end = time.monotonic() + 30
        answer = b""
        while not answer and time.monotonic() < end:
            connection.sendall(b"x")
            try:
                answer = connection.recv(1 << 16)
            except TimeoutError:
                continue
        assert status_of(answer) == 408


def test_a_silent_connection_is_closed(strict: Server) -> None:
    with strict.connect() as connection:
        assert read_all(connection) == b""


def test_a_client_that_does_not_read_its_answer_is_cut_off(
    strict: Server, articles: list[str]
) -> None:
    # an answer that is larger than what the kernel holds for a reader
    rows = [{"text": "profits rose", "id": " ".join(articles[:5])}] * 1000
    body = json.dumps(rows).encode()
    cut_before = strict.metric('batchclf_requests_total{route="/invocations",status="499"}')
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", strict.port))
        head = HEAD.replace(b"\r\n\r\n", b"\r\naccept: application/jsonlines\r\n\r\n")
        connection.sendall(head % len(body) + body)
        wait_until(
            lambda: (
                strict.metric('batchclf_requests_total{route="/invocations",status="499"}')
                > cut_before
            ),
            "a request that was cut off",
        )
    assert still_answers(strict)


def test_endless_headers_are_refused(strict: Server) -> None:
    with strict.connect() as connection:
        connection.sendall(b"GET /ping HTTP/1.1\r\n" + b"x-a: b\r\n" * 20_000)
        assert status_of(read_all(connection)) == 431


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\r\n\r\nx y"]
)
def test_what_is_no_http_is_refused(strict: Server, garbage: bytes) -> None:
    with strict.connect() as connection:
        connection.sendall(garbage + b"\r\n\r\n")
        assert status_of(read_all(connection)) == 400
    assert still_answers(strict)


def test_a_body_of_200_mib_is_refused_before_it_is_read(server: Server) -> None:
    before = server.metric("process_resident_memory_bytes")
    answer = server.ask("POST", "/invocations", bytes(200 * MIB), JSON)
    assert (answer.status, answer.code) == (413, "body_too_large")
    assert server.metric("process_resident_memory_bytes") < before + 50 * MIB
    assert still_answers(server)


def test_a_body_of_200_mib_in_chunks_is_refused_too(server: Server) -> None:
    before = server.metric("process_resident_memory_bytes")
    answer = server.ask("POST", "/invocations", (bytes(MIB) for _ in range(200)), JSON)
    assert (answer.status, answer.code) == (413, "body_too_large")
    assert server.metric("process_resident_memory_bytes") < before + 120 * MIB
    assert server.metric("batchclf_body_bytes") == 0


def test_a_client_that_waits_for_100_continue_need_not_send_a_body_in_vain(server: Server) -> None:
    with server.connect() as connection:
        head = (HEAD % (200 * MIB)).replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n")
        connection.sendall(head)
        assert status_of(connection.recv(1 << 16)) == 413


def test_a_connection_goes_on_after_a_refusal_with_a_small_body(server: Server) -> None:
    wrong = HEAD.replace(b"application/json", b"text/xml") % 4 + b"<a/>"
    with server.connect() as connection:
        for request, status in ((wrong, 415), (REQUEST, 200), (wrong, 415), (REQUEST, 200)):
            connection.sendall(request)
            response = http.client.HTTPResponse(connection, method="POST")
            response.begin()
            response.read()
            assert response.status == status
            assert response.getheader("connection") is None


def test_connections_beyond_the_limit_are_refused_with_a_reason(strict: Server) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(strict.connect())
        wait_until(lambda: _is_refused(strict), "a refused connection")
        assert strict.ask("GET", "/ping").status == 200  # a full server is a healthy one
        with strict.connect() as connection:  # two requests at once
            connection.sendall(REQUEST + REQUEST)
            assert status_of(read_all(connection)) == 503
        with strict.connect() as connection:  # no request
            assert status_of(read_all(connection)) == 503
    wait_until(lambda: not _is_refused(strict), "room for a connection")
    assert still_answers(strict)


def _is_refused(server: Server) -> bool:
    with server.connect() as connection:
        connection.sendall(REQUEST)
        answer = connection.recv(1 << 16)
    if status_of(answer) != 503:
        return False
    assert b"retry-after: 1" in answer
    assert b"too_many_connections" in answer
    return True


@pytest.mark.slow
def test_ten_thousand_connections_are_served_or_refused_politely(
    model: Path, tmp_path: Path
) -> None:
    wanted = 10_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < wanted + 500:
        pytest.skip(f"at most {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with running(tmp_path / "log", "--model", model) as server, ExitStack() as stack:
            served = refused = 0
            for _ in range(wanted):
                connection = stack.enter_context(server.connect())
                connection.sendall(b"GET /model HTTP/1.1\r\nhost: test\r\n\r\n")
                try:
                    status = status_of(connection.recv(1 << 12))
                except ConnectionResetError:
                    continue
                served += status == 200
                refused += status == 503
            assert served == 1000
            assert refused == wanted - 1000
            assert server.ask("GET", "/ping").status == 200
            stack.close()
            wait_until(lambda: still_answers(server), "an answer after all that")
            assert server.metric("process_open_fds") < 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_overload_is_refused_and_what_was_accepted_is_answered(
    model: Path, tmp_path: Path, articles: list[str]
) -> None:
    with running(tmp_path / "log", "--model", model, "--max-queue-rows", "50") as server:
        bodies = [[f"{number} {article}" for article in articles] for number in range(24)]
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(server.invoke, bodies))
        statuses = [answer.status for answer in answers]
        assert set(statuses) == {200, 429}
        for answer in answers:
            if answer.status == 200:
                assert len(answer.json) == len(articles)
            else:
                assert int(answer.headers["Retry-After"]) >= 1
        assert still_answers(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_accepted_request(
    model: Path, tmp_path: Path, articles: list[str], number: signal.Signals
) -> None:
    with running(tmp_path / "log", "--model", model) as server:
        outcomes: list[int | None] = []
        stopping = threading.Event()

        def client(index: int) -> None:
            """One article after the other on one connection, until the server says goodbye."""
            with server.connect() as connection:
                stream = connection.makefile("rb")
                for turn in range(100_000):
                    text = f"{index} {turn} {articles[turn % len(articles)]}"
                    body = json.dumps({"text": text}).encode()
                    connection.sendall(HEAD % len(body) + body)
                    head = b"".join(iter(stream.readline, b"\r\n")) if stream.peek(1) else b""
                    if not head:
                        outcomes.append(None)
                        return
                    length = re.search(rb"content-length: (\d+)", head)
                    assert length
                    answer = json.loads(stream.read(int(length.group(1))))
                    outcomes.append(status_of(head))
                    assert len(answer) == 5
                    if b"connection: close" in head:
                        assert stopping.is_set()
                        return

        threads = [threading.Thread(target=client, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(outcomes) > 100, "a hundred answers")
        stopping.set()
        assert server.stop(number) == 0
        for thread in threads:
            thread.join()
        assert set(outcomes) == {200}
        assert "every accepted request was answered" in server.log_text()


def test_a_long_request_is_finished_after_a_signal(
    model: Path, tmp_path: Path, articles: list[str]
) -> None:
    texts = [f"{number} {articles[number % len(articles)]}" for number in range(1500)]
    with running(tmp_path / "log", "--model", model) as server:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.invoke, texts)
            wait_until(lambda: server.metric("batchclf_waiting_rows") > 0, "waiting rows")
            assert server.stop() == 0
            answer = asked.result()
        assert answer.status == 200
        assert len(answer.json) == len(texts)


def test_a_second_signal_leaves_at_once(model: Path, tmp_path: Path, articles: list[str]) -> None:
    texts = [f"{number} {articles[number % len(articles)]}" for number in range(8000)]
    with running(tmp_path / "log", "--model", model) as server, server.connect() as connection:
        body = json.dumps(texts).encode()
        connection.sendall(HEAD % len(body) + body)
        wait_until(lambda: server.metric("batchclf_waiting_rows") > 0, "waiting rows")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in server.log_text(), "the first signal")
        assert server.stop() == 75


@pytest.mark.slow
def test_what_takes_too_long_after_a_signal_is_cut_off_and_told_by_the_exit_code(
    model: Path, tmp_path: Path, articles: list[str]
) -> None:
    body = json.dumps([f"{n} {articles[n % len(articles)]}" for n in range(60_000)]).encode()
    limits = ("--max-rows", "100000", "--max-body-mib", "200")
    with running(tmp_path / "log", "--model", model, *limits) as server, server.connect() as client:
        client.sendall(HEAD % len(body) + body)
        wait_until(lambda: server.metric("batchclf_waiting_rows") > 0, "waiting rows")
        began = time.monotonic()
        assert server.stop() == 75
        assert time.monotonic() - began < 30
        assert "stopped with 1 requests unanswered" in server.log_text()
