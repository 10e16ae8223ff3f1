"""Fixtures of the fault tests: a tiny model, places, and the console script in them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
import servers
from faults.commands import (
    QUIET,
    Classify,
    Enqueue,
    ForkClassify,
    Run,
    StartClassify,
    Verify,
    parse_run,
)
from faults.forks import Fork, forking
from faults.inputs import articles, as_parquet
from faults.places import LocalPlace, Place, S3Place, labels_of
from faults.queues import VISIBILITY_S, StartWork, Work
from servers import Endpoint, Queue

if TYPE_CHECKING:
    import subprocess

    from conftest import RunBatchclf, StartBatchclf


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models import make_hf_checkpoint

    return make_hf_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights, the rest alike."""
    from models import make_hf_checkpoint

    return make_hf_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", seed=1)


@pytest.fixture
def local(tmp_path: Path) -> LocalPlace:
    return LocalPlace(tmp_path)


@pytest.fixture
def s3(s3_server: Endpoint, bucket: str, proxied: Endpoint) -> S3Place:
    """A bucket that batchclf reaches through `proxy` alone."""
    return S3Place(s3_server, bucket, proxied)


@pytest.fixture(params=["local", "moto", "ministack"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "local":
        yield LocalPlace(tmp_path)
        return
    server: Endpoint = request.getfixturevalue(request.param)
    with servers.fresh_bucket(server) as name:
        yield S3Place(server, name)


def _arguments(place: Place, model: Path, args: tuple[str, ...]) -> list[str | Path]:
    # float32, so that a row's score does not depend on its neighbours
    fixed = ("--dtype", "float32", "--log-format", "json")
    return ["classify", *args, "--model", model, "--output", place.output, *fixed]


def _environment(place: Place, env: Mapping[str, str]) -> dict[str, str]:
    return {**QUIET, **place.env, **env}


@pytest.fixture(scope="session")
def classify(run_batchclf: "RunBatchclf", model: Path) -> Classify:
    default_model = model

    def run(
        place: Place, *args: str, model: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Run:
        ended = run_batchclf(
            *_arguments(place, model or default_model, args), env=_environment(place, env or {})
        )
        return parse_run(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture
def start_classify(start_batchclf: "StartBatchclf", model: Path) -> StartClassify:
    default_model = model

    def start(
        place: Place, *args: str, model: Path | None = None, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        return start_batchclf(
            *_arguments(place, model or default_model, args), env=_environment(place, env or {})
        )

    return start


@pytest.fixture(scope="module")
def fork_classify(model: Path) -> Iterator[ForkClassify]:
    with forking(servers.clean_environment(QUIET)) as server:

        def start(place: Place, *args: str) -> Fork:
            env = servers.clean_environment(_environment(place, {}))
            return server.start(_arguments(place, model, args), env)

        yield start


@pytest.fixture(scope="session")
def verify(run_batchclf: "RunBatchclf") -> Verify:
    def run(place: Place, *inputs: str, under: str = "") -> Run:
        output = f"{place.output}/{under}".rstrip("/")
        ended = run_batchclf(
            *("verify", output, *inputs, "--log-format", "json"), env=_environment(place, {})
        )
        return parse_run(ended.returncode, ended.stdout, ended.stderr)

    return run


def _work_arguments(
    place: S3Place, queue: Queue, model: Path, args: tuple[str, ...]
) -> list[str | Path]:
    # the last of an option counts, so a test may say otherwise
    return [
        *("work", "--queue", queue.url, "--model", model, "--output", place.output),
        *("--allow-source", f"s3://{place.bucket}/in"),
        *("--visibility-timeout", str(VISIBILITY_S), "--retry-delay", "1"),
        *("--gather-seconds", "1", "--dtype", "float32", "--log-format", "json", *args),
    ]


@pytest.fixture(scope="session")
def work(run_batchclf: "RunBatchclf", model: Path) -> Work:
    def run(place: S3Place, queue: Queue, *args: str, env: Mapping[str, str] | None = None) -> Run:
        ended = run_batchclf(
            *_work_arguments(place, queue, model, args), env=_environment(place, env or {})
        )
        return parse_run(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture
def start_work(start_batchclf: "StartBatchclf", model: Path) -> StartWork:
    default_model = model

    def start(
        place: S3Place, queue: Queue, *args: str, model: Path | None = None
    ) -> "subprocess.Popen[str]":
        return start_batchclf(
            *_work_arguments(place, queue, model or default_model, args),
            env=_environment(place, {}),
        )

    return start


@pytest.fixture(scope="session")
def enqueue(run_batchclf: "RunBatchclf") -> Enqueue:
    def run(place: Place, queue: Queue, *args: str) -> Run:
        ended = run_batchclf(
            *("enqueue", *args, "--queue", queue.url, "--log-format", "json"),
            env=_environment(place, {}),
        )
        return parse_run(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture(scope="session")
def news() -> pa.Table:
    """Sixty articles."""
    return articles(60)


@pytest.fixture(scope="session")
def expected_labels(
    tmp_path_factory: pytest.TempPathFactory, classify: Classify, news: pa.Table
) -> dict[str, str | None]:
    """By id, what the model says of `news` where nothing goes wrong."""
    place = LocalPlace(tmp_path_factory.mktemp("undisturbed"))
    run = classify(place, place.write("news.parquet", as_parquet(news)))
    assert run.exit_code == 0, run.said
    return labels_of(place)
