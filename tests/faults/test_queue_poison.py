"""Faults 14, 16, 17, 24 and 25 of a queue: messages that cannot be done, and all that can."""

import json

import pyarrow as pa
import pytest
from fault_proxy import FaultProxy
from fault_rules import Edit, Exchange, Fault, FlipReply, Match, Status
from faults.commands import COMMIT, FEW_ATTEMPTS, Enqueue
from faults.inputs import articles, as_csv, as_jsonl, as_parquet
from faults.places import S3Place, labels_of
from faults.queues import (
    DELETE,
    HEARTBEAT,
    HELD_FOR_LONG,
    JUNK,
    RECEIVE,
    UNTIL_IDLE,
    BatchSpy,
    ReceiveSpy,
    Work,
    article_messages,
    notify,
    shard_message,
    wait_for_visible,
)
from servers import Endpoint, Queue, fresh_queue

POINTER = "software.amazon.payloadoffloading.PayloadS3Pointer"
EXPIRED = Status(400, code="ExpiredToken", message="The token has expired.")


def test_14_a_source_that_may_not_be_read_goes_to_the_dead_letters_and_the_others_go_on(
    s3: S3Place, proxy: FaultProxy, queue: Queue, work: Work, news: pa.Table
) -> None:
    others = articles(5, seed=1)
    refused = shard_message(s3, s3.write("news.csv", as_csv(news)), news.num_rows)
    queue.send(refused)
    queue.send(shard_message(s3, s3.write("others.csv", as_csv(others)), others.num_rows))
    proxy.add(Fault(Match(operation="GetObject", path="/in/news.csv"), Status(403)))
    run = work(s3, queue, *UNTIL_IDLE)
    assert run.exit_code == 0
    assert "the store answered 403 AccessDenied" in run.said
    assert queue.dead_letters() == [refused]
    assert list(labels_of(s3)) == others["id"].to_pylist()


@pytest.mark.parametrize(
    ("match", "answer"),
    [(COMMIT, Status(403)), (COMMIT, EXPIRED), (Match(operation="GetObject"), EXPIRED)],
    ids=["output-403", "output-expired", "input-expired"],
)
def test_14_a_worker_that_is_refused_gives_its_messages_back(
    s3: S3Place,
    proxy: FaultProxy,
    queue: Queue,
    work: Work,
    news: pa.Table,
    match: Match,
    answer: Status,
) -> None:
    queue.send(shard_message(s3, s3.write("news.csv", as_csv(news)), news.num_rows))
    proxy.add(Fault(match, answer))
    run = work(s3, queue, *HELD_FOR_LONG)
    assert run.exit_code == 64
    assert answer.code is None or "the credentials are not accepted" in run.said
    wait_for_visible(queue, 1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Status(403, code="AccessDenied"), "AccessDenied"),
        (Status(403, code="ExpiredToken"), "the credentials are not accepted"),
        (Status(400, code="AWS.SimpleQueueService.NonExistentQueue"), "there is no such queue"),
    ],
    ids=["denied", "expired", "no-queue"],
)
def test_14_a_queue_that_refuses_a_worker_is_an_error_of_configuration(
    s3: S3Place, proxy: FaultProxy, queue: Queue, work: Work, answer: Status, words: str
) -> None:
    proxy.add(Fault(RECEIVE, answer))
    run = work(s3, queue, *UNTIL_IDLE)
    assert run.exit_code == 64
    assert words in run.said


@pytest.mark.parametrize(
    ("answer", "exit_code"),
    [(Status(403, code="AccessDenied"), 64), (Status(503), 75)],
    ids=["denied", "503"],
)
def test_14_a_worker_whose_last_delete_fails_says_so_and_gives_the_message_back(
    s3: S3Place, proxy: FaultProxy, queue: Queue, work: Work, answer: Status, exit_code: int
) -> None:
    """The rows are committed, and the message comes again: whoever started it has to know."""
    queue.send(*article_messages(articles(1)))
    proxy.add(Fault(DELETE, answer))
    run = work(s3, queue, *HELD_FOR_LONG, "--max-messages", "1", env=FEW_ATTEMPTS)
    assert run.exit_code == exit_code, run.said
    assert len(labels_of(s3)) == 1
    wait_for_visible(queue, 1)


