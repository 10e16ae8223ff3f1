"""Training that is killed, told to stop, or runs out of disk: the same command goes on."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import servers
from conftest import RunBatchclf, StartBatchclf
from e2e import labelled, outputs
from e2e.conftest import QUIET

NUM_KILLS = 5
PATIENCE_S = 60.0
CHECKPOINT = "training.safetensors"
OPTIONS = (
    *("--precision", "float32", "--batch-tokens", "256", "--epochs", "8", "--average", "0.5"),
    *("--accumulate", "2", "--crop-share", "0.5", "--noise-share", "0.1"),
)
Arguments = tuple[str | Path, ...]


@pytest.fixture(scope="module")
def unstopped(run_batchclf: RunBatchclf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("unstopped")
    done = run_batchclf("train", *labelled.arguments(folder), *OPTIONS, env=QUIET)
    assert done.returncode == 0, done.stderr
    return folder / "model"


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    folder = ("--checkpoint-dir", tmp_path / "checkpoints", "--checkpoint-steps", "1")
    return ("train", *labelled.arguments(tmp_path), *OPTIONS, *folder)


def wait_for_checkpoints(process: "subprocess.Popen[str]", folder: Path, count: int) -> None:
    """Until the training checkpoint was replaced so many times."""
    path, before, deadline = folder / CHECKPOINT, stamp(folder), time.monotonic() + PATIENCE_S
    while count:
        assert process.poll() is None, f"ended with {process.returncode} before its kill"
        assert time.monotonic() < deadline, f"no new {path}"
        if stamp(folder) != before:
            before, count = stamp(folder), count - 1


def stamp(folder: Path) -> int:
    path = folder / CHECKPOINT
    return path.stat().st_mtime_ns if path.exists() else 0


def weights(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_training_that_is_killed_at_random_moments_ends_with_the_same_weights(
    run_batchclf: RunBatchclf,
    start_batchclf: StartBatchclf,
    arguments: Arguments,
    unstopped: Path,
    tmp_path: Path,
) -> None:
    random_moment = random.Random(0)
    for _ in range(NUM_KILLS):
        process = start_batchclf(*arguments, env=QUIET, log=tmp_path / "log")
        wait_for_checkpoints(process, tmp_path / "checkpoints", random_moment.randint(1, 5))
        time.sleep(random_moment.uniform(0, 0.02))  # anywhere in a step, or in its checkpoint
        process.kill()
        process.wait()
    assert not (tmp_path / "model").exists()
    done = run_batchclf(*arguments, env=QUIET)
    assert done.returncode == 0, done.stderr
    assert "goes on after epoch" in done.stderr
    assert weights(tmp_path / "model") == weights(unstopped)


@pytest.mark.slow
def test_a_stop_writes_a_checkpoint_that_the_same_command_goes_on_from(
    run_batchclf: RunBatchclf,
    start_batchclf: StartBatchclf,
    arguments: Arguments,
    unstopped: Path,
    tmp_path: Path,
) -> None:
    process = start_batchclf(*arguments, env=QUIET, log=tmp_path / "log")
    wait_for_checkpoints(process, tmp_path / "checkpoints", 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 75
    assert (
        "Error: interrupted; run the same command again to go on" in (tmp_path / "log").read_text()
    )

    other = run_batchclf(*arguments, "--learning-rate", "0.1", env=QUIET)
    assert other.returncode == 64
    assert "is of another run: learning rate was 0.003, now 0.1" in other.stderr

    done = run_batchclf(*arguments, env=QUIET)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "model") == weights(unstopped)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [300_000, 60_000], ids=["training checkpoint", "model"])
def test_a_disk_that_is_full_ends_in_try_again_and_leaves_what_was_there(
    limit: int, unstopped: Path, tmp_path: Path
) -> None:
    arguments = [*labelled.arguments(tmp_path), *OPTIONS, "--overwrite"]
    if limit > 100_000:  # more than the model takes
        arguments += ["--checkpoint-dir", tmp_path / "checkpoints"]
    shutil.copytree(unstopped, tmp_path / "model")
    prlimit = shutil.which("prlimit") or "/usr/bin/prlimit"
    done = subprocess.run(
        servers.tethered(
            [prlimit, f"--fsize={limit}", servers.script("batchclf"), "train", *arguments]
        ),
        capture_output=True,
        text=True,
        env=servers.clean_environment(QUIET),
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 75
    assert "File too large; free some space and run the same command again" in done.stderr
    assert outputs.contents(tmp_path / "model") == outputs.contents(unstopped)
    assert [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")] == []
