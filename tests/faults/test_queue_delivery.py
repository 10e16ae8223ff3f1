"""Faults 2, 12 and 19 to 23 of a queue: kills, timeouts, receipts, replies that get lost."""

import json
from collections.abc import Iterator

import pyarrow as pa
import pytest
import servers
from fault_proxy import FaultProxy
from fault_rules import Delay, Edit, Fault, Forward, Hold, LoseReply, Match
from faults.commands import COMMIT, END_S, START_S, Enqueue, Verify, end_of, impatient, kill
from faults.inputs import articles, as_csv
from faults.places import S3Place, labels_of
from faults.queues import (
    DELETE,
    HEARTBEAT,
    NEVER_EXTENDED,
    RECEIVE,
    UNTIL_IDLE,
    VISIBILITY_S,
    BatchSpy,
    ReceiveSpy,
    StartWork,
    Work,
    article_messages,
    each_message_once,
    shard_message,
)
from servers import Endpoint, Queue

# More than two visibility timeouts long: heartbeats come at half of one or later.
LONG_HEARTBEATS = 5
# Until a reply counts as stalled: three visibility timeouts, in place of a minute.
STALLED_S = 3 * VISIBILITY_S


@pytest.fixture(params=["standard", "fifo"])
def any_queue(request: pytest.FixtureRequest, s3_server: Endpoint) -> Iterator[Queue]:
    with servers.fresh_queue(s3_server, fifo=request.param == "fifo") as fresh:
        yield fresh


