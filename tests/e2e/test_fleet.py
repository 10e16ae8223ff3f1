"""A process for each device of a host: rows exactly once, and one stop for all of them."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.dataset as ds
import pytest
import servers
from e2e import archives
from e2e.conftest import QUIET
from servers import Endpoint

from batchclf.classify import ClassifyJob, Settings
from batchclf.config import CutSettings, ModelSettings, PredictSettings, ReadSettings, Share
from batchclf.metrics import Metrics
from batchclf.progress import Progress
from batchclf.work import QueueSettings, Settings as WorkSettings, work_side_by_side

ROWS, FILES, ROWS_PER_SHARD = 200, 4, 2

# What `--device all` does on a host with two of them.
PROGRAM = """
import sys
from batchclf.classify import ClassifyJob, Settings
from batchclf.cli.signals import stop_on_signals
from batchclf.config import CutSettings, ModelSettings, PredictSettings, ReadSettings, Share
from batchclf.errors import BatchclfError
from batchclf.log import configure
from batchclf.progress import Progress

configure("json")
interrupt = stop_on_signals()
inputs, model, output, rows_per_shard = sys.argv[1:]
settings = Settings(
    (inputs,), output, ModelSettings(model, dtype="float32"), ReadSettings(), PredictSettings(),
    CutSettings(int(rows_per_shard)), Share(),
)
job = ClassifyJob(settings, devices=("cpu", "cpu"))
try:
    with Progress(sum(shard.num_rows for shard in job.mine), "none") as shown:
        job.run(interrupt, shown)
except BatchclfError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def news(tmp_path: Path) -> Path:
    folder = tmp_path / "news"
    folder.mkdir()
    rows = archives.articles(ROWS)
    for number in range(FILES):
        part = rows[number * ROWS // FILES : (number + 1) * ROWS // FILES]
        archives.write(folder / f"{number}.parquet", part)
    return folder


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        for child in _children(process):
            child.kill()
        process.kill()
        process.communicate()


def _children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _start(news: Path, model: Path, output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, news, model, output, str(ROWS_PER_SHARD)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **QUIET},
        start_new_session=True,
    )


def _outputs(output: Path) -> list[Path]:
    return [path for path in output.glob("fp=*/*") if not path.name.startswith("_")]


def _until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_processes_side_by_side_label_each_row_once_and_stop_and_go_on_together(
    news: Path,
    model: Path,
    tmp_path: Path,
    started: list[subprocess.Popen[str]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"

    first = _start(news, model, output)
    started.append(first)
    _until(lambda: _outputs(output), first)
    first.terminate()  # the parent alone, as in a container
    _, log = first.communicate(timeout=60)
    assert first.returncode == 75, log
    assert not list(output.glob("fp=*/_SUCCESS.json"))
    assert not [path for path in output.rglob("*") if path.name.startswith(".")]  # nothing half

    settings = Settings(
        (str(news),),
        str(output),
        ModelSettings(str(model), dtype="float32"),
        ReadSettings(),
        PredictSettings(),
        CutSettings(ROWS_PER_SHARD),
        Share(),
    )
    job = ClassifyJob(settings, devices=("cpu", "cpu"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with caplog.at_level(logging.INFO, "batchclf"), Progress(ROWS, "none") as shown:
        summary = job.run(threading.Event(), shown)
    assert summary.complete
    assert summary.num_committed + summary.num_skipped == ROWS / ROWS_PER_SHARD
    assert any(message.startswith("cpu: committed") for message in caplog.messages)
    labelled = ds.dataset(output, ignore_prefixes=["_"]).to_table(columns=["id", "label"])
    assert sorted(labelled["id"].to_pylist()) == [f"a-{row:04}" for row in range(ROWS)]
    assert len(list(output.glob("fp=*/_SUCCESS.json"))) == 1
    notes = [json.loads(path.read_text()) for path in output.glob("fp=*/_runs/*.json")]
    shares = {(n["settings"]["share"]["index"], n["settings"]["share"]["count"]) for n in notes}
    assert shares == {(0, 2), (1, 2)}  # each process leaves a note of its own


def test_workers_of_one_queue_share_its_articles_out(
    moto: Endpoint, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (moto.env | QUIET).items():
        monkeypatch.setenv(name, value)
    with servers.fresh_queue(moto) as queue:
        for number in range(4):
            body = json.dumps({"id": str(number), "text": f"article {number}"})
            moto.sqs.send_message(QueueUrl=queue.url, MessageBody=body)
        settings = WorkSettings(
            QueueSettings(queue.url, gather_s=0.2, max_messages=4, idle_exit_s=20),
            str(tmp_path / "out"),
            ModelSettings(str(model), dtype="float32"),
            ReadSettings(),
            PredictSettings(),
            CutSettings(),
        )
        with Metrics("queue") as metrics:
            summary = work_side_by_side(settings, ("cpu", "cpu"), threading.Event(), metrics)
    assert summary.messages["received"] == summary.messages["deleted"] == 4
    assert summary.counts.num_labelled == 4
    labelled = ds.dataset(tmp_path / "out", ignore_prefixes=["_"]).to_table(columns=["id"])
    assert sorted(labelled["id"].to_pylist()) == ["0", "1", "2", "3"]
