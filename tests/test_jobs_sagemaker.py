"""What runs on SageMaker: the training entry point, the launcher, deployment, AWS's container."""

import csv
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import botocore.session
import models
import pytest
import servers
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
from conftest import REPOSITORY, RunBatchclf
from e2e import outputs
from moto import mock_aws

from batchclf import checkpoint
from batchclf.cli import cli
from batchclf.errors import InputError

JOBS = REPOSITORY / "jobs" / "sagemaker"
CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}
WORDS = {"sport": "goal match cup team", "tech": "phone software chip web"}
PATIENCE_S = 300
FAST = ("--epochs", "6", "--lr", "0.003", "--batch-size", "32", "--max-seq-len", "32")


def load_script(name: str) -> ModuleType:
    """A script of the folder as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"sagemaker_{name}", JOBS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


train = load_script("train")
inference = load_script("inference")
deploy = load_script("deploy")
launch = load_script("launch")


def write_split(path: Path, first: int, count: int) -> None:
    """A CSV as the original project's: an unnamed index, the category, the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "category", "text"])
        for number in range(first, first + count):
            label = ("sport", "tech")[number % 2]
            words = WORDS[label].split()
            text = " ".join(words[(number + step * (1 + number % 3)) % 4] for step in range(12))
            writer.writerow([number, label, f"{text} {number}"])


@dataclass
class Container:
    """The folders of a training container, and what runs in it."""

    base: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.base / "model"

    @property
    def failure(self) -> str:
        return (self.base / "output" / "failure").read_text()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "SAGEMAKER_BASE_DIR": str(self.base),
            "OMP_NUM_THREADS": "1",
            "SM_NUM_GPUS": "0",
            **self.variables,
        }

    def host(self, **variables: str) -> Any:
        return train.Host({**self.environment, **variables})

    def start(self, *flags: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            servers.tethered([sys.executable, JOBS / "train.py", *flags]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=servers.clean_environment({**self.environment, **variables}),
        )

    def train(self, *flags: str, **variables: str) -> tuple[int, str]:
        """Exit status and log."""
        with self.start(*flags, **variables) as process:
            log, _ = process.communicate(timeout=PATIENCE_S)
        return process.returncode, log


@pytest.fixture
def container(tmp_path: Path) -> Container:
    """A container whose three channels hold the original project's files."""
    base = tmp_path / "ml"
    data = base / "input" / "data"
    write_split(data / "train" / "train.csv", 0, 120)
    write_split(data / "val" / "val.csv", 120, 40)
    write_split(data / "test" / "test.csv", 160, 40)
    (base / "model").mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG))
    return Container(base)


