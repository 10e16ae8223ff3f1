import json
import logging
from collections.abc import Iterator

import pytest

from batchclf import log
from batchclf.train import TrainingDisplay, display


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    logger = logging.getLogger("batchclf")
    before = logger.handlers[:], logger.level, logger.propagate
    log.configure("json")
    yield clock
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_line_says_every_few_seconds_how_training_goes(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingDisplay("lines") as shown:
        shown.begin(1000, rows_before=400)
        for _ in range(3):
            clock.now_s += 6
            shown.step(60, epoch=2, loss=0.25, accuracy=0.9)
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert found["message"] == (
        "epoch 2: 520 of 1,000 articles, loss 0.2500, accuracy 0.900, 10.0 articles/s, 0:00:48 left"
    )
    assert (found["articles"], found["left_s"], found["loss"]) == (520, 48, 0.25)


def test_a_bar_is_drawn_and_taken_away(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay("bar") as shown:
        shown.begin(10, rows_before=0)
        clock.now_s += 1
        shown.step(5, epoch=1, loss=0.5, accuracy=0.5)
    assert "bar" not in capsys.readouterr().out


def test_nothing_is_shown_unasked(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay() as shown:
        shown.begin(10, rows_before=0)
        clock.now_s += 100
        shown.step(5, epoch=1, loss=0.5, accuracy=0.5)
    assert capsys.readouterr().err == ""
