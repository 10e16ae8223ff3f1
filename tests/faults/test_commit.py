"""Faults 5, 6, 7 and 13: a shard is committed once, whatever the store answers."""

import signal
from pathlib import Path

import pyarrow as pa
from fault_proxy import FaultProxy
from fault_rules import Fault, Hold, LoseReply, Match, Status
from faults.commands import (
    CALL_OF_LINK,
    COMMIT,
    START_S,
    Classify,
    StartClassify,
    at_call,
    end_of,
    wait_until_stopped,
)
from faults.inputs import PARTS_BYTES, as_csv, as_parquet, with_blob
from faults.places import LocalPlace, S3Place, labels_of
from servers import Endpoint, fresh_bucket

COMPLETE = Match(operation="CompleteMultipartUpload")


def test_5_two_workers_on_one_shard_both_succeed_and_leave_one_object_on_s3(
    s3: S3Place,
    proxy: FaultProxy,
    start_classify: StartClassify,
    classify: Classify,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    source = s3.write("news.csv", as_csv(news))
    hold = Hold("before")
    held = proxy.add(Fault(COMMIT, hold, times=1))
    slow = start_classify(s3, source)
    proxy.wait_for(held, START_S)
    fast = classify(s3, source)
    assert (fast.exit_code, fast.num_committed) == (0, 1)
    hold.release()
    late = end_of(slow)
    assert (late.exit_code, late.num_committed, late.num_done_before) == (0, 0, 1)
    assert len(s3.visible()) == 1
    assert labels_of(s3) == expected_labels


def test_5_two_workers_on_one_shard_both_succeed_and_leave_one_local_file(
    local: LocalPlace,
    start_classify: StartClassify,
    classify: Classify,
    tmp_path: Path,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    source = local.write("news.csv", as_csv(news))
    stop = at_call(CALL_OF_LINK, signal.SIGSTOP, local.folder, tmp_path / "calls")
    slow = start_classify(local, source, env=stop)
    wait_until_stopped(slow)
    fast = classify(local, source)
    assert (fast.exit_code, fast.num_committed) == (0, 1)
    slow.send_signal(signal.SIGCONT)
    late = end_of(slow)
    assert (late.exit_code, late.num_committed, late.num_done_before) == (0, 0, 1)
    assert len(local.visible()) == 1
    assert labels_of(local) == expected_labels


def test_6_when_the_reply_to_the_commit_is_lost_the_nonce_tells_that_it_was_ours(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table
) -> None:
    source = s3.write("news.csv", as_csv(news))
    lost = proxy.add(Fault(COMMIT, LoseReply(), times=1))
    run = classify(s3, source)
    assert proxy.hits(lost) == 1
    assert (run.exit_code, run.num_committed, run.num_done_before) == (0, 1, 0)
    assert len(s3.visible()) == 1


def test_6_when_the_reply_to_the_end_of_a_multipart_upload_is_lost_it_was_ours(
    s3: S3Place, proxy: FaultProxy, classify: Classify
) -> None:
    source = s3.write("wide.parquet", as_parquet(with_blob(PARTS_BYTES)))
    lost = proxy.add(Fault(COMPLETE, LoseReply(), times=1))
    run = classify(s3, source, "--keep-columns", "blob")
    assert proxy.hits(lost) == 1
    assert (run.exit_code, run.num_committed, run.num_done_before) == (0, 1, 0)
    assert len(s3.visible()) == 1


def test_7_a_conflict_on_the_commit_is_tried_again(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table
) -> None:
    source = s3.write("news.csv", as_csv(news))
    conflict = proxy.add(Fault(COMMIT, Status(409), times=2))
    run = classify(s3, source)
    assert proxy.hits(conflict) == 2
    assert (run.exit_code, run.num_committed) == (0, 1)
    assert len(proxy.log(COMMIT)) == 3


def test_7_after_a_conflict_a_multipart_upload_starts_anew(
    s3: S3Place, proxy: FaultProxy, classify: Classify
) -> None:
    source = s3.write("wide.parquet", as_parquet(with_blob(PARTS_BYTES)))
    conflict = proxy.add(Fault(COMPLETE, Status(409), times=1))
    run = classify(s3, source, "--keep-columns", "blob")
    assert proxy.hits(conflict) == 1
    assert (run.exit_code, run.num_committed) == (0, 1)
    assert len(proxy.log(Match(operation="CreateMultipartUpload"))) == 2
    assert len(proxy.log(Match(operation="AbortMultipartUpload"))) == 1
    assert "Uploads" not in s3.server.s3.list_multipart_uploads(Bucket=s3.bucket)


def test_7_a_conflict_for_ever_ends_in_try_again(
    s3: S3Place, proxy: FaultProxy, classify: Classify, news: pa.Table
) -> None:
    source = s3.write("news.csv", as_csv(news))
    proxy.add(Fault(COMMIT, Status(409)))
    run = classify(s3, source)
    assert run.exit_code == 75
    assert "another write of this object" in run.said
    assert s3.visible() == []


def test_7_what_another_worker_committed_meanwhile_ends_the_trying(
    s3: S3Place,
    proxy: FaultProxy,
    start_classify: StartClassify,
    classify: Classify,
    news: pa.Table,
) -> None:
    source = s3.write("news.csv", as_csv(news))
    hold = Hold("before")
    held = proxy.add(Fault(COMMIT, hold, times=1))
    slow = start_classify(s3, source)
    proxy.wait_for(held, START_S)
    assert classify(s3, source).num_committed == 1
    proxy.add(Fault(COMMIT, Status(409), times=1))
    hold.drop()
    assert end_of(slow).num_done_before == 1


def test_13_a_store_that_ignores_conditions_is_refused_at_the_start(
    rclone: Endpoint, classify: Classify, news: pa.Table
) -> None:
    with fresh_bucket(rclone) as bucket:
        place = S3Place(rclone, bucket)
        run = classify(place, place.write("news.csv", as_csv(news)))
        assert run.exit_code == 64
        assert "this store ignores If-None-Match" in run.said
        assert place.names() == []