def scratch(container: Container) -> tuple[str, ...]:
    """Flags that train a tiny model from scratch."""
    return (*FAST, "--base-model", str(container.base / "config.json"), "--vocab-size", "300")


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Poll until something is so; fails when the process ends before."""
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[0]}")
        time.sleep(servers.POLL_S)


def command_of(container: Container, *flags: str, **variables: str) -> list[str]:
    host = container.host(**variables)
    parsed, others = train.parse(flags, host)
    command: list[str] = train.train_command(parsed, others, host, Path("out"))
    return command


def option(command: list[str], name: str) -> str:
    return command[len(command) - command[::-1].index(name)]


def test_the_original_flags_train_a_model_where_sagemaker_packs_it(container: Container) -> None:
    status, log = container.train(*scratch(container), "--hidden-size", "32")
    assert status == 0, log
    for name, regex in launch.METRICS.items():
        assert [float(value) for value in re.findall(regex, log)], name
    names = {path.name for path in container.model.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "batchclf.json"} <= names
    assert not {name for name in names if name.startswith(".")}
    output = container.base / "output" / "data"
    assert {"metrics.json", "report.html"} <= {path.name for path in output.iterdir()}
    measures = json.loads((output / "metrics.json").read_text())["measures"]
    assert {split: found["accuracy"] for split, found in measures.items()} == {
        "test": 1.0,
        "validation": 1.0,
    }
    note = json.loads((container.model / "batchclf.json").read_text())
    assert note["normalise"] == "lower+collapse"
    assert not (container.base / "output" / "failure").exists()


def test_variables_place_everything(container: Container, tmp_path: Path) -> None:
    placed = {
        "SM_MODEL_DIR": str(tmp_path / "m"),
        "SM_CHANNEL_TRAIN": str(container.base / "input" / "data" / "train"),
        "SM_CHANNEL_VAL": str(container.base / "input" / "data" / "val"),
        "SM_CHANNEL_TEST": str(container.base / "input" / "data" / "test"),
        "SM_OUTPUT_DATA_DIR": str(tmp_path / "o"),
        "SAGEMAKER_BASE_DIR": str(tmp_path / "nowhere"),
        "SM_HPS": json.dumps({"epochs": 1, "base-model": str(container.base / "config.json")}),
    }
    original = ("--head", "flatten", "--hidden-size", "32", "--max-seq-len", "32")
    status, log = container.train("--vocab-size", "300", *original, **placed)
    assert status == 0, log
    config = checkpoint.load(tmp_path / "m").config
    assert (config.head, config.head_length) == ("flatten", 32)
    assert (tmp_path / "o" / "metrics.json").is_file()


def test_the_model_of_an_earlier_training_is_replaced(tmp_path: Path) -> None:
    for attempt in ("first", "second"):
        staging = tmp_path / attempt
        (staging / "report").mkdir(parents=True)
        for name in ("model.safetensors", "report/metrics.json"):
            (staging / name).write_text(attempt)
        (tmp_path / "model").mkdir(exist_ok=True)
        train.publish(staging, tmp_path / "model", tmp_path / "output")
    for place in ("model/model.safetensors", "model/report/metrics.json", "output/metrics.json"):
        assert (tmp_path / place).read_text() == "second"


@pytest.mark.slow
def test_two_hosts_train_one_model(container: Container, tmp_path: Path) -> None:
    # Both are this machine; sorted, the first of them holds the rendezvous.
    hosts = ("127.0.0.1", "localhost")
    shared = {
        "SM_HOSTS": json.dumps(hosts),
        "SM_MASTER_PORT": str(servers._free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "SM_CHANNEL_TRAIN": str(container.base / "input" / "data" / "train"),
        "SM_CHANNEL_VAL": str(container.base / "input" / "data" / "val"),
        "SM_CHANNEL_TEST": str(container.base / "input" / "data" / "test"),
    }
    bases = [tmp_path / host for host in hosts]
    running = [
        container.start(
            *scratch(container), SAGEMAKER_BASE_DIR=str(base), SM_CURRENT_HOST=host, **shared
        )
        for base, host in zip(bases, hosts, strict=True)
    ]
    logs = [process.communicate(timeout=PATIENCE_S)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], logs
    assert checkpoint.load(bases[0] / "model").labels == ("sport", "tech")
    measures = json.loads((bases[0] / "output" / "data" / "metrics.json").read_text())["measures"]
    assert measures["test"]["accuracy"] == 1.0
    assert list((bases[1] / "model").iterdir()) == []


@pytest.mark.slow
def test_an_interrupted_training_goes_on_from_its_checkpoint(container: Container) -> None:
    (container.base / "checkpoints").mkdir()
    long = (*scratch(container), "--epochs", "30", "--checkpoint-steps", "1")
    with container.start(*long) as process:
        wait_for(lambda: list((container.base / "checkpoints").glob("*.safetensors")), process)
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, log
    assert container.failure.startswith("Error: ")
    assert list(container.model.iterdir()) == []
    status, log = container.train(*long)
    assert status == 0, log
    assert "epoch 30 of 30" in log
    assert "goes on after epoch" in log
    assert not (container.base / "output" / "failure").exists()
    assert checkpoint.load(container.model).labels == ("sport", "tech")


def test_the_defaults_are_those_of_the_original(container: Container) -> None:
    command = command_of(container)
    assert command[:3] == [sys.executable, "-m", "batchclf"]
    wanted = {
        "--base-model": "gpt2",
        "--batch-tokens": str(2 * 128),
        "--epochs": "1",
        "--learning-rate": "1e-05",
        "--seed": "1",
        "--max-length": "128",
        "--device": "cpu",
        "--train": str(container.base / "input" / "data" / "train" / "train.csv"),
        "--val": str(container.base / "input" / "data" / "val" / "val.csv"),
        "--test": str(container.base / "input" / "data" / "test" / "test.csv"),
    }
    assert {name: option(command, name) for name in wanted} == wanted


def test_a_job_without_a_test_channel_is_fine(container: Container) -> None:
    (container.base / "input" / "data" / "test" / "test.csv").unlink()
    assert "--test" not in command_of(container)


def test_hyperparameters_count_where_a_flag_does_not(container: Container) -> None:
    given = {"epochs": 4, "seed": 9, "sagemaker_program": "train.py"}
    command = command_of(container, "--seed", "7", SM_HPS=json.dumps(given))
    assert (option(command, "--epochs"), option(command, "--seed")) == ("4", "7")


def test_without_an_sdk_hyperparameters_and_hosts_come_from_the_files_of_the_job(
    container: Container,
) -> None:
    config = container.base / "input" / "config"
    config.mkdir()
    hyperparameters = {"epochs": "4", "lr": "0.01", "base-model": '"gpt2-medium"'}
    (config / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    hosts = {"current_host": "algo-2", "hosts": ["algo-2", "algo-1"]}
    (config / "resourceconfig.json").write_text(json.dumps(hosts))
    command = command_of(container)
    wanted = {
        "--epochs": "4",
        "--learning-rate": "0.01",
        "--base-model": "gpt2-medium",
        "--node-rank": "1",
        "--master-addr": "algo-1",
    }
    assert {name: option(command, name) for name in wanted} == wanted


def test_flags_that_are_not_the_originals_go_on_to_train(container: Container) -> None:
    given = {"drop-leaked": "true", "labels": "tech,sport", "gradient-checkpointing": False}
    command = command_of(container, SM_HPS=json.dumps(given))
    assert command[-3:] == ["--drop-leaked", "--labels", "tech,sport"]


def test_checkpoints_go_where_sagemaker_keeps_them(container: Container) -> None:
    assert "--checkpoint-dir" not in command_of(container)
    (container.base / "checkpoints").mkdir()
    assert option(command_of(container), "--checkpoint-dir") == str(container.base / "checkpoints")


@pytest.mark.parametrize(
    ("num_gpus", "hosts", "wanted"),
    [
        ("0", ["algo-1"], None),
        ("1", ["algo-1"], None),
        ("4", ["algo-1"], ("1", "0", "4")),
        ("8", ["algo-2", "algo-1"], ("2", "1", "8")),
        ("0", ["algo-1", "algo-2", "algo-3"], ("3", "1", "1")),
    ],
)
def test_several_gpus_or_hosts_are_started_by_torchrun(
    container: Container, num_gpus: str, hosts: list[str], wanted: tuple[str, ...] | None
) -> None:
    current = "algo-2" if "algo-2" in hosts else "algo-1"
    variables = {"SM_NUM_GPUS": num_gpus, "SM_HOSTS": json.dumps(hosts), "SM_CURRENT_HOST": current}
    command = command_of(container, **variables)
    if wanted is None:
        assert "torch.distributed.run" not in command
        return
    names = ("--nnodes", "--node-rank", "--nproc-per-node")
    assert tuple(option(command, name) for name in names) == wanted
    assert option(command, "--master-addr") == "algo-1"


def test_a_missing_file_is_the_reason_of_the_failure(container: Container) -> None:
    (container.base / "input" / "data" / "val" / "val.csv").unlink()
    status, log = container.train(*scratch(container))
    assert status == 65, log
    assert "val.csv is not there" in container.failure
    assert list(container.model.iterdir()) == []


def test_a_width_that_is_not_the_base_models_is_the_reason(container: Container) -> None:
    status, log = container.train(*scratch(container), "--hidden-size", "768")
    assert status == 64, log
    assert "--hidden-size 768" in container.failure
    assert "32 wide" in container.failure


def test_what_train_says_is_the_reason(container: Container) -> None:
    status, log = container.train(*scratch(container), "--head", "round")
    assert status == 64, log
    assert container.failure.startswith("Error: ")
    assert "--head" in container.failure
    assert container.failure in log


def test_a_wrong_flag_is_the_reason(container: Container) -> None:
    status, _ = container.train("--epochs", "many")
    assert status == 64
    assert "--epochs" in container.failure


def test_a_number_of_gpus_that_is_none_is_the_reason(container: Container) -> None:
    status, _ = container.train(SM_NUM_GPUS="all")
    assert status == 64
    assert "SM_NUM_GPUS='all' is not a whole number" in container.failure


def test_a_killed_training_says_by_which_signal() -> None:
    ended = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    status, reason = train.run([sys.executable, "-c", ended])
    assert status == 128 + signal.SIGKILL
    assert "SIGKILL" in reason


def test_a_reason_that_nobody_words_is_the_end_of_the_log() -> None:
    status, reason = train.run([sys.executable, "-c", "raise RuntimeError('out of luck')"])
    assert status == 1
    assert reason.endswith("RuntimeError: out of luck")


# --- AWS's own PyTorch container -----------------------------------------------------------------


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_hf_checkpoint(tmp_path_factory.mktemp("sagemaker") / "model")


def test_aws_container_gives_the_probabilities_of_classify(
    model: Path, tmp_path: Path, run_batchclf: RunBatchclf, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*models.CORPUS, "goal", " ".join(models.CORPUS), "Ünïcode “quotes”\nand lines"]
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    options = ("--model", model, "--output", tmp_path / "out", "--dtype", "float32")
    done = run_batchclf("classify", tmp_path / "texts.csv", *options, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    expected = outputs.read_source(tmp_path / "out", "texts.csv").to_pylist()

    monkeypatch.setenv("BATCHCLF_SERVE_DTYPE", "float32")
    loaded = inference.model_fn(str(model))
    for text, row in zip(texts, expected, strict=True):
        body = json.dumps({"text": text}).encode()
        answer = inference.output_fn(
            inference.predict_fn(inference.input_fn(body, "application/json"), loaded),
            "application/json",
        )
        probabilities = json.loads(answer)
        assert probabilities == pytest.approx(row["probs"], abs=1e-5)
        assert next(iter(probabilities)) == row["label"]
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)


@pytest.mark.parametrize(
    ("body", "content_type", "said"),
    [
        ("{}", "application/json", "no text"),
        ('{"text": " "}', "application/json", "no text"),
        ('["text"]', "application/json", "no text"),
        ("{", "application/json", "not JSON"),
        ("text", "text/plain", "text/plain"),
    ],
)
def test_a_request_that_is_not_a_text_is_refused(body: str, content_type: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        inference.input_fn(body, content_type)


def test_a_client_that_takes_no_json_is_refused() -> None:
    with pytest.raises(InputError, match="text/csv"):
        inference.output_fn({"sport": 1.0}, "text/csv")


def test_a_client_that_takes_anything_gets_json() -> None:
    assert inference.output_fn({"sport": 1.0}, "*/*") == '{"sport": 1.0}'


# --- Deployment ----------------------------------------------------------------------------------

IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/batchclf:0.1.0"
ROLE = "arn:aws:iam::123456789012:role/batchclf"
MODEL = ("--image", IMAGE, "--model", "s3://models/news/model.tar.gz", "--role", ROLE)
TRANSFORM = ("--input", "s3://articles/new/", "--output", "s3://labelled/new/")


@pytest.fixture(scope="session")
def sagemaker_api() -> ServiceModel:
    return botocore.session.get_session().get_service_model("sagemaker")


def check_request(api: ServiceModel, operation: str, parameters: dict[str, Any]) -> None:
    """A request as the service wants it: botocore's own check, and patterns, lengths and enums."""
    shape = api.operation_model(operation).input_shape
    report = ParamValidator().validate(parameters, shape)
    assert not report.has_errors(), report.generate_report()
    check_limits(parameters, shape, operation)