def test_2_killed_after_the_commit_of_a_shard_its_message_is_skipped_and_deleted_next_time(
    s3: S3Place,
    proxy: FaultProxy,
    queue: Queue,
    start_work: StartWork,
    work: Work,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    queue.send(shard_message(s3, s3.write("news.csv", as_csv(news)), news.num_rows))
    held = proxy.add(Fault(COMMIT, Hold("after")))
    process = start_work(s3, queue)
    proxy.wait_for(held, START_S)
    kill(process)
    proxy.clear()
    assert queue.backlog().total == 1
    again = work(s3, queue, "--max-messages", "1")
    assert (again.exit_code, again.num_committed, again.num_done_before) == (0, 0, 1)
    assert queue.backlog().total == 0
    assert len(s3.visible()) == 1
    assert labels_of(s3) == expected_labels


def test_2_killed_after_the_commit_of_articles_none_is_lost(
    s3: S3Place,
    proxy: FaultProxy,
    any_queue: Queue,
    start_work: StartWork,
    work: Work,
    verify: Verify,
) -> None:
    sent = any_queue.send(*article_messages(articles(10)))
    held = proxy.add(Fault(DELETE, Hold("before")))
    process = start_work(s3, any_queue)
    proxy.wait_for(held, START_S)
    kill(process)
    proxy.clear()
    again = work(s3, any_queue, *UNTIL_IDLE)
    assert again.exit_code == 0
    assert any_queue.backlog().total == 0
    assert sorted(each_message_once(s3)) == sorted(sent)
    assert verify(s3).exit_code == 0


def test_12_while_a_stalled_read_is_waited_out_the_message_stays_held(
    s3: S3Place, proxy: FaultProxy, queue: Queue, work: Work, news: pa.Table
) -> None:
    source = s3.write("news.csv", as_csv(news))
    received = ReceiveSpy().watch(proxy)
    beats = proxy.add(Fault(HEARTBEAT, Forward()))
    stalled = proxy.add(
        Fault(Match(operation="GetObject", path="/in/"), Delay(STALLED_S + 5), times=1)
    )
    queue.send(shard_message(s3, source, news.num_rows))
    run = work(s3, queue, "--max-messages", "1", env=impatient(STALLED_S))
    assert run.exit_code == 0
    assert proxy.hits(stalled) == 1
    assert proxy.hits(beats) >= STALLED_S // VISIBILITY_S
    assert len(received.message_ids) == 1
    assert len(labels_of(s3)) == news.num_rows


def test_19_what_takes_longer_than_the_timeout_is_delivered_once(
    s3: S3Place, proxy: FaultProxy, queue: Queue, start_work: StartWork
) -> None:
    """Both what is in work and what waits its turn behind it."""
    sent = queue.send(*article_messages(articles(10)))
    received = ReceiveSpy().watch(proxy)
    beats = proxy.add(Fault(HEARTBEAT, Forward()))
    hold = Hold("before")
    held = proxy.add(Fault(COMMIT, hold, times=1))
    process = start_work(s3, queue, "--gather-rows", "5", "--max-messages", "10")
    proxy.wait_for(held, START_S)
    proxy.wait_for(beats, END_S, times=proxy.hits(beats) + LONG_HEARTBEATS)
    hold.release()
    assert end_of(process).exit_code == 0
    assert sorted(received.message_ids) == sorted(sent)
    rows = s3.rows()
    assert sorted(rows["message_id"].to_pylist()) == sorted(sent)
    assert set(rows["receive_count"].to_pylist()) == {1}
    assert queue.backlog().total == 0


def test_20_a_message_whose_heartbeat_fails_is_abandoned_alone(
    s3: S3Place, proxy: FaultProxy, queue: Queue, start_work: StartWork
) -> None:
    tables = [articles(20, seed=seed) for seed in range(2)]
    for seed, table in enumerate(tables):
        source = s3.write(f"news-{seed}.csv", as_csv(table))
        queue.send(shard_message(s3, source, table.num_rows))
    deleted = BatchSpy(DELETE).watch(proxy)
    lost: list[str] = []

    def fails(handle: str) -> bool:
        """The first that is seen, for ever."""
        if not lost:
            lost.append(handle)
        return handle in lost

    beats = BatchSpy(HEARTBEAT, fails, code="ReceiptHandleIsInvalid", sender_fault=True).watch(
        proxy
    )
    hold = Hold("before")
    proxy.add(Fault(COMMIT, hold, times=1))
    process = start_work(s3, queue, *UNTIL_IDLE)
    proxy.wait_for(beats.fault, START_S, times=2)
    hold.release()
    run = end_of(process)
    assert run.exit_code == 0
    assert "abandon" in run.said
    assert beats.failed
    assert set(lost).isdisjoint(deleted.seen)
    assert queue.backlog().total == 0
    assert queue.dead_letters() == []
    assert sorted(labels_of(s3)) == sorted(pa.concat_tables(tables)["id"].to_pylist())


def test_21_a_delete_with_a_stale_receipt_costs_a_redelivery_and_no_more(
    s3: S3Place,
    proxy: FaultProxy,
    queue: Queue,
    work: Work,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    queue.send(shard_message(s3, s3.write("news.csv", as_csv(news)), news.num_rows))
    received = ReceiveSpy().watch(proxy)
    stale = BatchSpy(
        DELETE,
        lambda handle: handle == received.handles[0],
        code="ReceiptHandleIsInvalid",
        sender_fault=True,
    ).watch(proxy)
    run = work(s3, queue, *UNTIL_IDLE)
    assert run.exit_code == 0
    assert stale.failed
    assert len(received.message_ids) == 2
    assert queue.backlog().total == 0
    assert len(s3.visible()) == 1
    assert labels_of(s3) == expected_labels


def test_22_entries_of_a_delete_that_fail_are_sent_again_alone(
    s3: S3Place, proxy: FaultProxy, queue: Queue, work: Work
) -> None:
    sent = queue.send(*article_messages(articles(10)))
    received = ReceiveSpy().watch(proxy)
    failing: set[str] = set()

    def fails(handle: str) -> bool:
        """Two of them, once each."""
        if handle in failing or len(failing) == 2:
            return False
        failing.add(handle)
        return True

    deleted = BatchSpy(DELETE, fails).watch(proxy)
    run = work(s3, queue, *UNTIL_IDLE)
    assert run.exit_code == 0
    assert len(deleted.failed) == 2
    assert sorted(deleted.seen) == sorted([*received.handles, *deleted.failed])
    assert sorted(received.message_ids) == sorted(sent)
    assert queue.backlog().total == 0


def test_22_entries_of_a_release_that_fail_are_sent_again_alone(
    s3: S3Place, proxy: FaultProxy, queue: Queue, work: Work
) -> None:
    """Articles with a row that cannot be labelled, all of one set."""
    poison = sorted(f'{{"id": "{number}", "text": ""}}' for number in range(5))
    queue.send(*poison)
    received = ReceiveSpy().watch(proxy)
    failing: set[str] = set()

    def fails(handle: str) -> bool:
        """Two of them, once each."""
        if handle in failing or len(failing) == 2:
            return False
        failing.add(handle)
        return True

    released = BatchSpy(HEARTBEAT, fails).watch(proxy)
    run = work(s3, queue, *UNTIL_IDLE, *NEVER_EXTENDED, "--on-error", "fail")
    assert run.exit_code == 0
    assert len(released.failed) == 2
    assert sorted(released.seen) == sorted([*received.handles, *released.failed])
    assert run.answer["messages"]["abandoned"] == 0
    assert queue.dead_letters() == poison


def test_22_entries_of_a_send_that_fail_are_sent_again_alone(
    s3: S3Place, proxy: FaultProxy, queue: Queue, enqueue: Enqueue, news: pa.Table
) -> None:
    source = s3.write("news.csv", as_csv(news))
    sent: list[str] = []
    failing: list[str] = []

    def one_less(body: bytes) -> bytes:
        """The queue does not get the third message of the first call."""
        call = json.loads(body)
        sent.extend(entry["MessageBody"] for entry in call["Entries"])
        if not failing:
            failing.append(call["Entries"].pop(2)["Id"])
        return json.dumps(call).encode()

    def say_so(body: bytes) -> bytes:
        answer = json.loads(body)
        if len(sent) == 6:
            answer["Failed"] = [{"Id": failing[0], "SenderFault": False, "Code": "InternalError"}]
        return json.dumps(answer).encode()

    proxy.add(Fault(Match(operation="SendMessageBatch"), Edit(one_less, say_so)))
    run = enqueue(s3, queue, source, "--rows-per-shard", "10")
    assert (run.exit_code, run.answer["num_sent"]) == (0, 6)
    assert sent == [*sent[:6], sent[2]]
    assert len(set(sent)) == 6
    assert queue.backlog().total == 6


def test_23_what_was_in_a_lost_reply_to_a_receive_comes_again(
    s3: S3Place, proxy: FaultProxy, any_queue: Queue, work: Work
) -> None:
    sent = any_queue.send(*article_messages(articles(10)))
    lost = proxy.add(Fault(RECEIVE, LoseReply(), times=1))
    run = work(s3, any_queue, *UNTIL_IDLE)
    assert run.exit_code == 0
    assert proxy.hits(lost) == 1
    assert sorted(each_message_once(s3)) == sorted(sent)
    assert any_queue.backlog().total == 0
    assert any_queue.dead_letters() == []