def test_10_an_object_that_stays_damaged_or_ill_fails_its_message_alone(
    s3_server: Endpoint, s3: S3Place, proxy: FaultProxy, work: Work, news: pa.Table
) -> None:
    """The store fails for these objects: it answers 503, or what arrives never fits its ETag."""
    others, more = articles(5, seed=1), articles(5, seed=2)
    with fresh_queue(s3_server, max_receive_count=2) as queue:
        damaged = shard_message(s3, s3.write("damaged.csv", as_csv(news)), news.num_rows)
        pointed = json.dumps([POINTER, {"s3BucketName": s3.bucket, "s3Key": "in/ill-body"}])
        s3.write("ill-body", article_messages(news)[0].encode())
        s3.write("ill.csv", as_csv(news))
        s3.write("others.csv", as_csv(others))
        records = [event(s3.bucket, f"in/{name}.csv") for name in ("ill", "others")]
        half_ill = json.dumps({"Records": records})
        queue.send(damaged, pointed, half_ill, *article_messages(more))
        proxy.add(Fault(Match(operation="GetObject", path="/in/damaged.csv"), FlipReply()))
        proxy.add(Fault(Match(operation="GetObject", path="/in/ill"), Status(503)))
        run = work(s3, queue, *UNTIL_IDLE, env=FEW_ATTEMPTS)
        assert run.exit_code == 0, run.said
        assert "damaged.csv: Expected checksum" in run.said
        assert "the store keeps answering 503" in run.said
        assert queue.dead_letters() == sorted([damaged, pointed, half_ill])
    assert sorted(labels_of(s3)) == sorted(pa.concat_tables([others, more])["id"].to_pylist())


@pytest.mark.parametrize("alike", ["many in a row", "output too"])
def test_8_a_store_that_fails_for_all_alike_ends_a_worker_with_its_messages_kept(
    s3: S3Place, proxy: FaultProxy, queue: Queue, work: Work, news: pa.Table, alike: str
) -> None:
    count = 5 if alike == "many in a row" else 1
    bodies = [
        shard_message(s3, s3.write(f"{number}.csv", as_csv(news)), news.num_rows)
        for number in range(count)
    ]
    queue.send(*bodies)

    def fail_too(_: Exchange) -> None:
        if alike == "output too":
            proxy.add(Fault(Match(operation="ListObjectsV2"), Status(503)))

    proxy.add(Fault(Match(operation="GetObject"), Status(503), on_match=fail_too))
    run = work(s3, queue, *UNTIL_IDLE, "--retry-delay", "60", env=FEW_ATTEMPTS)
    assert run.exit_code == 75
    assert ("of 5 messages in a row" in run.said) == (count == 5)
    assert queue.backlog().total == count


def test_8_a_queue_that_throttles_is_waited_for(
    s3: S3Place, proxy: FaultProxy, queue: Queue, work: Work
) -> None:
    table = articles(5)
    queue.send(*article_messages(table))
    throttled = Status(400, code="RequestThrottled", message="Rate exceeded.")
    gusts = [proxy.add(Fault(call, throttled, times=2)) for call in (RECEIVE, DELETE)]
    run = work(s3, queue, "--max-messages", "5")
    assert run.exit_code == 0
    assert [proxy.hits(gust) for gust in gusts] == [2, 2]
    assert sorted(labels_of(s3)) == table["id"].to_pylist()
    assert queue.backlog().total == 0


def test_10_an_article_whose_text_is_changed_on_the_wire_is_not_labelled_but_received_again(
    s3: S3Place, proxy: FaultProxy, queue: Queue, work: Work
) -> None:
    table = articles(5)
    bodies = article_messages(table)
    queue.send(*bodies)
    changed: list[str] = []

    def change(body: bytes) -> bytes:
        """One letter of the first text that comes by."""
        answer = json.loads(body)
        for message in answer.get("Messages") or []:
            if not changed:
                changed.append(message["MessageId"])
                message["Body"] = message["Body"].replace("e", "a", 1)
        return json.dumps(answer).encode()

    proxy.add(Fault(RECEIVE, Edit(reply=change)))
    run = work(s3, queue, *UNTIL_IDLE, "--keep-columns", "id,text")
    assert run.exit_code == 0
    assert f"the body of message {changed[0]} was damaged" in run.said
    rows = {row["id"]: row for row in s3.rows().to_pylist()}
    assert {i: row["text"] for i, row in rows.items()} == {
        row["id"]: row["text"] for row in table.to_pylist()
    }
    assert {row["receive_count"] for row in rows.values()} == {1, 2}
    assert queue.backlog().total == 0


def test_16_a_shard_whose_source_is_gone_goes_to_the_dead_letters_and_the_others_go_on(
    s3: S3Place, queue: Queue, enqueue: Enqueue, work: Work, news: pa.Table
) -> None:
    others = articles(5, seed=1)
    sources = [s3.write("news.csv", as_csv(news)), s3.write("others.csv", as_csv(others))]
    assert enqueue(s3, queue, *sources).exit_code == 0
    s3.remove("news.csv")
    run = work(s3, queue, *UNTIL_IDLE)
    assert run.exit_code == 0
    assert "news.csv: there is no such object" in run.said
    (dead,) = queue.dead_letters()
    assert json.loads(dead)["source"] == sources[0]
    assert list(labels_of(s3)) == others["id"].to_pylist()


