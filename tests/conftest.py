"""Fixtures: real servers, a fault proxy in front of them, and the console script.

`MINISTACK_VENV` says where ministack's own virtual environment is (default: `.venv-ministack` in
the repository). `BATCHCLF_REQUIRE_SERVERS=1` makes a server that is not installed a failure.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# tests/gpu also runs where little more than torch, transformers and pytest is installed.
if all(map(find_spec, ("boto3", "hypothesis", "psutil"))):
    import servers
    from fault_proxy import FaultProxy
    from hypothesis import HealthCheck, settings
    from servers import Endpoint, Queue

    # A busy machine is no reason to fail: what is tested is what comes out, not how fast.
    settings.register_profile(
        "patient",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("patient")

os.environ.setdefault("PYTEST_TIMEOUT", "600")  # seconds a test; for pytest-timeout, if it is there

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND_TIMEOUT_S = 120.0


class RunBatchclf(Protocol):
    """Run `batchclf` to its end; of cloud settings it sees only those in `env`."""

    def __call__(
        self,
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = COMMAND_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]: ...


class StartBatchclf(Protocol):
    """Start `batchclf`; it is killed when the test (or the thread that started it) ends.

    Output goes to the file `log`, both streams; without one to pipes, which the test must read lest
    a talkative process stops.
    """

    def __call__(
        self,
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
    ) -> subprocess.Popen[str]: ...


def _installed(server: AbstractContextManager[Endpoint]) -> Iterator[Endpoint]:
    with ExitStack() as stack:
        try:
            endpoint = stack.enter_context(server)
        except servers.ServerMissingError as error:
            if os.environ.get("BATCHCLF_REQUIRE_SERVERS") == "1":
                pytest.fail(str(error))
            pytest.skip(str(error))
        yield endpoint


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    yield from _installed(servers.moto(tmp_path_factory.mktemp("moto")))


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    venv = Path(os.environ.get("MINISTACK_VENV", REPOSITORY / ".venv-ministack"))
    yield from _installed(servers.ministack(tmp_path_factory.mktemp("ministack"), venv))


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    yield from _installed(servers.rclone(tmp_path_factory.mktemp("rclone")))


@pytest.fixture(scope="session", params=["moto", "ministack"])
def s3_server(request: pytest.FixtureRequest) -> Endpoint:
    endpoint: Endpoint = request.getfixturevalue(request.param)
    return endpoint


@pytest.fixture
def bucket(s3_server: Endpoint) -> Iterator[str]:
    with servers.fresh_bucket(s3_server) as name:
        yield name


@pytest.fixture
def queue(s3_server: Endpoint) -> Iterator[Queue]:
    with servers.fresh_queue(s3_server) as fresh:
        yield fresh


@pytest.fixture
def fifo_queue(s3_server: Endpoint) -> Iterator[Queue]:
    with servers.fresh_queue(s3_server, fifo=True) as fresh:
        yield fresh


@pytest.fixture
def s3_of_this_process(s3_server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The store that is called in this process is the server."""
    from batchclf.store.s3 import S3

    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    S3.connect.cache_clear()
    yield
    S3.connect().client.close()
    S3.connect.cache_clear()


@pytest.fixture
def proxy(s3_server: Endpoint) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as running:
        yield running


@pytest.fixture
def proxied(proxy: FaultProxy) -> Iterator[Endpoint]:
    """The server as seen through `proxy`."""
    endpoint = Endpoint(proxy.endpoint_url)
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of corpora and reference files that may lie beside the repository."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


def _batchclf(*args: str | Path) -> list[str]:
    program = servers.script("batchclf")
    if not program.is_file():
        pytest.fail(f"no {program}; install the package first: pip install -e .")
    return servers.tethered([program, *args])


@pytest.fixture(scope="session")
def run_batchclf() -> RunBatchclf:
    def run(
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = COMMAND_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            _batchclf(*args),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=servers.clean_environment(env),
            cwd=cwd,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def start_batchclf() -> Iterator[StartBatchclf]:
    started: list[subprocess.Popen[str]] = []

    def start(
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
    ) -> subprocess.Popen[str]:
        with (log or Path(os.devnull)).open("ab") as file:
            process = subprocess.Popen(
                _batchclf(*args),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if log is None else file,
                stderr=subprocess.PIPE if log is None else file,
                text=True,
                env=servers.clean_environment(env),
                cwd=cwd,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    for process in started:
        process.communicate()
