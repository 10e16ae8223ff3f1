"""What a person or a scheduler sees: help, logs, the progress bar, exit codes, signals."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pyarrow.parquet as pq
import pytest
import servers
from e2e import archives, outputs
from e2e.conftest import QUIET

from batchclf.cli import cli

if TYPE_CHECKING:
    from conftest import RunBatchclf, StartBatchclf
    from e2e.conftest import Classify

COLUMNS = 80
HEAVY = {"torch", "transformers", "tokenizers", "pyarrow", "boto3", "botocore", "numpy", "rich"}
STOP_DEADLINE_S = 30.0


def walk(command: click.Command, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found = {path: command}
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            found |= walk(child, (*path, name))
    return found


COMMANDS = walk(cli)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "batchclf")
def test_help_fits_a_terminal_and_explains_every_option(
    run_batchclf: "RunBatchclf", path: tuple[str, ...]
) -> None:
    done = run_batchclf(*path, "--help", env={"COLUMNS": str(COLUMNS)})
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= COLUMNS
    command = COMMANDS[path]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", done.stdout), option
    for name in getattr(command, "commands", {}):
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("path", [path for path in COMMANDS if path], ids=" ".join)
def test_every_option_can_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, path: tuple[str, ...]
) -> None:
    command = COMMANDS[path]
    context = click.Context(command)
    for option in command.params:
        if isinstance(option, click.Option):
            written = max(option.opts, key=len).removeprefix("--")
            variable = "_".join(("batchclf", *path, written)).replace("-", "_").upper()
            monkeypatch.setenv(variable, "7")
            assert option.resolve_envvar_value(context) == "7", variable


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "batchclf", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=servers.clean_environment(),
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "batchclf.cli" in imported
    assert not {name.partition(".")[0] for name in imported} & HEAVY


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", "Usage"),
        ("classify", "INPUT"),
        ("classify news.csv --model m", "--output"),
        ("classify news.csv --output out", "--model"),
        ("classify news.csv --model m --output out --nonsense", "--nonsense"),
        ("classify news.csv --model m --output out --min-score 2", "--min-score"),
        ("classify news.csv --model m --output out --min-score nan", "--min-score"),
        ("classify news.csv --model m --output out --max-error-rate nan", "--max-error-rate"),
        ("classify news.csv --model m --output out --limit 0", "--limit"),
        ("classify news.csv --model m --output out --dtype int8", "--dtype"),
        ("classify news.csv --model m --output out --delimiter ab", "delimiter"),
        ("classify news.csv --model m --output out --keep-columns a,,b", "--keep-columns"),
        (
            "classify news.csv --model m --output out --text-column a --text-column a",
            "text column",
        ),
        ("verify", "OUTPUT"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_usage_error_exits_64_and_names_the_option(
    run_batchclf: "RunBatchclf", args: str, words: str
) -> None:
    done = run_batchclf(*args.split())
    assert done.returncode == 64, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("device", "words"),
    [("tpu", "auto, cpu, cuda"), ("cuda:99", "CUDA devices"), ("meta", "auto, cpu, cuda")],
)
def test_a_device_that_is_not_there_is_a_usage_error(
    classify: "Classify", archive: Path, tmp_path: Path, device: str, words: str
) -> None:
    done = classify(archive, "--output", tmp_path / "out", "--device", device)
    assert done.returncode == 64, done.stderr
    assert words in done.stderr


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_logs_are_one_object_a_line_even_when_something_fails(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.csv").write_text("id,headline\n1,no text here\n")
    options = ("--output", tmp_path / "out", "--log-format", "json")
    done = classify(archive, tmp_path / "bad.csv", *options)
    assert done.returncode == 65
    lines = json_lines(done.stderr)
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"])
        assert line["level"] in {"info", "warning", "error"}
        assert line["message"]
    assert sum("num_rows" in line for line in lines) == 7, "one line for each shard"
    assert any("bad.csv" in line["message"] for line in lines if line["level"] == "error")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["counts"]["num_rows"] == 35
    assert summary["output"] == str(outputs.fingerprint_folder(tmp_path / "out"))
    assert not summary["complete"]
    assert "bad.csv" in summary["errors"][0]


def test_json_logs_say_run_shard_attempt_counts_and_seconds_of_each_stage(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    options = ("--output", tmp_path / "out", "--log-format", "json")
    batch = {"AWS_BATCH_JOB_ID": "job-1", "AWS_BATCH_JOB_ATTEMPT": "2"}
    done = classify(archive / "a.parquet", *options, env=batch)
    assert done.returncode == 0, done.stderr
    lines = json_lines(done.stderr)
    folder = outputs.fingerprint_folder(tmp_path / "out")
    (note,) = (folder / "_runs").glob("*.json")
    run = json.loads(note.read_text())["run"]
    assert {(line["run"], line["job"], line["job_attempt"]) for line in lines} == {
        (run, "job-1", "2")
    }
    (committed,) = (line for line in lines if "shard" in line)
    output = folder / committed["shard"]
    assert pq.read_metadata(output).metadata[b"batchclf.nonce"] == committed["attempt"].encode()
    assert (committed["num_rows"], committed["num_failed"]) == (10, 1)
    stages = ("fetch", "read", "tokenise", "gather", "predict", "write")
    assert tuple(committed["stage_s"]) == stages
    assert sum(committed["stage_s"].values()) > 0
    again = json_lines(classify(archive / "a.parquet", *options).stderr)
    (found,) = (line for line in again if "shard" in line)
    assert (found["shard"], found["attempt"]) == (committed["shard"], committed["attempt"])
    assert found["run"] != run


def test_texts_reach_the_log_at_level_debug_alone(classify: "Classify", tmp_path: Path) -> None:
    secret = "Zanzibar"
    unbroken = secret * 200_000  # which no tokenizer is given
    csv = f'id,text\n1,{secret} one\n2,{secret} two,{secret} three\n3,{unbroken}\n4,"  "\n'
    (tmp_path / "bad.csv").write_text(csv)
    (tmp_path / "bad.jsonl").write_text(f'{{"text": "{secret}\n{{"text": ["{secret}"]}}\n')
    for level in ("info", "debug"):
        for log_format in ("text", "json"):
            output = tmp_path / f"{level}-{log_format}"
            done = classify(
                *(tmp_path / "bad.csv", tmp_path / "bad.jsonl", "--output", output),
                *("--log-level", level, "--log-format", log_format),
            )
            assert done.returncode == 0, done.stderr
            notes = [path.read_text() for path in output.rglob("*.json")]
            assert secret not in "".join([done.stdout, *notes])
            assert (secret in done.stderr) == (level == "debug")
            assert len(done.stderr) < 10_000


def test_warnings_alone_are_shown_where_that_is_asked_for(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    options = ("--output", tmp_path / "out", "--log-level", "warning")
    assert classify(archive / "a.parquet", *options).stderr == ""


def test_json_logs_tell_of_an_error_that_ends_the_command(
    run_batchclf: "RunBatchclf", archive: Path, tmp_path: Path
) -> None:
    options = ("--model", tmp_path / "none", "--output", tmp_path / "out", "--log-format", "json")
    done = run_batchclf("classify", archive, *options)
    assert done.returncode == 64
    assert str(tmp_path / "none") in json_lines(done.stderr)[-1]["message"]


def test_without_a_terminal_there_is_no_bar(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    done = classify(archive / "a.parquet", "--output", tmp_path / "out")
    assert done.returncode == 0
    assert "\x1b" not in done.stderr + done.stdout
    assert "\r" not in done.stderr + done.stdout
    for line in done.stderr.splitlines():
        assert re.match(r"\d\d:\d\d:\d\d ", line)


def run_on_terminal(command: list[str | Path], cwd: Path) -> tuple[int, str]:
    """Run a command on a pseudo-terminal of 80 columns; returns exit code and what it shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    env = servers.clean_environment({"TERM": "xterm-256color", **QUIET})
    env = {name: value for name, value in env.items() if name not in {"COLUMNS", "LINES"}}
    process = subprocess.Popen(
        servers.tethered(command), stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=cwd
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            break
    os.close(ours)
    return process.wait(), shown.decode()


def test_on_a_terminal_of_80_columns_the_bar_stays_on_one_line_and_goes_away(
    model: Path, tmp_path: Path
) -> None:
    archives.write(tmp_path / "news.parquet", archives.articles(600))
    exit_code, shown = run_on_terminal(
        [
            *(servers.script("batchclf"), "classify", "news.parquet", "--model", model),
            *("--output", "out", "--rows-per-shard", "200", "--dtype", "float32"),
        ],
        tmp_path,
    )
    assert exit_code == 0, shown
    # what is drawn between two moves of the cursor to the start of a line, colours left out
    drawn = [
        line
        for part in re.split(r"\r\n|\r|\n", shown)
        if (line := re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part))
    ]
    assert max(map(len, drawn)) <= COLUMNS
    bars = [line for line in drawn if "/600" in line]
    assert bars
    assert all(line.rstrip().endswith("left") for line in bars)
    assert any("rows/s" in line and "tokens/s" in line for line in bars)
    assert "labelled 600 rows" in shown
    assert shown.rindex("\x1b[2K") < shown.rindex("labelled 600 rows"), "the bar is wiped at last"


