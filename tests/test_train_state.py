"""Training that stops and goes on: in memory, with a checkpoint in a folder."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training as toy
from safetensors.torch import save_file
from toy_training import BUSY, TRAIN, same, train

from batchclf.errors import CheckpointError, ConfigError, Interrupted
from batchclf.train import Examples, Surroundings, TrainingCheckpoints, TrainingDisplay
from batchclf.train.processes import Processes
from batchclf.train.training_state import FILE

ALONE = Processes(0, 1, torch.device("cpu"))


class StopAfter(TrainingDisplay):
    """Asks for a stop at a step."""

    def __init__(self, interrupt: threading.Event, step: int) -> None:
        super().__init__()
        self._interrupt, self._left = interrupt, step

    def step(self, *_: Any, **__: Any) -> None:
        self._left -= 1
        if not self._left:
            self._interrupt.set()


def around(folder: Path, stop_after: int = 0, every_steps: int = 1000) -> Surroundings:
    interrupt = threading.Event()
    checkpoints = TrainingCheckpoints(folder, every_steps)
    return Surroundings(ALONE, checkpoints, interrupt, StopAfter(interrupt, stop_after))


def stopped(folder: Path, step: int, **options: Any) -> None:
    with pytest.raises(Interrupted, match="run the same command again"):
        train(surroundings=around(folder, step), **options)


@pytest.mark.parametrize("options", [BUSY, {}], ids=["all options", "defaults"])
def test_a_run_that_was_stopped_twice_ends_with_the_same_weights(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = train(**options)
    per_epoch = len(whole.history.step_losses) // 4
    stopped(tmp_path, 2, **options)
    stopped(tmp_path, 2 * per_epoch, **options)
    resumed = train(surroundings=around(tmp_path), **options)
    assert same(resumed, whole)
    assert resumed.history.step_losses == whole.history.step_losses
    assert [e.val_loss for e in resumed.history.epochs] == [
        e.val_loss for e in whole.history.epochs
    ]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    whole = train(surroundings=around(tmp_path))
    again = around(tmp_path, stop_after=1)
    assert same(train(surroundings=again), whole)


def test_one_file_is_kept_and_written_every_so_many_steps(tmp_path: Path) -> None:
    class Watch(TrainingDisplay):
        there: list[bool] = []  # noqa: RUF012 - of this test alone

        def step(self, *_: Any, **__: Any) -> None:
            self.there.append((tmp_path / "folder" / FILE).exists())

    checkpoints = TrainingCheckpoints(tmp_path / "folder", 2)
    train(surroundings=Surroundings(ALONE, checkpoints, None, Watch()), epochs=1)
    assert Watch.there[:4] == [False, False, True, True]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [FILE]


def test_without_a_folder_a_stop_says_what_would_help() -> None:
    interrupt = threading.Event()
    interrupt.set()
    with pytest.raises(Interrupted, match="with --checkpoint-dir"):
        train(surroundings=Surroundings(ALONE, None, interrupt))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"learning_rate": 1e-3}, "learning rate was 0.003, now 0.001"),
        ({"examples": Examples(TRAIN.texts[1:], TRAIN.labels[1:])}, "training examples was"),
        ({"model": toy.new_model(seed=1)}, "first weights was"),
        ({"model": toy.new_model(num_layers=3)}, "model was"),
    ],
    ids=["settings", "examples", "weights", "model"],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    stopped(tmp_path, 1)
    with pytest.raises(ConfigError, match=f"is of another run: .*{reason}.*delete it"):
        train(surroundings=around(tmp_path), **changes)


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "pickle"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    stopped(tmp_path, 1)
    path = tmp_path / FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"training\.safetensors is .*delete it"):
        train(surroundings=around(tmp_path))


def test_a_run_that_was_stopped_while_it_validated_validates_again(tmp_path: Path) -> None:
    whole = train()
    per_epoch = len(whole.history.step_losses) // 4
    stopped(tmp_path, per_epoch)
    resumed = train(surroundings=around(tmp_path))
    assert same(resumed, whole)
    assert [epoch.epoch for epoch in resumed.history.epochs] == [1, 2, 3, 4]
