"""A queue to which strangers write: nothing they send harms, and what is good is labelled."""

import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_plus

import bombs
import pytest
import servers
from fault_proxy import FaultProxy
from fault_rules import Exchange
from faults.commands import QUIET
from faults.places import S3Place
from servers import Endpoint, Queue

if TYPE_CHECKING:
    from conftest import RunBatchclf

pytestmark = pytest.mark.slow

MIB = 1 << 20
NUM_BAD = 500
NUM_GOOD = 24
MAX_RECEIVE_COUNT = 2
MAX_SOURCE_BYTES = 64 * MIB
# The worker with torch and the tiny model takes about 450 MiB before the first message.
MOST_RSS_MIB = 1500
# moto answers 500 to one of two receives that move the same message to the dead-letter queue, and
# what it would have given out comes again only after this; so no worker may be idle sooner.
VISIBILITY_S = 10
BODY_BYTES = 256 * 1000  # which both servers take
POINTER = "software.amazon.payloadoffloading.PayloadS3Pointer"
SECRET = "the text of a secret"


@dataclass
class Attack:
    """What a hostile sender has prepared.

    Attributes:
        bodies: one each; where they are fewer than NUM_BAD some are sent in several dressings.
        allowed: the one prefix that the worker may read.
    """

    place: S3Place
    allowed: str
    bodies: list[str] = field(default_factory=list)

    def put(self, name: str, content: bytes) -> str:
        """Write an object that the worker may read; returns its URI."""
        return self.place.write(f"allowed/{name}", content)

    def add(self, body: Any) -> None:
        self.bodies.append(body if isinstance(body, str) else json.dumps(body))

    def point_to(self, uri: str, etag: str = '"0cc175b9c0f1b6a831c399e269772661"') -> None:
        """Name a source in every way that there is."""
        self.add({"batchclf": 1, "source": uri, "etag": etag, "rows": [0, 1]})
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        for event in (s3_event(bucket, key), event_bridge(bucket, key)):
            self.add(event)
            self.add(in_sns(event))
        self.add([POINTER, {"s3BucketName": bucket, "s3Key": key}])


def s3_event(bucket: str, key: str, name: str = "ObjectCreated:Put") -> dict[str, Any]:
    place = {"bucket": {"name": bucket}, "object": {"key": quote_plus(key)}}
    return {"Records": [{"eventSource": "aws:s3", "eventName": name, "s3": place}]}


def event_bridge(bucket: str, key: str) -> dict[str, Any]:
    detail = {"bucket": {"name": bucket}, "object": {"key": key}}
    return {"source": "aws.s3", "detail-type": "Object Created", "detail": detail}


def in_sns(body: Any, **changed: Any) -> dict[str, Any]:
    envelope = {"Type": "Notification", "TopicArn": "arn:aws:sns:us-east-1:1:t"}
    return {**envelope, "Message": json.dumps(body), **changed}


