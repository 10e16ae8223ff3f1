"""A model on S3: downloaded once, whole, and nothing of it that could run."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import models
import pytest
import servers
from e2e import archives
from fault_proxy import FaultProxy
from fault_rules import Fault, Match, Status
from servers import Endpoint

from batchclf.checkpoint import find_build, load, load_base_config, remote, write_build
from batchclf.checkpoint.files import BUILD_FILES, BUILD_FOLDER
from batchclf.errors import CheckpointError, ConfigError
from batchclf.store.s3 import S3

if TYPE_CHECKING:
    from conftest import RunBatchclf

OTHERS = ("pytorch_model.bin", "training_args.bin", "readme.md", "deep/config.json", "code.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_hf_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _ours(moto: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {**moto.env, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    S3.connect.cache_clear()
    yield
    forget_models()
    S3.connect().client.close()
    S3.connect.cache_clear()


def forget_models() -> None:
    """As at the end of a process that used some."""
    while remote._in_use:
        os.close(remote._in_use.popitem()[1])


@pytest.fixture
def bucket(moto: Endpoint) -> Iterator[str]:
    with servers.fresh_bucket(moto) as name:
        yield name


@pytest.fixture
def uri(moto: Endpoint, bucket: str, model: Path) -> str:
    for path in model.iterdir():
        moto.s3.upload_file(str(path), bucket, f"models/tiny/{path.name}")
    for name in OTHERS:
        moto.s3.put_object(Bucket=bucket, Key=f"models/tiny/{name}", Body=b"run me")
    return f"s3://{bucket}/models/tiny"


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache/batchclf/models").glob("*/*/*"))


def replace(server: Endpoint, uri: str, name: str, content: bytes) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    server.s3.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)


def test_the_files_of_a_model_come_and_no_others(uri: str, model: Path, tmp_path: Path) -> None:
    checkpoint = load(f"{uri}/")
    assert checkpoint.content_hash == load(model).content_hash
    assert checkpoint.path.name == "tiny"
    assert cached(tmp_path) == sorted(path.name for path in model.iterdir())


def test_a_build_comes_with_the_model_where_it_is_asked_for(
    uri: str, moto: Endpoint, model: Path
) -> None:
    graph = model.parent / "graph.xml"
    graph.write_text("<net/>")
    graph.with_suffix(".bin").write_bytes(b"weights")
    write_build(load(uri), graph, {"precision": "int8"})  # into the cache
    kept = load(uri).path / BUILD_FOLDER
    for name in BUILD_FILES:
        replace(moto, uri, name, (kept / Path(name).name).read_bytes())
    replace(moto, uri, f"{BUILD_FOLDER}/more.py", b"run me")
    alone, built = load(uri), load(uri, build=True)
    assert built.path != alone.path
    found = find_build(built)
    assert found is not None
    assert found.note["precision"] == "int8"
    assert sorted(path.name for path in (built.path / BUILD_FOLDER).iterdir()) == sorted(
        Path(name).name for name in BUILD_FILES
    )


def test_a_model_that_is_here_is_not_downloaded_again(uri: str, moto: Endpoint) -> None:
    with FaultProxy(moto.endpoint_url) as proxy:
        first = load(uri, endpoint_url=proxy.endpoint_url)
        proxy.add(Fault(Match(operation="GetObject"), Status(500)))
        again = load(uri, endpoint_url=proxy.endpoint_url)
    assert (again.path, again.content_hash) == (first.path, first.content_hash)


def test_a_model_that_was_replaced_is_downloaded_anew(
    uri: str, moto: Endpoint, model: Path
) -> None:
    before = load(uri)
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {str(n): f"other {n}" for n in range(5)}
    replace(moto, uri, "config.json", json.dumps(config).encode())
    after = load(uri)
    assert after.labels == tuple(f"other {n}" for n in range(5))
    assert before.path != after.path
    assert (before.path / "config.json").is_file()


def test_a_cached_file_that_was_cut_short_is_downloaded_again(uri: str) -> None:
    path = load(uri).path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert load(uri).path / "model.safetensors" == path
    assert path.read_bytes() == whole


def test_several_at_once_download_it_once(uri: str, moto: Endpoint) -> None:
    with FaultProxy(moto.endpoint_url) as proxy, ThreadPoolExecutor(4) as pool:
        # a second download would fail
        proxy.add(Fault(Match(operation="GetObject", path="tokenizer.json"), Status(404), skip=1))
        found = list(pool.map(lambda _: load(uri, endpoint_url=proxy.endpoint_url), range(4)))
    assert len({checkpoint.path for checkpoint in found}) == 1


def test_the_files_of_a_base_come_without_its_weights(uri: str, tmp_path: Path) -> None:
    load_base_config(uri, 3, "last_token", 0)
    assert "model.safetensors" not in cached(tmp_path)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "model.safetensors is missing, and the pickle pytorch_model.bin"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_a_file_that_is_missing_is_named(
    missing: str, reason: str, uri: str, moto: Endpoint
) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    moto.s3.delete_object(Bucket=bucket, Key=f"{prefix}/{missing}")
    with pytest.raises(CheckpointError, match=reason):
        load(uri)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("s3://{bucket}/none", "there is no such prefix"),
        ("s3://{bucket}-none/models", "there is no such bucket"),
    ],
)
def test_a_place_without_a_model_is_said_to_be_so(other: str, reason: str, bucket: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load(other.format(bucket=bucket))


@pytest.mark.parametrize("operation", ["ListObjectsV2", "GetObject"])
def test_a_model_that_may_not_be_read_is_said_to_be_so(
    operation: str, uri: str, moto: Endpoint, tmp_path: Path
) -> None:
    with FaultProxy(moto.endpoint_url) as proxy:
        proxy.add(Fault(Match(operation=operation), Status(403)))
        with pytest.raises(CheckpointError, match="403 AccessDenied"):
            load(uri, endpoint_url=proxy.endpoint_url)
    assert cached(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_an_error_of_configuration(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        load(uri)


def test_more_bytes_than_any_model_has_are_not_downloaded(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MOST_MODEL_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1,000"):
        load(uri)


def test_a_full_cache_loses_what_nobody_uses(
    uri: str, moto: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unused = load(uri).path
    forget_models()
    replace(moto, uri, "batchclf.json", b'{"format_version": 1, "temperature": 2.0}')
    used = load(uri).path
    monkeypatch.setattr(remote, "MOST_CACHE_BYTES", 1)
    replace(moto, uri, "batchclf.json", b'{"format_version": 1, "temperature": 3.0}')
    newest = load(uri).path
    assert [path.exists() for path in (unused, used, newest)] == [False, True, True]


def test_classify_takes_its_model_from_s3(
    uri: str, moto: Endpoint, bucket: str, run_batchclf: "RunBatchclf", tmp_path: Path
) -> None:
    news = archives.write(tmp_path / "news.csv", archives.articles(5))
    env = {name: value for name, value in moto.env.items() if name != "AWS_ENDPOINT_URL"}
    done = run_batchclf(
        *("classify", news, "--model", uri, "--output", tmp_path / "out"),
        *("--endpoint-url", moto.endpoint_url),
        env={**env, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert f"downloading the model {uri} (" in done.stderr
    assert "labelled 5 rows" in done.stdout
    assert cached(tmp_path)
