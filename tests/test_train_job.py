"""The job of `batchclf train`, in memory where its command cannot be met at the right moment."""

import threading
from pathlib import Path

import pytest
from e2e import labelled

from batchclf.errors import Interrupted
from batchclf.train import TrainSettings
from batchclf.train_job import TrainJob


class SetAt(threading.Event):
    """Set when it is looked at for the n-th time."""

    def __init__(self, place: int = 0) -> None:
        super().__init__()
        self.place, self.looks = place, 0

    def is_set(self) -> bool:
        self.looks += 1
        return self.looks == self.place


def job(folder: Path, name: str) -> TrainJob:
    labelled.arguments(folder)
    test = labelled.write(folder / "test.csv", labelled.articles(20, start=160))
    return TrainJob(
        train=(str(folder / "train.csv"),),
        val=(str(folder / "val.csv"),),
        test=(str(test),),
        base_model=str(folder / "config.json"),
        output=str(folder / name),
        vocab_size=300,
        settings=TrainSettings(max_length=32, epochs=1),
        device="cpu",
    )


def test_a_stop_is_heard_while_the_test_articles_are_measured(tmp_path: Path) -> None:
    counted = SetAt()
    job(tmp_path, "whole").run(counted)
    with pytest.raises(Interrupted, match="while the test articles were measured"):
        job(tmp_path, "model").run(SetAt(counted.looks))
    assert not (tmp_path / "model").exists()
