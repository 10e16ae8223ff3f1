import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from batchclf import log, progress
from batchclf.progress import Progress, Style, choose_style


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("batchclf")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


@pytest.mark.parametrize(
    ("wanted", "terminal", "log_format", "style"),
    [
        (True, True, "text", "bar"),
        (True, True, "json", "lines"),
        (True, False, "text", "lines"),
        (True, False, "json", "lines"),
        (False, True, "text", "none"),
        (False, False, "json", "none"),
    ],
)
def test_a_bar_is_shown_where_a_person_sees_it_and_no_machine_reads(
    monkeypatch: pytest.MonkeyPatch, wanted: bool, terminal: bool, log_format: str, style: Style
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert choose_style(wanted, log_format) == style


def test_a_line_is_written_every_few_seconds_and_not_for_every_batch(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log.configure("json")
    with Progress(10_000, "lines") as shown:
        for _ in range(100):
            clock.now_s += 0.5
            shown.batch(10, 1000)
    assert [line["rows"] for line in lines_of(capsys)] == [200, 400, 600, 800, 1000]


def test_a_line_has_the_rates_and_the_time_left(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log.configure("json")
    with Progress(1000, "lines") as shown:
        clock.now_s += 20
        shown.batch(200, 25_000)
    (line,) = lines_of(capsys)
    assert line["message"] == "200 of 1,000 rows, 10.0 rows/s, 1,250 tokens/s, 0:01:20 left"
    assert {key: line[key] for key in ("rows", "of", "rows_per_s", "tokens_per_s", "left_s")} == {
        "rows": 200,
        "of": 1000,
        "rows_per_s": 10.0,
        "tokens_per_s": 1250.0,
        "left_s": 80,
    }


def test_rows_that_were_done_before_count_as_done_but_not_as_speed(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log.configure("json")
    with Progress(1000, "lines") as shown:
        shown.shard(500, computed=False)
        clock.now_s += 10
        shown.batch(100, 1)
    (line,) = lines_of(capsys)
    assert (line["rows"], line["rows_per_s"], line["left_s"]) == (600, 10.0, 40)


def test_a_row_that_was_computed_and_then_committed_counts_once(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log.configure("json")
    with Progress(1000, "lines") as shown:
        shown.batch(100, 1)
        clock.now_s += 10
        shown.shard(100, computed=True)
    assert [line["rows"] for line in lines_of(capsys)] == [100]


def test_rows_with_errors_are_done_when_their_shard_is(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log.configure("json")
    with Progress(1000, "lines") as shown:
        shown.batch(60, 1)  # of a shard of 100 rows, 40 of which have no text
        clock.now_s += 10
        shown.shard(100, computed=True)
    assert [line["rows"] for line in lines_of(capsys)] == [100]


def test_more_than_all_rows_is_never_shown(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log.configure("json")
    with Progress(100, "lines") as shown:
        shown.batch(90, 1)
        shown.shard(50, computed=False)  # computed here, and committed by another worker
        clock.now_s += 10
        shown.batch(10, 1)
    (line,) = lines_of(capsys)
    assert (line["rows"], line["left_s"]) == (100, 0)


def test_nothing_computed_yet_promises_no_time(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log.configure("json")
    with Progress(1000, "lines") as shown:
        clock.now_s += 10
        shown.shard(100, computed=False)
    (line,) = lines_of(capsys)
    assert line["left_s"] is None
    assert not line["message"].endswith("left")


def test_no_time_passed_is_no_division_by_zero(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log.configure("json")
    with Progress(10, "lines") as shown:
        shown.batch(10, 10)
    assert lines_of(capsys) == []


def test_no_progress_is_silence(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    log.configure("json")
    with Progress(1000, "none") as shown:
        clock.now_s += 100
        shown.batch(100, 1)
        shown.shard(100, computed=True)
    assert lines_of(capsys) == []


def on_a_terminal(program: str) -> str:
    """What a program shows on a terminal of 100 columns, on standard error."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as child:
        os.close(theirs)
        shown = bytearray()
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # EIO: the other side is closed
            pass
        output, _ = child.communicate()
    os.close(ours)
    assert (child.returncode, output) == (0, b"")
    return shown.decode()


@pytest.fixture(scope="module")
def terminal() -> str:
    return on_a_terminal(
        "import logging, sys\n"
        "from batchclf import log\n"
        "from batchclf.progress import Progress, choose_style\n"
        "log.configure('text')\n"
        "with Progress(1000, choose_style(True, 'text')) as shown:\n"
        "    shown.batch(250, 10_000)\n"
        "    logging.getLogger('batchclf').info('committed a shard')\n"
        "    shown.shard(250, computed=True)\n"
    )


def test_a_bar_shows_rows_and_rates(terminal: str) -> None:
    assert "250/1000" in terminal
    assert re.search(r"[\d,]+ rows/s [\d,]+ tokens/s", terminal)


def test_a_log_line_stands_on_a_line_of_its_own_above_the_bar(terminal: str) -> None:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal)
    lines = re.split(r"[\r\n]+", plain)
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d committed a shard", line.strip()) for line in lines)