def malformed(attack: Attack) -> None:
    """Bodies that are none."""
    add = attack.add
    for body in (
        "{",
        "}",
        "nothing",
        "null",
        "1",
        '"text"',
        "[]",
        "{}",
        "NaN",
        "-Infinity",
        "\ufeff{}",
    ):
        add(body)
    add("<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>")
    add("{'text': 'single quotes'}")
    add('{"text": "never closed')
    add('{"text": "a"} {"text": "b"}')
    add('{"Text": "another case"}')
    add('{"__class__": "os.system", "args": ["true"]}')
    add("!!python/object/apply:os.system ['true']")
    for deep in (65, 1000, 20_000, BODY_BYTES // 2):
        add("[" * deep + "]" * deep)
        add('{"text": "a", "x": ' + "[" * (deep - 1) + "]" * (deep - 1) + "}")
    for open_bracket in ("[", "{", '{"a":', '[{"text":'):
        add(open_bracket * (BODY_BYTES // len(open_bracket)))
    for number in ("9" * 5000, "-" + "9" * 100_000, "1e" + "9" * 5000, "0x10", "1" * BODY_BYTES):
        add(f'{{"id": "a", "text": "b", "n": {number}')
        add(number)
    add('{"id": "a", "text": "b", "n": ' + "9" * 5000 + "}")
    add("[" + "{}," * (BODY_BYTES // 3) + "{}]")
    add(" " * BODY_BYTES)
    add('"' + "\\ud800" * (BODY_BYTES // 6) + '"')


def bad_shards(attack: Attack, uri: str, etag: str) -> None:
    """Shard messages of an object that is there and allowed, but for one thing."""
    good = {"batchclf": 1, "source": uri, "etag": etag, "rows": [0, 1]}
    for rows in (
        None,
        [],
        [0],
        [1, 0],
        [-1, 5],
        [0, 2**63],
        [0, 10**300],
        [0, 0.5],
        ["0", "1"],
        {},
    ):
        attack.add({**good, "rows": rows})
    attack.add({**good, "rows": [0, 10**15]})
    attack.add({**good, "rows": [10**15, 10**15 + 1]})
    for version in (0, 2, -1, "1", True, None, [], {"$gt": 0}):
        attack.add({**good, "batchclf": version})
    for wrong in ("*", "", "x", f"{etag}, {etag}", '"a\r\nX-Evil: 1"', None, 1, [etag]):
        attack.add({**good, "etag": wrong})
    for source in (None, "", 1, [uri], {"uri": uri}):
        attack.add({**good, "source": source})


def bad_events(attack: Attack, bucket: str) -> None:
    for name in ("ObjectRemoved:Delete", "ObjectCreatedNot", "s3:TestEvent", ""):
        attack.add(s3_event(bucket, "in/allowed/fine.csv", name))
    for records in (None, {}, [], [None], [[]], [{"s3": None}], [{}] * 5000):
        attack.add({"Records": records})
    attack.add({"Records": [{"eventName": "ObjectCreated:Put", "s3": {"object": {"key": "%ff"}}}]})
    for kind in ("SubscriptionConfirmation", "UnsubscribeConfirmation", "Junk", None):
        attack.add(in_sns({"text": "a"}, Type=kind, SubscribeURL="http://127.0.0.1:1/"))
    attack.add(in_sns(in_sns({"text": "an envelope in an envelope"})))
    attack.add(in_sns("not JSON", Message="not JSON"))
    attack.add(in_sns("deep", Message="[" * 100_000))
    attack.add({"source": "aws.s3", "detail-type": "Object Deleted", "detail": {}})
    attack.add({"source": "my.app", "detail-type": "Object Created", "detail": {}})
    attack.add(["java.lang.Runtime", {"s3BucketName": bucket, "s3Key": "in/allowed/fine.csv"}])


def forbidden_places(attack: Attack, secret_bucket: str, folder: Path, decoy: FaultProxy) -> None:
    """Sources that are there and could be read, were they allowed."""
    secret = f"text\n{SECRET}\n".encode()
    (folder / "secret.csv").write_bytes(secret)
    attack.place.server.s3.put_object(Bucket=secret_bucket, Key="a.csv", Body=secret)
    bucket = attack.place.bucket
    beside = attack.place.write("allowed-not/a.csv", secret)
    within = attack.place.write("secret/a.csv", secret)
    for uri in (f"s3://{secret_bucket}/a.csv", beside, within):
        attack.point_to(uri)
    decoy_host = decoy.endpoint_url.removeprefix("http://")
    for key in (
        "in/allowed/../secret/a.csv",
        "in/allowed/./../../in/secret/a.csv",
        f"in/allowed/../../../{secret_bucket}/a.csv",
        "in/allowed/..",
        "../in/allowed/fine.csv",
        "in/allowed/%2e%2e/secret/a.csv",
        "in/allowed/..%2fsecret/a.csv",
        "in/allowed/\r\nHost: evil/a.csv",
        "in/allowed/*.csv",
        "in/allowed/",
        "in/allowed/" + "a" * 2000 + ".csv",
        "",
    ):
        attack.point_to(f"s3://{bucket}/{key}")
    for bucket_name in (
        f"{bucket}/in/allowed/../../in/secret",
        f"{bucket}@{decoy_host}",
        "..",
        "a",
    ):
        attack.point_to(f"s3://{bucket_name}/a.csv")
    attack.point_to("s3://arn:aws:s3:us-east-1:1:accesspoint/x/in/allowed/fine.csv")
    for uri in (
        (folder / "secret.csv").as_uri(),
        str(folder / "secret.csv"),
        "file:///etc/passwd",
        f"{decoy.endpoint_url}/a.csv",
        f"http://user:password@{decoy_host}/a.csv",
        f"ftp://{decoy_host}/a.csv",
        "http://169.254.169.254/latest/meta-data/",
        "data:text/csv,text%0Asecret",
        "s3a://x/in/a.csv",
        "S3://x/in/a.csv",
        "|true",
        "$(true)",
    ):
        attack.add({"batchclf": 1, "source": uri, "etag": '"e"', "rows": [0, 1]})


def bad_objects(attack: Attack) -> None:
    """Objects that may be read, and are no input or far more than they seem."""
    objects = {
        "zeros.csv.gz": bombs.gzip_bomb(b"text\n", b"\0" * MIB, 2000),
        "lines.csv.gz": bombs.gzip_bomb(b"text\n", (b"a" * 1023 + b"\n") * 1024, 2000),
        "fields.csv.gz": bombs.gzip_bomb(b"text\n", b"ab," * (MIB // 3), 2000),
        "quotes.csv.gz": bombs.gzip_bomb(b'text\n"', b"a" * MIB, 2000),
        "zeros.jsonl.gz": bombs.gzip_bomb(b"", b"\0" * MIB, 2000),
        "objects.jsonl.gz": bombs.gzip_bomb(b'{"text":[{}', b",{}" * (MIB // 3), 2000),
        "nested.csv.gz": gzip.compress(gzip.compress(b"text\nwords\n")),
        "cut.csv.gz": gzip.compress(random.Random(0).randbytes(10_000))[:-100],
        "repeated.parquet": bombs.dictionary_bomb("a" * MIB, 1_000_000),
        "page.parquet": bombs.page_bomb(300 * MIB),
        "rows.parquet": bombs.forged_rows(2**40),
        "more-rows.parquet": bombs.forged_rows(1_000_000),
        "large.csv": b"text\n" + b"words\n" * (MAX_SOURCE_BYTES // 6),
        "not.parquet": b"PAR1" + bytes(1000) + b"PAR1",
        "utf-16.csv": "text\nwords\n".encode("utf-16"),
        "no-text.csv": b"id,body\n1,words\n",
        "image.csv": b"\x89PNG\r\n\x1a\n" + random.Random(1).randbytes(1000),
        "empty.csv": b"",
        "unknown.exe": b"MZ",
    }
    for name, content in objects.items():
        uri = attack.put(name, content)
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        attack.add(s3_event(bucket, key))
        head = attack.place.server.s3.head_object(Bucket=bucket, Key=key)
        attack.add({"batchclf": 1, "source": uri, "etag": head["ETag"], "rows": [0, 100_000]})
    bodies = {
        "brackets": b"[" * (20 * MIB),
        "long": b'{"text": "' + b"a" * (20 * MIB) + b'"}',
        "zeros": bytes(MIB),
        "binary": random.Random(2).randbytes(MIB),
        "deep": b'{"text": "a", "x": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        "another": json.dumps([POINTER, {"s3BucketName": "x", "s3Key": "y"}]).encode(),
        "shard": json.dumps({"batchclf": 1, "source": "file:///etc/passwd"}).encode(),
    }
    for name, content in bodies.items():
        uri = attack.put(f"bodies/{name}", content)
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        attack.add([POINTER, {"s3BucketName": bucket, "s3Key": key}])
    attack.point_to(f"{attack.allowed}/gone.csv")


def dressed(bodies: list[str], count: int) -> list[str]:
    """So many bodies, the first ones once more inside an envelope or cut short."""
    found = list(bodies)
    chance = random.Random(3)
    while len(found) < count:
        body = chance.choice(bodies)
        if len(body) < 10_000:
            cut = body[: chance.randint(1, len(body) - 1)] if len(body) > 1 else body
            found.append(chance.choice([cut + "]", body + "]", "[" + body + "]"]))
    return found[:count]


def good_articles() -> dict[str, str]:
    """By id; some with fields that would be our columns, or that look like other messages."""
    extra: list[dict[str, Any]] = [
        {},
        {"label": "sport", "score": 1.0, "probs": {"sport": 1.0}, "row": -1, "error": "none"},
        {"message_id": "forged", "receive_count": 99},
        {"Records": [], "detail-type": "x", "Event": "s3:TestEvent"},
        {"source": "file:///etc/passwd", "rows": [0, 1]},
        {"n_tokens": 10**30, "truncated": "maybe", "x" * 1000: "y"},
    ]
    return {
        f"good-{i}": json.dumps(
            {"id": f"good-{i}", "text": f"Shares rose in quarter {i}.", **extra[i % len(extra)]}
        )
        for i in range(NUM_GOOD)
    }


def mixed(bad: list[str], good: list[str]) -> list[str]:
    """Good articles among bad bodies, but none where moto may already lose them (see above)."""
    chance = random.Random(0)
    bad = chance.sample(bad, len(bad))
    first = [*bad[: len(good)], *good]
    return chance.sample(first, len(first)) + bad[len(good) :]


@pytest.fixture
def queue(s3_server: Endpoint) -> Iterator[Queue]:
    with servers.fresh_queue(s3_server, max_receive_count=MAX_RECEIVE_COUNT) as fresh:
        yield fresh


def short(bodies: Counter[str]) -> dict[str, int]:
    return {body[:200]: count for body, count in bodies.items()}


def forbidden(exchange: Exchange, place: S3Place) -> bool:
    """Whether a request goes to S3 and to neither the allowed prefix nor the output."""
    request = exchange.request
    if request.amz_target:
        return False  # SQS
    if request.operation.startswith("List"):
        prefix = request.query.get("prefix", "")
        return not f"/{place.bucket}/out".startswith(request.path) or not prefix.startswith("out/")
    allowed = (f"/{place.bucket}/in/allowed/", f"/{place.bucket}/out/")
    return not request.path.startswith(allowed) or ".." in request.path


@pytest.mark.timeout(900)
def test_500_hostile_messages_end_in_the_dead_letter_queue_and_the_good_ones_are_labelled(
    s3_server: Endpoint,
    s3: S3Place,
    proxy: FaultProxy,
    queue: Queue,
    model: Path,
    run_batchclf: "RunBatchclf",
    tmp_path: Path,
) -> None:
    allowed = f"s3://{s3.bucket}/in/allowed"
    attack = Attack(s3, allowed)
    fine = attack.put("fine.csv", b"id,text\nx,words\n")
    etag = s3_server.s3.head_object(Bucket=s3.bucket, Key="in/allowed/fine.csv")["ETag"]
    good = good_articles()
    with servers.fresh_bucket(s3_server) as secret, FaultProxy(s3_server.endpoint_url) as decoy:
        malformed(attack)
        bad_shards(attack, fine, etag)
        bad_events(attack, s3.bucket)
        forbidden_places(attack, secret, tmp_path, decoy)
        bad_objects(attack)
        bad = dressed(attack.bodies, NUM_BAD)
        for body in mixed(bad, list(good.values())):
            queue.send(body)
        run = run_batchclf(
            *("work", "--queue", queue.url, "--model", model, "--output", s3.output),
            *("--allow-source", allowed, "--max-source-bytes", str(MAX_SOURCE_BYTES)),
            *("--keep-columns", "id,label,message_id", "--dtype", "float32"),
            *("--retry-delay", "1", "--gather-seconds", "1"),
            *("--visibility-timeout", str(VISIBILITY_S), "--idle-exit", str(VISIBILITY_S + 5)),
            *("--log-format", "json", "--no-progress"),
            env={**QUIET, **s3.env},
            timeout=800,
        )
        assert decoy.log() == []
    assert run.returncode == 0, run.stderr[-4000:]
    assert "Traceback" not in run.stderr
    assert [str(exchange) for exchange in proxy.log() if forbidden(exchange, s3)] == []
    dead = queue.dead_letters()
    missing, added = Counter(bad) - Counter(dead), Counter(dead) - Counter(bad)
    assert (queue.backlog().total, short(missing), short(added)) == (0, {}, {})
    rows = s3.rows().to_pylist()
    assert {row["id"]: row["label"] is not None for row in rows} == dict.fromkeys(good, True)
    assert json.loads(run.stdout)["peak_rss_mib"] < MOST_RSS_MIB
    assert SECRET not in run.stdout + run.stderr