def test_17_damaged_files_go_to_the_dead_letters_and_the_others_are_labelled(
    s3: S3Place,
    queue: Queue,
    work: Work,
    news: pa.Table,
    expected_labels: dict[str, str | None],
) -> None:
    """The messages are those that the server sends for new objects."""
    notify(s3, queue)
    parquet = as_parquet(news)
    s3.write("cut.parquet", parquet[: len(parquet) // 2])
    s3.write("body.csv", as_csv(news.rename_columns(["id", "body"])))
    s3.write("whole.csv", as_csv(news))
    run = work(s3, queue, *UNTIL_IDLE)
    assert run.exit_code == 0
    assert "not a readable Parquet file" in run.said
    assert "no text column 'text'; it has the columns id, body" in run.said
    dead = [json.loads(body)["Records"][0]["s3"]["object"]["key"] for body in queue.dead_letters()]
    assert sorted(key.rpartition("/")[2].rpartition("%2F")[2] for key in dead) == [
        "body.csv",
        "cut.parquet",
    ]
    assert labels_of(s3) == expected_labels


def test_24_poison_is_tried_with_growing_delay_and_then_left_to_the_dead_letters(
    s3: S3Place, proxy: FaultProxy, queue: Queue, work: Work
) -> None:
    poison = '{"neither": "an article", "nor": "an event"}'
    (poison_id,) = queue.send(poison)
    queue.send(*article_messages(articles(5)))
    received = ReceiveSpy().watch(proxy)
    changed = BatchSpy(HEARTBEAT).watch(proxy)
    run = work(s3, queue, *UNTIL_IDLE)
    assert run.exit_code == 0
    assert "no article, for want of a field 'text'" in run.said
    assert queue.dead_letters() == [poison]
    assert len(labels_of(s3)) == 5
    handles = [
        handle
        for handle, message_id in zip(received.handles, received.message_ids, strict=True)
        if message_id == poison_id
    ]
    assert [changed.timeouts[handle][-1] for handle in handles] == [1, 2, 4]
    # One that fails and one that takes the next; in between a long poll.
    assert len(proxy.log(RECEIVE)) < 20


AWKWARD = "+ 50% ü&=.csv"
AWKWARD_IN_EVENT = "%2B+50%25+%C3%BC%26%3D.csv"


def event(bucket: str, key: str) -> dict[str, object]:
    """One record of an event notification; the key as S3 encodes it."""
    return {
        "eventName": "ObjectCreated:Put",
        "s3": {"bucket": {"name": bucket}, "object": {"key": key}},
    }


def test_25_every_kind_of_message_is_done_or_left_to_the_dead_letters(
    s3: S3Place, queue: Queue, work: Work
) -> None:
    tables = [articles(5, seed=seed) for seed in range(5)]
    for name, table in zip(
        (AWKWARD, "two records.csv", "sns.csv", "bridge +.csv"), tables[:4], strict=True
    ):
        s3.write(name, as_csv(table))
    bodies = article_messages(tables[4])
    s3.write("body", bodies[0].encode())
    enveloped = {"Records": [event(s3.bucket, "in/sns.csv")]}
    queue.send(
        json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": s3.bucket}),
        json.dumps(
            {
                "Records": [
                    event(s3.bucket, f"in/{AWKWARD_IN_EVENT}"),
                    event(s3.bucket, "in/two+records.csv"),
                ]
            }
        ),
        json.dumps(
            {
                "Type": "Notification",
                "TopicArn": "arn:aws:sns:us-east-1:123456789012:news",
                "Message": json.dumps(enveloped),
            }
        ),
        json.dumps(
            {
                "source": "aws.s3",
                "detail-type": "Object Created",
                "detail": {"bucket": {"name": s3.bucket}, "object": {"key": "in/bridge +.csv"}},
            }
        ),
        json.dumps([POINTER, {"s3BucketName": s3.bucket, "s3Key": "in/body"}]),
        *bodies[1:],
    )
    queue.send(*JUNK)
    run = work(s3, queue, *UNTIL_IDLE)
    assert run.exit_code == 0
    assert queue.dead_letters() == sorted(JUNK)
    assert queue.backlog().total == 0
    assert sorted(labels_of(s3)) == sorted(pa.concat_tables(tables)["id"].to_pylist())


def test_25_a_key_with_signs_in_it_comes_through_from_the_server_to_the_labels(
    s3: S3Place, queue: Queue, work: Work
) -> None:
    """The test event and the notification are the server's own."""
    table = articles(5)
    notify(s3, queue)
    s3.write(AWKWARD.replace(".csv", ".jsonl"), as_jsonl(table))
    run = work(s3, queue, *UNTIL_IDLE)
    assert run.exit_code == 0
    assert queue.dead_letters() == []
    assert list(labels_of(s3)) == table["id"].to_pylist()
