"""`batchclf serve` as a process, and ways to talk to it."""

import http.client
import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import servers

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 40.0
POLL_S = 0.02
JSON = {"Content-Type": "application/json"}
# Two cores are shared by several processes of one small model each.
QUIET = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of a refusal."""
        return str(self.json["error"]["code"])


class Server:
    """A running server; its log is one JSON object a line."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, port: int) -> None:
        self.process = process
        self._log = log
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def invoke(
        self, body: Any, kind: str = "application/json", query: str = "", **headers: str
    ) -> Answer:
        """POST /invocations; a body other than bytes is sent as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", f"/invocations{query}", content, {"Content-Type": kind, **named})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def metric(self, name: str) -> float:
        found = re.search(
            rf"^{re.escape(name)} (\S+)$",
            self.ask("GET", "/metrics").body.decode(),
            re.MULTILINE,
        )
        return float(found.group(1)) if found else 0.0

    def log_text(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_text().splitlines()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_DEADLINE_S)


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{deadline_s} s went by without {what}")
        time.sleep(POLL_S)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def starting(
    log: Path, *options: str | Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server that was started on a free port, and may not be ready; killed on leaving."""
    port = free_port()
    command = [servers.script("batchclf"), "serve", "--port", str(port), "--log-format", "json"]
    with starting_command([*command, *options], log, port, env) as server:
        yield server


@contextmanager
def starting_command(
    command: Sequence[str | Path], log: Path, port: int, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """The same of any command that ends in a server on that port."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            servers.tethered(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=servers.clean_environment(QUIET | dict(env or {})),
        )
    try:
        yield Server(process, log, port)
    finally:
        process.kill()
        process.wait()


@contextmanager
def running(
    log: Path, *options: str | Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """The same, ready."""
    with starting(log, *options, env=env) as server:
        wait_until(lambda: is_ready(server), "a healthy /ping", START_DEADLINE_S)
        yield server


def is_ready(server: Server) -> bool:
    if server.process.poll() is not None:
        raise AssertionError(f"the server ended: {server.log_text()}")
    try:
        return server.ask("GET", "/ping").status == 200
    except ConnectionRefusedError:
        return False