def check_limits(value: Any, shape: Any, place: str) -> None:
    if shape.type_name == "structure":
        for name, member in value.items():
            check_limits(member, shape.members[name], f"{place}.{name}")
    elif shape.type_name == "list":
        assert len(value) <= shape.metadata.get("max", len(value)), place
        for member in value:
            check_limits(member, shape.member, f"{place}[]")
    elif shape.type_name == "map":
        assert len(value) <= shape.metadata.get("max", len(value)), place
        for key, member in value.items():
            check_limits(key, shape.key, f"{place} key {key}")
            check_limits(member, shape.value, f"{place}.{key}")
    elif shape.type_name == "string":
        assert len(value) <= shape.metadata.get("max", len(value)), place
        assert value in (shape.enum or [value]), f"{place} {value}"
        assert re.search(f"^(?:{shape.metadata.get('pattern', '')})", value), f"{place} {value}"
    elif shape.type_name in {"integer", "long"}:
        assert value <= shape.metadata.get("max", value), place


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The requests that a dry run prints."""
    assert deploy.main([*arguments, "--dry-run"]) == 0
    calls: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return calls


def pascal(operation: str) -> str:
    return "".join(word.capitalize() for word in operation.split("_"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("endpoint", "news", *MODEL),
        ("endpoint", "news", *MODEL, "--instance-type", "ml.g6.xlarge", "--instance-count", "2"),
        ("endpoint", "news", *MODEL, "--serverless", "--memory-mb", "6144"),
        (
            "endpoint",
            "news",
            *MODEL,
            "--pytorch-container",
            "--env",
            "BATCHCLF_SERVE_DTYPE=float32",
        ),
        ("endpoint", "news", "--image", IMAGE, "--model", "s3://models/news", "--role", ROLE),
        ("transform", "news", *MODEL, *TRANSFORM),
        ("transform", "news", *MODEL, *TRANSFORM, "--content-type", "text/csv", "--gzip"),
        (
            *("transform", "news", *MODEL, *TRANSFORM, "--max-payload-mb", "32"),
            *("--content-type", "application/vnd.apache.parquet", "--accept", "text/csv"),
        ),
    ],
)
def test_requests_are_what_the_service_takes(
    sagemaker_api: ServiceModel, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    calls = planned(capsys, *arguments)
    assert len(calls) == (3 if arguments[0] == "endpoint" else 2)
    for call in calls:
        check_request(sagemaker_api, pascal(call["operation"]), call["parameters"])


def test_only_files_of_lines_are_split(capsys: pytest.CaptureFixture[str]) -> None:
    for content_type, split in (("application/jsonlines", "Line"), ("text/csv", "None")):
        arguments = ("transform", "news", *MODEL, *TRANSFORM, "--content-type", content_type)
        job = planned(capsys, *arguments)[1]["parameters"]
        assert job["TransformInput"]["SplitType"] == split
        assert job["TransformOutput"]["AssembleWith"] == split


def test_large_requests_are_sent_fewer_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    for most, at_once in (("1", 8), ("32", 3), ("100", 1)):
        arguments = ("transform", "news", *MODEL, *TRANSFORM, "--max-payload-mb", most)
        job = planned(capsys, *arguments)[1]["parameters"]
        assert (job["MaxPayloadInMB"], job["MaxConcurrentTransforms"]) == (int(most), at_once)


@pytest.mark.parametrize("script", ["deploy.py", "inference.py"])
def test_every_variable_that_is_set_for_serve_is_one_of_its_options(script: str) -> None:
    known = {option.envvar for option in cli.commands["serve"].params}
    named = set(re.findall(r"BATCHCLF_SERVE_[A-Z_]+", (JOBS / script).read_text()))
    assert named
    assert named <= known


def test_our_container_has_no_network_where_sagemaker_allows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def isolated(*flags: str) -> bool:
        made: bool = planned(capsys, "endpoint", "news", *MODEL, *flags)[0]["parameters"][
            "EnableNetworkIsolation"
        ]
        return made

    assert isolated()
    assert not isolated("--serverless")
    assert not isolated("--pytorch-container")


def test_an_endpoint_is_made_moved_to_and_deleted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        client = boto3.client("sagemaker", region_name="us-east-1")
        # moto's list of instance types is old
        place = ("--region", "us-east-1", "--instance-type", "ml.m5.xlarge")
        assert deploy.main(["endpoint", "news", *MODEL, *place, "--wait"]) == 0
        assert capsys.readouterr().out == "news\n"
        described = client.describe_endpoint(EndpointName="news")
        assert described["EndpointStatus"] == "InService"
        assert deploy.main(["transform", "night", *MODEL, *TRANSFORM, *place]) == 0
        job = capsys.readouterr().out.strip()
        found = client.describe_transform_job(TransformJobName=job)
        assert found["TransformOutput"]["S3OutputPath"] == "s3://labelled/new/"
        assert len(client.list_models()["Models"]) == 2
        assert deploy.main(["delete", "news", "--region", "us-east-1"]) == 0
        assert client.list_endpoints()["Endpoints"] == []
        assert client.list_endpoint_configs()["EndpointConfigs"] == []
        assert len(client.list_models()["Models"]) == 1


def test_an_endpoint_that_exists_moves_to_the_new_model() -> None:
    flags = deploy.parse(["endpoint", "news", *MODEL])
    calls = deploy.endpoint_calls(flags, "news-2", exists=True)
    assert calls[-1].operation == "update_endpoint"
    assert calls[-1].parameters == {"EndpointName": "news", "EndpointConfigName": "news-2"}


def test_a_packed_model_serves_from_the_folder_that_it_is_unpacked_into(
    model: Path, tmp_path: Path
) -> None:
    wheel = tmp_path / "batchclf-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    archive = tmp_path / "model.tar.gz"
    assert deploy.main(["pack", str(model), str(archive), "--wheel", str(wheel)]) == 0
    unpacked = tmp_path / "unpacked"
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    code = {path.name for path in (unpacked / "code").iterdir()}
    assert code == {"inference.py", "requirements.txt", wheel.name}
    requirements = (unpacked / "code" / "requirements.txt").read_text()
    assert requirements == f"/opt/ml/model/code/{wheel.name}\n"
    loaded = inference.model_fn(str(unpacked))
    assert sum(inference.predict_fn("a text", loaded).values()) == pytest.approx(1.0)


def test_what_is_no_model_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert deploy.main(["pack", str(tmp_path / "empty"), str(tmp_path / "m.tar.gz")]) == 64
    assert "Error: " in capsys.readouterr().err
    assert not (tmp_path / "m.tar.gz").exists()


# --- The launcher --------------------------------------------------------------------------------

LAUNCH = (
    *("--image", IMAGE, "--role", ROLE, "--output", "s3://models/news", "--region", "us-east-1"),
    *("--train", "s3://bbc/train.csv", "--val", "s3://bbc/val.csv", "--test", "s3://bbc/test.csv"),
)
# Runs the launcher with the SDK in an AWS of moto's, and prints the request and the keys on S3.
LAUNCH_IN_MOTO = """
import json, sys
sys.path.insert(0, sys.argv[1])
import boto3, launch
from moto import mock_aws

