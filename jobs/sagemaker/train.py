"""Train on SageMaker: the flags and variables of the original project in front of `batchclf train`.

Source: https://github.com/haocai1992/GPT2-News-Classifier. `train.csv`, `val.csv` and, where there
is one, `test.csv` come from the channels of these names; the model goes where SageMaker packs it,
metrics and plots to the output data, training checkpoints to `/opt/ml/checkpoints` where the job
has that folder, and the reason of a failure to `/opt/ml/output/failure`. Every flag that is not
named here goes on to `batchclf train`. Several GPUs or hosts are started by torchrun.

SageMaker's SDK sets the SM_* variables and passes hyperparameters as flags; in a container that is
started without it the same is read from `/opt/ml/input/config`.
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import hf_hub_download

from batchclf.errors import BatchclfError, ConfigError, InputError

GPT2_WIDTH = 768  # where a configuration does not say it
STAGING = ".training"  # the folder in the model directory where the model is written first
REPORT = "report"  # the folder of metrics and plots in a model directory
MASTER_PORT = 7777  # as SageMaker's own drivers
# https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_DescribeTrainingJob.html
MOST_REASON_CHARS = 1024
TAIL_LINES = 200
SIGNALLED = 128  # exit statuses of a shell: this, plus the number of the signal


@dataclass(frozen=True)
class Host:
    """This host of the job: where SageMaker puts files, and who the other hosts are."""

    environment: Mapping[str, str]

    @property
    def base(self) -> Path:
        return Path(self.environment.get("SAGEMAKER_BASE_DIR", "/opt/ml"))

    @property
    def failure(self) -> Path:
        return self._path("SM_OUTPUT_FAILURE", "output/failure")

    @property
    def output_data(self) -> Path:
        return self._path("SM_OUTPUT_DATA_DIR", "output/data")

    @property
    def model(self) -> Path:
        return self._path("SM_MODEL_DIR", "model")

    @property
    def checkpoints(self) -> Path | None:
        """SageMaker makes this folder, and keeps it on S3, when the job has a checkpoint URI."""
        folder = self.base / "checkpoints"
        return folder if folder.is_dir() else None

    @property
    def num_gpus(self) -> int:
        given = self.environment.get("SM_NUM_GPUS")
        if given and not given.isdecimal():
            raise ConfigError(f"SM_NUM_GPUS={given!r} is not a whole number")
        return int(given) if given else len(list(Path("/dev").glob("nvidia[0-9]*")))

    @property
    def hosts(self) -> list[str]:
        """All hosts, in the same order on each of them."""
        return sorted(self._value("SM_HOSTS", "resourceconfig.json", "hosts") or ["localhost"])

    @property
    def rank(self) -> int:
        current = self.environment.get("SM_CURRENT_HOST") or self._config(
            "resourceconfig.json"
        ).get("current_host", self.hosts[0])
        if current not in self.hosts:
            raise ConfigError(
                f"SM_CURRENT_HOST {current!r} is none of SM_HOSTS {', '.join(self.hosts)}"
            )
        return self.hosts.index(current)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        found = self._value("SM_HPS", "hyperparameters.json") or {}
        return {name: _parsed(value) for name, value in found.items() if name[:10] != "sagemaker_"}

    def channel(self, name: str) -> Path:
        return self._path(f"SM_CHANNEL_{name.upper()}", f"input/data/{name}")

    def _path(self, variable: str, below_base: str) -> Path:
        return Path(self.environment.get(variable) or self.base / below_base)

    def _value(self, variable: str, file: str, key: str | None = None) -> Any:
        if given := self.environment.get(variable):
            try:
                return json.loads(given)
            except ValueError as error:
                raise ConfigError(f"{variable} is not JSON: {error}") from error
        config = self._config(file)
        return config.get(key) if key else config

    def _config(self, file: str) -> dict[str, Any]:
        path = self.base / "input" / "config" / file
        found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return found


class FlagParser(argparse.ArgumentParser):
    """Raises what argparse would print and exit with, so that it becomes the job's reason."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(arguments: Sequence[str], host: Host) -> tuple[argparse.Namespace, list[str]]:
    """The original's flags, from the command line or else the hyperparameters; and all others.

    Raises:
        ConfigError: a flag has a value that it cannot have.
    """
    parser = FlagParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=2,
        help="articles of --max-seq-len tokens in a batch, over all GPUs [2]",
    )
    parser.add_argument("--epochs", type=int, default=1, help="passes over the articles [1]")
    parser.add_argument("--lr", type=float, default=1e-5, help="the learning rate's top [1e-5]")
    parser.add_argument("--seed", type=int, default=1, help="of first weights and order [1]")
    parser.add_argument(
        "--hidden-size", type=int, help="the base model's width, checked before the training starts"
    )
    parser.add_argument(
        "--max-seq-len", type=int, default=128, help="tokens of a text that the model reads [128]"
    )
    parser.add_argument(
        "--base-model",
        default="gpt2",
        help="GPT-2 on the hub, a directory, or a config JSON to start from scratch [gpt2]",
    )
    parser.add_argument(
        "--normalise",
        default="lower+collapse",
        help="what is done to a text; by default what the original's endpoint did",
    )
    parser.add_argument("--model-dir", type=Path, default=host.model, help="[SM_MODEL_DIR]")
    for split in ("train", "val", "test"):
        parser.add_argument(
            f"--{split}-dir",
            type=Path,
            default=host.channel(split),
            help=f"folder of {split}.csv [SM_CHANNEL_{split.upper()}]",
        )
    parser.add_argument("--num-gpus", type=int, default=host.num_gpus, help="[SM_NUM_GPUS]")
    return parser.parse_known_args([*_flags(host.hyperparameters, arguments), *arguments])


