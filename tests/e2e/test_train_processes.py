"""`torchrun -m batchclf train`: two processes train as one does."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import servers
from conftest import RunBatchclf
from e2e import labelled
from e2e.conftest import QUIET

pytestmark = pytest.mark.slow

TIMEOUT_S = 120.0
# Some batches have a single row, which only one of two processes can take.
OPTIONS = (
    *("--precision", "float32", "--dropout", "0", "--epochs", "2", "--batch-tokens", "40"),
    *("--accumulate", "2", "--class-weights", "balanced", "--lm-weight", "0.3"),
)


def torchrun(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        servers.tethered(
            [
                *(servers.script("torchrun"), "--standalone", "--nproc-per-node", "2"),
                *("-m", "batchclf", "train", *arguments),
            ]
        ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=servers.clean_environment(QUIET),
        timeout=TIMEOUT_S,
        check=False,
    )


def history(model: Path) -> Any:
    return json.loads((model / "report" / "metrics.json").read_text())["history"]


def test_two_processes_have_the_loss_curve_of_one(
    run_batchclf: RunBatchclf, tmp_path: Path
) -> None:
    arguments = (*labelled.arguments(tmp_path), *OPTIONS)
    alone = run_batchclf("train", *arguments, "--output", tmp_path / "one", env=QUIET)
    assert alone.returncode == 0, alone.stderr
    checkpoints = ("--checkpoint-dir", tmp_path / "checkpoints")
    both = torchrun(*arguments, "--output", tmp_path / "two", *checkpoints)
    assert both.returncode == 0, both.stderr
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert two["step_losses"] == pytest.approx(one["step_losses"], abs=1e-4)
    for mine, theirs in zip(one["epochs"], two["epochs"], strict=True):
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-4)
    assert both.stderr.count("epoch 1 of 2") == 1

    again = torchrun(*arguments, "--output", tmp_path / "again", *checkpoints)
    assert again.returncode == 0, again.stderr
    assert "goes on after epoch 2" in again.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("two", "again")]
    assert weights[0] == weights[1]


def test_a_failure_in_training_ends_all_processes_with_its_exit_code(tmp_path: Path) -> None:
    hopeless = ("--learning-rate", "1e30", "--clip-norm", "1e30")
    failed = torchrun(*labelled.arguments(tmp_path), *OPTIONS, *hopeless)
    assert failed.returncode != 0
    assert "exitcode  : 65" in failed.stderr
    assert "at step " in failed.stderr
    assert not (tmp_path / "model").exists()