def test_on_a_terminal_the_bar_can_be_left_out(model: Path, archive: Path, tmp_path: Path) -> None:
    exit_code, shown = run_on_terminal(
        [
            *(servers.script("batchclf"), "classify", archive, "--model", model),
            *("--output", tmp_path / "out", "--no-progress"),
        ],
        tmp_path,
    )
    assert exit_code == 0, shown
    assert "rows/s" not in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("sent", "after"), [(signal.SIGTERM, "committed"), (signal.SIGINT, "labelling")]
)
def test_a_signal_ends_the_run_with_75_and_nothing_half_written(
    start_batchclf: "StartBatchclf",
    run_batchclf: "RunBatchclf",
    model: Path,
    tmp_path: Path,
    sent: signal.Signals,
    after: str,
) -> None:
    archives.write(tmp_path / "news.parquet", archives.articles(20_000))
    output = tmp_path / "out"
    process = start_batchclf(
        *("classify", tmp_path / "news.parquet", "--model", model, "--output", output),
        *("--rows-per-shard", "500", "--dtype", "float32"),
        env=QUIET,
    )
    assert process.stderr is not None
    assert any(after in line for line in process.stderr)
    process.send_signal(sent)
    began = time.monotonic()
    stdout, stderr = process.communicate(timeout=STOP_DEADLINE_S)
    assert process.returncode == 75, stderr
    assert time.monotonic() - began < STOP_DEADLINE_S
    assert "stop" in stderr
    assert "run" in stderr, "it says what to do"
    assert "labelled" not in stdout

    left = outputs.contents(output)
    assert not [name for name in left if ".tmp" in name or "_probe" in name]
    assert not [name for name in left if name.endswith("_SUCCESS.json")]
    for path in outputs.output_files(output):
        assert pq.read_table(path, partitioning=None).num_rows == 500
    assert len(outputs.output_files(output)) < 40
    verdict = run_batchclf("verify", output, "--log-format", "json", env=QUIET)
    (problem,) = json.loads(verdict.stdout)["problems"]
    assert "_SUCCESS.json" in problem


def test_a_closed_pipe_ends_quietly(model: Path, archive: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [
        *(servers.script("batchclf"), "classify", archive, "--model", model, "--output"),
        *(tmp_path / "out", "--dry-run", "--rows-per-shard", "1"),
    ]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        servers.tethered(command),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=servers.clean_environment(QUIET),
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