def train_command(
    flags: argparse.Namespace, others: Sequence[str], host: Host, output: Path
) -> list[str]:
    """The command that trains on this host and writes the model to `output`.

    Raises:
        InputError: a channel lacks its file.
    """
    splits = ["--train", _split(flags.train_dir, "train"), "--val", _split(flags.val_dir, "val")]
    if (flags.test_dir / "test.csv").is_file():
        splits += ["--test", _split(flags.test_dir, "test")]
    return [
        *_start(flags.num_gpus, host),
        *("batchclf", "train", *splits, "--output", str(output), "--overwrite"),
        *("--base-model", flags.base_model, "--normalise", flags.normalise),
        *("--max-length", str(flags.max_seq_len)),
        *("--batch-tokens", str(flags.batch_size * flags.max_seq_len)),
        *("--epochs", str(flags.epochs), "--learning-rate", str(flags.lr)),
        *("--seed", str(flags.seed)),
        *(() if flags.num_gpus else ("--device", "cpu")),
        *(("--checkpoint-dir", str(host.checkpoints)) if host.checkpoints else ()),
        *_train_options(others),
    ]


def check_hidden_size(base_model: str, hidden_size: int) -> None:
    """Raise ConfigError where the base model has another width."""
    local = Path(base_model)
    try:
        if local.is_dir():
            path = local / "config.json"
        else:
            path = local if local.is_file() else Path(hf_hub_download(base_model, "config.json"))
        width = json.loads(path.read_text("utf-8")).get("n_embd", GPT2_WIDTH)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--base-model {base_model}: cannot read its config: {error}") from error
    if width != hidden_size:
        raise ConfigError(
            f"--hidden-size {hidden_size}: the hidden states of --base-model {base_model} are "
            f"{width} wide; leave the flag out, or name a model of that width"
        )


