import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from batchclf.log import always, configure, fields, set_level

log = logging.getLogger("batchclf.test")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("batchclf")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def objects_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(capsys)]


def test_a_line_of_text_is_a_clock_and_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    configure("text")
    log.info("%s of %s rows", 3, 10, extra=fields(rows=3))
    (line,) = lines_of(capsys)
    assert re.fullmatch(r"\d\d:\d\d:\d\d 3 of 10 rows", line)


@pytest.mark.parametrize("level", ["warning", "error"])
def test_a_line_of_text_says_its_level_where_it_matters(
    capsys: pytest.CaptureFixture[str], level: str
) -> None:
    configure("text")
    getattr(log, level)("the disk is full")
    assert lines_of(capsys)[0].endswith(f" {level}: the disk is full")


def test_a_line_of_json_is_one_object_with_its_fields_as_keys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("json")
    log.warning("%s rows", 3, extra=fields(rows=3, shard="ü.parquet", left_s=None))
    (line,) = objects_of(capsys)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line.pop("time"))
    assert line == {
        "level": "warning",
        "message": "3 rows",
        "rows": 3,
        "shard": "ü.parquet",
        "left_s": None,
    }


@pytest.mark.parametrize("message", ["two\nlines", 'a "quote"', "caf\udce9", "\x1b[31mred", "新"])
def test_a_message_of_any_characters_is_one_line_of_json(
    monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    written = io.BytesIO()
    as_python_makes_it = io.TextIOWrapper(
        written, encoding="utf-8", errors="backslashreplace", write_through=True
    )
    monkeypatch.setattr(sys, "stderr", as_python_makes_it)
    configure("json")
    log.info(message)
    assert [json.loads(line)["message"] for line in written.getvalue().splitlines()] == [message]


def test_a_value_that_json_does_not_know_is_written_as_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("json")
    log.info("failed", extra=fields(error=ValueError("no rows")))
    assert objects_of(capsys)[0]["error"] == "no rows"


def fail() -> None:
    raise ValueError("no rows")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_brings_its_traceback(
    capsys: pytest.CaptureFixture[str], log_format: Any
) -> None:
    configure(log_format)
    try:
        fail()
    except ValueError:
        log.exception("a bug")
    lines = lines_of(capsys)
    traceback = json.loads(lines[0])["traceback"] if log_format == "json" else "\n".join(lines)
    assert "Traceback" in traceback
    assert traceback.endswith("ValueError: no rows")


def test_configured_twice_a_line_is_written_once_in_the_last_format(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("text")
    configure("json")
    log.info("once")
    assert [line["message"] for line in objects_of(capsys)] == ["once"]


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    set_level("warning")
    configure("text")
    log.info("quiet")
    assert lines_of(capsys) == []


def test_debug_shows_what_no_other_level_does(capsys: pytest.CaptureFixture[str]) -> None:
    for level, shown in (("debug", 1), ("info", 0)):
        set_level(level)  # type: ignore[arg-type]
        configure("text")
        log.debug("the text of an article")
        assert len(lines_of(capsys)) == shown


def test_what_is_always_said_stands_in_every_line_of_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("json")
    always(run="1st")
    always(run="2nd", job="j")
    log.info("starts")
    log.info("from another process", extra=fields(run="3rd", rows=3))
    first, second = objects_of(capsys)
    assert (first["run"], first["job"]) == ("2nd", "j")
    assert (second["run"], second["job"], second["rows"]) == ("3rd", "j", 3)


def test_the_log_of_other_packages_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    configure("text")
    logging.getLogger("another").info("not ours")
    assert lines_of(capsys) == []


def test_lines_go_to_the_standard_error_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        configure("text")
    log.info("later")
    assert len(lines_of(capsys)) == 1
