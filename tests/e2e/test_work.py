"""`batchclf enqueue` and `batchclf work`: what a queue's messages hold, labelled and deleted."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_plus
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from e2e import archives
from e2e.conftest import QUIET
from servers import Endpoint, Queue

if TYPE_CHECKING:
    from conftest import RunBatchclf, StartBatchclf
    from e2e.conftest import Classify

DEADLINE_S = 60.0
POLL_S = 0.1
MAX_RECEIVE_COUNT = 2
ODD_KEY = "in/2024/a b+c%20ü=(1).csv"
NUM_ARTICLES = 12
UNTIL_IDLE = ("--idle-exit", "2", "--gather-seconds", "0.5", "--retry-delay", "0")
TOLD = ("MessagesReceived", "ArticlesLabelled", "MessagesDeleted")
SECRET = "Zanzibar"
JUNK = (
    f"not JSON: {SECRET}",
    f'"{SECRET}"',
    f'{{"id": "no text, {SECRET}"}}',
    f'{{"batchclf": 1, "source": "s3://not-allowed/a.csv", "more": "{SECRET}"}}',
)


@dataclass(frozen=True)
class Site:
    """A bucket and a queue, and what was run on them."""

    server: Endpoint
    bucket: str
    queue: Queue

    @property
    def output(self) -> str:
        return f"s3://{self.bucket}/out"

    def depth(self) -> tuple[int, int]:
        """Messages that wait, and those in flight."""
        backlog = self.queue.backlog()
        return backlog.num_visible, backlog.num_in_flight

    def rows(self) -> dict[str, pa.Table]:
        """All labelled files by their names."""
        pages = self.server.s3.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix="out/"
        )
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {
            key.rsplit("/", 1)[-1]: pq.read_table(
                pa.BufferReader(
                    self.server.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
                )
            )
            for key in keys
            if key.endswith(".parquet")
        }

    def articles(self) -> list[dict[str, Any]]:
        """Rows of articles, of all sets."""
        tables = [table for table in self.rows().values() if "message_id" in table.column_names]
        return [row for table in tables for row in table.to_pylist()]

    def work(self, model: Path, *args: str) -> tuple[str, ...]:
        return (
            *("work", "--queue", self.queue.url, "--output", self.output),
            *("--model", str(model), "--dtype", "float32"),
            *("--allow-source", f"s3://{self.bucket}/in", "--log-format", "json", *args),
        )


@contextmanager
def made_site(server: Endpoint, *, fifo: bool = False) -> Iterator[Site]:
    with (
        servers.fresh_bucket(server) as bucket,
        servers.fresh_queue(server, fifo=fifo, max_receive_count=MAX_RECEIVE_COUNT) as queue,
    ):
        yield Site(server, bucket, queue)


@pytest.fixture(scope="module")
def site(s3_server: Endpoint) -> Iterator[Site]:
    with made_site(s3_server) as made:
        yield made


@pytest.fixture
def fresh(s3_server: Endpoint) -> Iterator[Site]:
    with made_site(s3_server) as made:
        yield made


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def bodies(count: int) -> list[str]:
    return [json.dumps(row, default=str) for row in archives.articles(count)]


def event(bucket: str, key: str) -> str:
    """What S3 sends of a new object."""
    s3 = {"bucket": {"name": bucket}, "object": {"key": quote_plus(key, safe="/")}}
    return json.dumps({"Records": [{"eventName": "ObjectCreated:Put", "s3": s3}]})


@dataclass(frozen=True)
class Worked:
    """One worker that was given every kind of message, and has left the queue empty."""

    site: Site
    enqueued: subprocess.CompletedProcess[str]
    done: subprocess.CompletedProcess[str]
    message_ids: list[str]

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.done.stdout)
        return found


@pytest.fixture(scope="module")
def worked(
    site: Site,
    run_batchclf: "RunBatchclf",
    archive: Path,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Worked:
    s3, bucket = site.server.s3, site.bucket
    s3.upload_file(str(archive / "a.parquet"), bucket, "in/2024/a.parquet")
    odd = archives.write(tmp_path_factory.mktemp("odd") / "odd.csv", archives.articles(3, seed=5))
    env = {**QUIET, **site.server.env}
    enqueued = run_batchclf(
        *("enqueue", f"s3://{bucket}/in/2024/", "--queue", site.queue.url, "--rows-per-shard", "4"),
        env=env,
    )
    s3.upload_file(str(odd), bucket, ODD_KEY)
    long = json.dumps({"id": "long", "text": "A long story. " * 1000})
    s3.put_object(Bucket=bucket, Key="in/bodies/1", Body=long.encode())
    pointer = [
        "software.amazon.payloadoffloading.PayloadS3Pointer",
        {"s3BucketName": bucket, "s3Key": "in/bodies/1"},
    ]
    notification = {
        "Type": "Notification",
        "TopicArn": "arn:aws:sns:us-east-1:1:news",
        "Message": json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent"}),
    }
    articles = [*bodies(NUM_ARTICLES), '{"id": 7, "text": null}', json.dumps(pointer)]
    site.queue.send(event(bucket, ODD_KEY), json.dumps(notification), *JUNK)
    message_ids = site.queue.send(*articles)
    done = run_batchclf(*site.work(model, *UNTIL_IDLE), env=env)
    return Worked(site, enqueued, done, message_ids)


def test_an_empty_queue_ends_the_worker_well(worked: Worked) -> None:
    assert worked.done.returncode == 0, worked.done.stderr


def test_a_message_is_sent_for_every_shard(worked: Worked) -> None:
    assert worked.enqueued.returncode == 0, worked.enqueued.stderr
    assert "sent 3 shards with 10 rows" in worked.enqueued.stdout


def test_what_is_done_is_deleted_and_what_cannot_be_goes_to_the_dead_letters(
    worked: Worked,
) -> None:
    assert worked.done.returncode == 0, worked.done.stderr
    assert worked.site.depth() == (0, 0)
    assert worked.site.queue.dead_letters() == sorted(JUNK)


def test_files_behind_messages_are_labelled_whole(worked: Worked) -> None:
    shapes = {
        name.split("-")[0]: sorted(
            (int(name.split("-")[-2]), table.num_rows)
            for name, table in worked.site.rows().items()
            if name.startswith(f"{stem}-")
        )
        for name in worked.site.rows()
        for stem in [name.split("-")[0]]
        if "message_id" not in worked.site.rows()[name].column_names
    }
    assert shapes["a.parquet"] == [(0, 4), (4, 4), (8, 2)]
    assert [rows for key, rows in shapes.items() if key.endswith(".csv")] == [[(0, 3)]]


def test_every_article_is_a_row_that_names_its_message(worked: Worked) -> None:
    rows = worked.site.articles()
    assert sorted(row["message_id"] for row in rows) == sorted(worked.message_ids)
    by_id = {row["id"]: row for row in rows}
    assert all(by_id[f"a-{number:04}"]["label"] for number in range(NUM_ARTICLES))
    assert by_id["7"]["error"].startswith("null_text")
    assert by_id["long"]["truncated"]
    assert {row["receive_count"] for row in rows} == {1}


def test_the_summary_counts_messages_and_rows(worked: Worked) -> None:
    done = 3 + 2 + len(worked.message_ids)  # shards, event and test event, articles
    assert worked.summary["messages"]["deleted"] == done
    assert worked.summary["messages"]["refused"] == len(JUNK) * MAX_RECEIVE_COUNT
    assert worked.summary["num_shards"] == {"committed": 4, "done_before": 0}
    assert worked.summary["counts"]["num_rows"] == 10 + 3 + len(worked.message_ids)


def test_refusals_are_logged_with_message_and_reason(worked: Worked) -> None:
    refused = [line for line in json_lines(worked.done.stderr) if line["level"] == "error"]
    assert len(refused) == len(JUNK) * MAX_RECEIVE_COUNT
    assert all(
        {"message_id", "receive_count", "reason", "delay_s"} <= set(line) for line in refused
    )


def test_bodies_of_refused_messages_reach_no_log_at_level_info(worked: Worked) -> None:
    assert SECRET not in worked.done.stdout + worked.done.stderr


def test_level_debug_shows_how_the_bodies_of_refused_messages_begin(
    fresh: Site, run_batchclf: "RunBatchclf", model: Path
) -> None:
    long = f'["{SECRET}", {"1, " * 20_000}1]'
    fresh.queue.send(*JUNK, long)
    done = run_batchclf(
        *fresh.work(model, "--max-messages", str(len(JUNK) + 1), "--log-level", "debug"),
        env={**QUIET, **fresh.server.env},
    )
    assert done.returncode == 0, done.stderr
    begins = [line["body_begins"] for line in json_lines(done.stderr) if "body_begins" in line]
    assert sorted(begins) == sorted([*JUNK, long[:200]])
    assert SECRET not in done.stdout
    assert len(done.stderr) < 10_000


def test_classify_with_the_same_settings_finds_the_shards_done(
    worked: Worked, classify: "Classify"
) -> None:
    site = worked.site
    done = classify(
        *(f"s3://{site.bucket}/in/2024/a.parquet", "--output", site.output),
        *("--rows-per-shard", "4", "--log-format", "json"),
        env=site.server.env,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_shards"]["done_before"] == 3


def test_verify_finds_the_output_whole_however_its_input_was_cut(
    worked: Worked, run_batchclf: "RunBatchclf"
) -> None:
    site = worked.site
    done = run_batchclf(
        *("verify", worked.summary["output"], f"s3://{site.bucket}/in/2024/a.parquet"),
        env={**QUIET, **site.server.env},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for(what: "subprocess.Popen[str]", log: Path, text: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while text not in (log.read_text() if log.exists() else ""):
        assert what.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(POLL_S)


def test_an_article_sent_to_an_idle_worker_is_labelled_without_waiting_for_more(
    fresh: Site, start_batchclf: "StartBatchclf", model: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    worker = start_batchclf(
        *fresh.work(model, "--gather-seconds", "0.5", "--metrics-port", "0"),
        env={**QUIET, **fresh.server.env},
        log=log,
    )
    wait_for(worker, log, "working on")
    (message_id,) = fresh.queue.send(*bodies(1))
    wait_for(worker, log, "committed")
    assert [row["message_id"] for row in fresh.articles()] == [message_id]
    (port,) = [line["port"] for line in json_lines(log.read_text()) if "port" in line]
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        told = reply.read().decode()
    name = fresh.queue.url.rpartition("/")[2]
    assert f'batchclf_messages_received_total{{queue="{name}"}} 1.0' in told
    assert f'batchclf_articles_labelled_total{{queue="{name}"}} 1.0' in told
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE_S) == 75
    assert fresh.depth() == (0, 0)


def test_a_worker_leaves_after_as_many_messages_as_it_was_told_to_take(
    fresh: Site, run_batchclf: "RunBatchclf", model: Path
) -> None:
    fresh.queue.send(*bodies(5))
    done = run_batchclf(
        *fresh.work(model, "--max-messages", "3", "--metrics", "emf"),
        env={**QUIET, **fresh.server.env},
    )
    assert done.returncode == 0, done.stderr
    assert (len(fresh.articles()), fresh.depth()) == (3, (2, 0))
    (numbers,) = map(json.loads, done.stdout.splitlines())
    assert {name: numbers[name] for name in TOLD} == dict.fromkeys(TOLD, 3)


def test_a_row_with_an_error_fails_its_message_alone(
    fresh: Site, run_batchclf: "RunBatchclf", model: Path
) -> None:
    fresh.queue.send(*bodies(4), '{"id": "bad", "text": ""}')
    done = run_batchclf(
        *fresh.work(model, *UNTIL_IDLE, "--on-error", "fail"), env={**QUIET, **fresh.server.env}
    )
    assert done.returncode == 0, done.stderr
    assert sorted(row["id"] for row in fresh.articles()) == [f"a-{n:04}" for n in range(4)]
    assert fresh.queue.dead_letters() == ['{"id": "bad", "text": ""}']


def test_a_dry_run_receives_and_writes_nothing(
    fresh: Site, run_batchclf: "RunBatchclf", model: Path
) -> None:
    fresh.queue.send(*bodies(2))
    done = run_batchclf(*fresh.work(model, "--dry-run"), env={**QUIET, **fresh.server.env})
    assert done.returncode == 0, done.stderr
    assert "about 2 waiting" in done.stdout
    assert fresh.depth() == (2, 0)
    assert "Contents" not in fresh.server.s3.list_objects_v2(Bucket=fresh.bucket)


def test_a_fifo_queue_takes_each_shard_once_and_is_worked_off(
    s3_server: Endpoint, run_batchclf: "RunBatchclf", archive: Path, model: Path
) -> None:
    with made_site(s3_server, fifo=True) as site:
        for name in ("a.parquet", "b.csv"):
            s3_server.s3.upload_file(str(archive / name), site.bucket, f"in/{name}")
        env = {**QUIET, **s3_server.env}
        command = ("enqueue", f"s3://{site.bucket}/in/", "--rows-per-shard", "4")
        for _ in range(2):
            sent = run_batchclf(*command, "--queue", site.queue.url, env=env)
            assert sent.returncode == 0, sent.stderr
        assert site.depth() == (5, 0)
        done = run_batchclf(*site.work(model, *UNTIL_IDLE), env=env)
        assert done.returncode == 0, done.stderr
        assert sum(table.num_rows for table in site.rows().values()) == 17
        assert site.depth() == (0, 0)


def test_inputs_on_this_machine_are_not_sent(run_batchclf: "RunBatchclf", archive: Path) -> None:
    done = run_batchclf("enqueue", archive, "--queue", "https://sqs.eu-west-1.amazonaws.com/1/a")
    assert done.returncode == 64
    assert "must be on S3" in done.stderr


def test_an_output_that_messages_may_point_to_is_refused(
    run_batchclf: "RunBatchclf", model: Path
) -> None:
    done = run_batchclf(
        *("work", "--queue", "https://sqs.eu-west-1.amazonaws.com/1/a", "--model", model),
        *("--output", "s3://news/in/out", "--allow-source", "s3://news/in"),
    )
    assert done.returncode == 64
    assert "lies inside an --allow-source" in done.stderr