def run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command, pass its log and our signals on; its exit status, and why where not 0."""
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with subprocess.Popen(  # noqa: S603 - our own command, never through a shell
        command, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: process.send_signal(received))
        for line in process.stderr or ():
            sys.stderr.write(line)
            tail.append(line)
    status = process.returncode
    if status < 0:
        tail.append(f"Error: the training was ended by {signal.Signals(-status).name}\n")
    return (SIGNALLED - status if status < 0 else status), _reason(tail)


def publish(staging: Path, model_dir: Path, output_data: Path) -> None:
    """Bring the model to where SageMaker packs it; metrics and plots to the output data as well."""
    shutil.copytree(staging / REPORT, output_data, dirs_exist_ok=True)
    for path in staging.iterdir():
        target = model_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)


def train_here(arguments: Sequence[str], host: Host) -> tuple[int, str]:
    """Train on this host; the exit status of `batchclf train`, and why where it is not 0.

    Raises:
        BatchclfError: the training could not begin.
    """
    flags, others = parse(arguments, host)
    if flags.hidden_size is not None:
        check_hidden_size(flags.base_model, flags.hidden_size)
    # The model directory is there already, and may be a mount, which nothing can be renamed to.
    staging = flags.model_dir / STAGING / host.environment.get("TRAINING_JOB_NAME", "model")
    command = train_command(flags, others, host, staging)
    staging.parent.mkdir(parents=True, exist_ok=True)
    print(" ".join(command), flush=True)
    status, reason = run(command)
    if not status and host.rank == 0:
        publish(staging, flags.model_dir, host.output_data)
    shutil.rmtree(staging.parent)
    return status, reason


def main(arguments: Sequence[str]) -> int:
    """Train, and leave the reason of a failure where SageMaker looks for it."""
    host = Host(os.environ)
    host.failure.unlink(missing_ok=True)  # of an attempt before this one
    with ExitStack() as stack:
        stack.push(lambda _, error, __: _write_bug(host.failure, error))
        try:
            status, reason = train_here(arguments, host)
        except BatchclfError as error:
            status, reason = error.exit_code, f"Error: {error}"
            print(reason, file=sys.stderr)
        if status:
            _write_reason(host.failure, reason)
        return status


def _start(num_gpus: int, host: Host) -> list[str]:
    """What runs a module once for each GPU of each host, the processes being in touch."""
    if num_gpus <= 1 and len(host.hosts) == 1:
        return [sys.executable, "-m"]
    port = host.environment.get("SM_MASTER_PORT", str(MASTER_PORT))
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(len(host.hosts)), "--node-rank", str(host.rank)),
        *("--nproc-per-node", str(max(num_gpus, 1))),
        *("--master-addr", host.hosts[0], "--master-port", port, "-m"),
    ]


def _split(folder: Path, split: str) -> str:
    path = folder / f"{split}.csv"
    if not path.is_file():
        raise InputError(f"{path} is not there; give the job a channel {split!r} with {split}.csv")
    return str(path)


def _flags(hyperparameters: Mapping[str, Any], given: Sequence[str]) -> list[str]:
    """Hyperparameters as flags, less those that the command line has already."""
    present = {word.partition("=")[0] for word in given}
    return [
        word
        for name, value in hyperparameters.items()
        if f"--{name}" not in present
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]


def _train_options(others: Sequence[str]) -> list[str]:
    """Flags without a value come from hyperparameters as `--drop-leaked true`."""
    options: list[str] = []
    for word in others:
        if word.lower() == "false" and options:
            options.pop()
        elif word.lower() != "true":
            options.append(word)
    return options


def _parsed(value: Any) -> Any:
    """SageMaker keeps hyperparameters as strings, and SDKs write JSON into them."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _reason(tail: Sequence[str]) -> str:
    """The last message that a command ended with, else its last lines."""
    starts = [index for index, line in enumerate(tail) if line.startswith("Error: ")]
    lines = list(tail)[starts[-1] : starts[-1] + 1] if starts else list(tail)[-20:]
    return "".join(lines).strip()


def _write_bug(path: Path, error: BaseException | None) -> None:
    if isinstance(error, Exception):
        _write_reason(path, f"{type(error).__name__}: {error}")


def _write_reason(path: Path, reason: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reason[:MOST_REASON_CHARS] + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