def show(params, **_):
    print(params["body"] if isinstance(params["body"], str) else params["body"].decode())

with mock_aws():
    session = boto3.Session(region_name="us-east-1")
    session.client("s3").create_bucket(Bucket="models")
    session.client("iam").create_role(RoleName="batchclf", AssumeRolePolicyDocument="{}")
    session.events.register("before-call.sagemaker.CreateTrainingJob", show)
    launch.main(sys.argv[2:], session)
    listed = session.client("s3").list_objects_v2(Bucket="models")["Contents"]
    print(json.dumps([found["Key"] for found in listed]))
"""


@dataclass(frozen=True)
class Launched:
    """What the launcher sent and printed."""

    request: dict[str, Any]
    printed: str
    keys: list[str]

    def channels(self) -> dict[str, str]:
        return {
            channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"]
            for channel in self.request["InputDataConfig"]
        }


def launched(tmp_path: Path, *flags: str) -> Launched:
    """Run the launcher with the SDK of its own virtual environment; moto stands in for AWS."""
    venv = Path(os.environ.get("SAGEMAKER_VENV", REPOSITORY / ".venv-sagemaker"))
    python = venv / "bin" / "python"
    if not python.is_file():
        pytest.skip(
            f"no {python}; python3 -m venv {venv} && "
            f"{venv}/bin/pip install sagemaker-train 'moto[iam,s3,sagemaker]'"
        )
    quiet = tmp_path / "sagemaker.yaml"
    quiet.write_text(
        "SchemaVersion: '1.0'\nSageMaker: {PythonSDK: {Modules: {TelemetryOptOut: true}}}\n"
    )
    done = subprocess.run(
        [python, "-c", LAUNCH_IN_MOTO, JOBS, *LAUNCH, *flags],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        cwd=tmp_path,
        env=servers.clean_environment(
            {
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "SAGEMAKER_VALIDATE_ROLE": "false",  # moto does not simulate policies
                "SAGEMAKER_USER_CONFIG_OVERRIDE": str(quiet),
            }
        ),
    )
    assert done.returncode == 0, done.stderr
    request, printed, keys = done.stdout.splitlines()[-3:]
    return Launched(json.loads(request), printed, json.loads(keys))


def test_the_launcher_asks_for_a_job_on_spot_that_sagemaker_takes(
    sagemaker_api: ServiceModel, tmp_path: Path
) -> None:
    spot = ("--spot", "--checkpoints", "s3://models/checkpoints", "--instance-count", "2")
    given = ("--hyperparameter", "epochs=3", "--hyperparameter", "labels=tech,sport")
    job = launched(tmp_path, *spot, *given)
    check_request(sagemaker_api, "CreateTrainingJob", job.request)
    assert job.request["HyperParameters"] == {
        "base-model": "gpt2",
        "epochs": "3",
        "labels": "tech,sport",
    }
    assert job.request["EnableManagedSpotTraining"]
    assert job.request["CheckpointConfig"]["S3Uri"] == "s3://models/checkpoints"
    assert job.request["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert job.request["ResourceConfig"]["InstanceCount"] == 2
    assert job.request["StoppingCondition"]["MaxWaitTimeInSeconds"] == 24 * 3600
    code = job.channels().pop("code").removeprefix("s3://models/")
    assert f"{code}/train.py" in job.keys
    assert [key for key in job.keys if key.startswith(code)] == [f"{code}/train.py"]
    name = job.request["TrainingJobName"]
    assert job.printed == f"s3://models/news/{name}/output/model.tar.gz"


def test_a_base_model_on_s3_is_a_channel(sagemaker_api: ServiceModel, tmp_path: Path) -> None:
    job = launched(tmp_path, "--base-model", "s3://models/gpt2-medium/")
    check_request(sagemaker_api, "CreateTrainingJob", job.request)
    assert job.channels()["base"] == "s3://models/gpt2-medium/"
    assert job.request["HyperParameters"]["base-model"] == "/opt/ml/input/data/base"
    assert not job.request.get("EnableManagedSpotTraining")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--spot",), "--checkpoints"),
        (
            ("--spot", "--checkpoints", "s3://m/c", "--max-wait-hours", "1"),
            "at least --max-run-hours",
        ),
        (("--hyperparameter", "epochs"), "NAME=VALUE"),
    ],
)
def test_a_job_that_makes_no_sense_is_not_started(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit):
        launch.parse([*LAUNCH, *flags])
    assert said in capsys.readouterr().err


def test_the_commands_of_the_readme_are_understood() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (JOBS / "README.md").read_text(), re.DOTALL)
    commands = [shlex.split(line) for line in "".join(blocks).replace("\\\n", "").splitlines()]
    assert len(commands) == 4
    for _python, script, *arguments in commands:
        {"launch.py": launch, "deploy.py": deploy}[script].parse(arguments)
