"""Faults 1, 3 and 4: SIGKILL before the commit, inside an upload, at each local system call."""

import signal
from pathlib import Path

import pyarrow as pa
import pytest
from fault_proxy import FaultProxy
from fault_rules import Fault, Hold, Match
from faults.commands import COMMIT, START_S, Classify, StartClassify, Verify, at_call, kill
from faults.inputs import PARTS_BYTES, articles, as_csv, as_parquet, with_blob
from faults.places import LocalPlace, S3Place, labels_of, temporary

# What a run over one shard calls on its output, in order: fsync, link, unlink or replace.
PROBE = ["fsync", "link", "unlink", "fsync", "fsync", "link", "fsync", "unlink", "unlink", "unlink"]
COMMIT_SHARD = ["fsync", "link", "unlink", "fsync", "unlink"]
NOTE = ["fsync", "replace", "fsync", "unlink"]
CALLS = [*PROBE, *COMMIT_SHARD, *NOTE, *NOTE]


def test_1_killed_before_the_commit_nothing_is_visible_on_s3_and_the_next_run_does_it(
    s3: S3Place,
    proxy: FaultProxy,
    start_classify: StartClassify,
    classify: Classify,
    verify: Verify,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    source = s3.write("news.csv", as_csv(news))
    held = proxy.add(Fault(COMMIT, Hold("before")))
    process = start_classify(s3, source)
    proxy.wait_for(held, START_S)
    kill(process)
    proxy.clear()
    assert s3.visible() == []
    assert s3.rows().num_rows == 0
    assert classify(s3, source).exit_code == 0
    assert labels_of(s3) == expected_labels
    assert temporary(s3) == []
    assert verify(s3, source).exit_code == 0


def test_2_killed_after_the_commit_the_next_run_finds_it_done(
    s3: S3Place,
    proxy: FaultProxy,
    start_classify: StartClassify,
    classify: Classify,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    source = s3.write("news.csv", as_csv(news))
    held = proxy.add(Fault(COMMIT, Hold("after")))
    process = start_classify(s3, source)
    proxy.wait_for(held, START_S)
    kill(process)
    proxy.clear()
    again = classify(s3, source)
    assert (again.exit_code, again.num_committed, again.num_done_before) == (0, 0, 1)
    assert labels_of(s3) == expected_labels


@pytest.mark.parametrize(
    "moment",
    [
        Match(operation="UploadPart", query={"partNumber": "^2$"}),
        Match(operation="CompleteMultipartUpload"),
    ],
    ids=["second-part", "complete"],
)
def test_3_killed_inside_a_multipart_upload_nothing_is_visible_and_the_next_run_does_it(
    s3: S3Place,
    proxy: FaultProxy,
    start_classify: StartClassify,
    classify: Classify,
    verify: Verify,
    moment: Match,
) -> None:
    source = s3.write("wide.parquet", as_parquet(with_blob(PARTS_BYTES)))
    held = proxy.add(Fault(moment, Hold("before")))
    process = start_classify(s3, source, "--keep-columns", "blob")
    proxy.wait_for(held, START_S)
    kill(process)
    proxy.clear()
    assert s3.visible() == []
    assert s3.rows().num_rows == 0
    assert classify(s3, source, "--keep-columns", "blob").num_committed == 1
    assert verify(s3, source).answer["counts"]["num_labelled"] == 16


def test_4_a_run_makes_the_calls_that_it_is_killed_at_below(
    local: LocalPlace, classify: Classify, tmp_path: Path
) -> None:
    source = local.write("news.csv", as_csv(articles(5)))
    log = tmp_path / "calls"
    assert classify(local, source, env=at_call(0, 0, local.folder, log)).exit_code == 0
    assert [line.split()[0] for line in log.read_text().splitlines()] == CALLS


@pytest.mark.parametrize("number", range(1, len(CALLS) + 1))
def test_4_killed_at_a_system_call_all_is_as_before_or_complete(
    local: LocalPlace,
    start_classify: StartClassify,
    classify: Classify,
    tmp_path: Path,
    number: int,
) -> None:
    table = articles(5)
    source = local.write("news.csv", as_csv(table))
    env = at_call(number, signal.SIGKILL, local.folder, tmp_path / "calls")
    process = start_classify(local, source, env=env)
    assert process.wait() == -signal.SIGKILL
    complete = number > len(PROBE) + COMMIT_SHARD.index("unlink")
    assert local.rows().num_rows == (table.num_rows if complete else 0)
    again = classify(local, source)
    assert (again.exit_code, again.num_committed) == (0, 0 if complete else 1)
    assert sorted(labels_of(local)) == table["id"].to_pylist()
    assert temporary(local) == []
