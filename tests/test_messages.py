import json
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote_plus

import pytest
from hypothesis import example, given, strategies as st

from batchclf import messages
from batchclf.errors import ConfigError, MessageError
from batchclf.messages import AllowedSources, Article, Message, ObjectRefs, Pointer, ShardRef
from batchclf.shards import Shard
from batchclf.store import Source

MIB = 1 << 20
TEXT = ("text",)
POINTER = "software.amazon.payloadoffloading.PayloadS3Pointer"
OLD_POINTER = "com.amazon.sqs.javamessaging.MessageS3Pointer"
TEST_EVENT = {
    "Service": "Amazon S3",
    "Event": "s3:TestEvent",
    "Time": "2026-01-01T00:00:00.000Z",
    "Bucket": "news",
    "RequestId": "5582815E1AEA5ADF",
    "HostId": "8cLeGAmw098X5cv4Zkwcmo8vvZa3eH3eKxsPzbB9wrR+YstdA6Knx4Ip8EXAMPLE",
}

uris = st.builds(
    "s3://{}/{}".format,
    st.from_regex(r"[a-z0-9][a-z0-9.-]{1,20}[a-z0-9]", fullmatch=True),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)
# What can stand in an event, so that examples come near to one.
names = (
    st.sampled_from(["batchclf", "source", "etag", "rows", "text", "id"])
    | st.sampled_from(["Event", "Records", "eventName", "s3", "bucket", "name", "object", "key"])
    | st.sampled_from(["detail-type", "detail", "Type", "Message", "TopicArn"])
    | st.sampled_from(["s3BucketName", "s3Key"])
    | st.text()
)
values = (
    st.sampled_from([1, "aws.s3", "Object Created", "ObjectCreated:Put", "Notification", POINTER])
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
)
json_values: st.SearchStrategy[Any] = st.recursive(
    values, lambda below: st.lists(below) | st.dictionaries(names, below), max_leaves=30
)


def parse(body: Any) -> Message:
    return messages.parse(body if isinstance(body, str | bytes) else json.dumps(body), TEXT)


def reason_of(body: Any, refused: Callable[[Any], object] = parse) -> str:
    with pytest.raises(MessageError) as caught:
        refused(body)
    return str(caught.value)


def record(key: str, bucket: str = "news", event: str = "ObjectCreated:Put") -> dict[str, Any]:
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventName": event,
        "s3": {"bucket": {"name": bucket}, "object": {"key": key, "size": 1, "eTag": "abc"}},
    }


def event_bridge(key: str, kind: str = "Object Created") -> dict[str, Any]:
    return {
        "version": "0",
        "detail-type": kind,
        "source": "aws.s3",
        "detail": {"bucket": {"name": "news"}, "object": {"key": key, "size": 1}},
    }


def in_sns(body: Any) -> dict[str, Any]:
    return {
        "Type": "Notification",
        "MessageId": "22b80b92-fdea-4c2c-8f9d-bdfb0c7bf324",
        "TopicArn": "arn:aws:sns:us-west-2:123456789012:MyTopic",
        "Subject": "Amazon S3 Notification",
        "Message": body if isinstance(body, str) else json.dumps(body),
        "Timestamp": "2026-01-01T00:00:00.000Z",
    }


def shard_fields(**changed: Any) -> dict[str, Any]:
    return {"batchclf": 1, "source": "s3://news/a.csv", "etag": '"e"', "rows": [0, 9], **changed}


# Whatever the body


def check_parses_or_is_refused(body: str | bytes) -> None:
    try:
        messages.parse(body, TEXT)
    except MessageError as error:
        reason = str(error)
        assert reason
        assert reason.isascii()
        assert reason.isprintable()
        assert len(reason) < 2000


@given(st.text(st.characters()))
@example('{"text": "' + "\ud800" + '"}')
@example("\ufeff{}")
@example('{"a\\nb\x1b[31m": 1}')
@example("[" * MIB)
@example('{"text":' * (MIB // 8))
@example("[" * 900 + "]" * 900)
@example("9" * MIB)
@example('{"text": "a", "x": -' + "9" * 5000 + "}")
@example("1e" + "9" * 5000)
@example('["' + "a" * MIB)
@example("{" + '"text": 1, ' * (MIB // 11) + '"text": 2}')
@example("{" + ",".join(f'"{i}":{i}' for i in range(80_000)) + "}")
def test_any_text_parses_or_is_refused_with_a_printable_reason(body: str) -> None:
    check_parses_or_is_refused(body)


@given(st.binary())
@example(b"\xff\xfe{\0}\0")
@example('{"text": "a"}'.encode("utf-16"))
@example(b"PAR1")
@example(b"\x1f\x8b")
@example(b"\0" * MIB)
def test_any_bytes_parse_or_are_refused_with_a_printable_reason(body: bytes) -> None:
    check_parses_or_is_refused(body)


@given(json_values, st.booleans())
def test_any_json_parses_or_is_refused_with_a_printable_reason(value: Any, enveloped: bool) -> None:
    check_parses_or_is_refused(json.dumps(in_sns(value) if enveloped else value))


@pytest.mark.parametrize("depth", [messages.MAX_DEPTH + 1, 900, 100_000])
def test_json_that_nests_deeper_than_the_bound_is_refused(depth: int) -> None:
    deep = '{"text": "a", "x": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"
    assert reason_of(deep) == "JSON nested more than 64 deep"


def test_json_that_nests_as_deep_as_the_bound_is_read() -> None:
    deep = "[" * (messages.MAX_DEPTH - 1) + "]" * (messages.MAX_DEPTH - 1)
    assert isinstance(parse(f'{{"text": "a", "x": {deep}}}'), Article)


def test_a_number_with_thousands_of_digits_is_refused() -> None:
    assert reason_of(f'{{"text": {"1" * 5000}}}') == "not JSON: a number with thousands of digits"


def test_a_body_longer_than_the_bound_is_refused_unread() -> None:
    assert reason_of(" " * (messages.MAX_BODY_BYTES + 1)) == "a body of more than 16 MiB"


@pytest.mark.parametrize("body", ["1", '"text"', "null", "true", "[]", "[1]", "{}", "NaN"])
def test_json_that_is_no_known_message_is_refused(body: str) -> None:
    assert reason_of(body)


def test_the_reason_says_which_fields_were_there_and_which_were_wanted() -> None:
    with pytest.raises(MessageError) as caught:
        messages.parse('{"id": 1, "Text": "a"}', ("title", "body"))
    assert str(caught.value) == (
        "no article, for want of a field 'title' or 'body', nor an event; it has 'id', 'Text'"
    )


# Articles


@given(st.dictionaries(names, json_values, max_size=5), json_values)
def test_an_object_with_a_text_column_is_an_article_with_all_its_fields(
    fields: dict[str, Any], text: Any
) -> None:
    fields = {name: value for name, value in fields.items() if name != "batchclf"}
    body = json.dumps({**fields, "text": text})
    parsed = parse(body)
    assert isinstance(parsed, Article)
    assert json.dumps(parsed.fields) == json.dumps(json.loads(body))


def test_one_of_several_text_columns_is_enough() -> None:
    assert messages.parse('{"body": "a"}', ("title", "body")) == Article({"body": "a"})


def test_the_last_of_two_equal_fields_counts() -> None:
    assert parse('{"text": "a", "text": "b"}') == Article({"text": "b"})


def test_bytes_that_are_not_utf8_are_kept_for_the_row_to_tell() -> None:
    assert parse(b'{"text": "\xff"}') == Article({"text": "\udcff"})


def test_an_article_in_an_envelope_of_sns_is_an_article() -> None:
    assert parse(in_sns({"id": "1", "text": "a"})) == Article({"id": "1", "text": "a"})


def test_an_envelope_in_an_envelope_is_refused() -> None:
    assert reason_of(in_sns(in_sns({"text": "a"})))


@pytest.mark.parametrize("kind", ["SubscriptionConfirmation", "UnsubscribeConfirmation", None])
def test_no_other_message_of_sns_is_followed(kind: str | None) -> None:
    body = {**in_sns({"text": "a"}), "Type": kind, "SubscribeURL": "http://127.0.0.1:1/"}
    assert "no Notification" in reason_of(body)


# Shard messages


@given(uris, st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_a_shard_that_was_formatted_is_parsed_as_the_same(uri: str, a: int, b: int) -> None:
    shard = Shard(Source(uri, '"0cc175b9c0f1b6a831c399e269772661-3"', 7), min(a, b), max(a, b))
    parsed = parse(messages.format_shard(shard))
    assert parsed == ShardRef(uri, shard.source.version, shard.start, shard.stop)


@pytest.mark.parametrize("version", [0, 2, "1", True, 1.0, None, {}])
def test_a_shard_message_of_another_version_is_refused(version: Any) -> None:
    assert "of version" in reason_of(shard_fields(batchclf=version))


@pytest.mark.parametrize(
    "rows",
    [None, [], [0], [0, 1, 2], "01", {"0": 1}, [0, True], [0, 1.0], ["0", "1"], [0, float("nan")]],
)
def test_a_shard_message_whose_rows_are_no_two_integers_is_refused(rows: Any) -> None:
    assert reason_of(shard_fields(rows=rows)).startswith("a shard message that is not")


@pytest.mark.parametrize("rows", [[-1, 5], [5, 4], [0, 2**63], [10**4000, 10**4001]])
def test_a_shard_message_of_impossible_rows_is_refused(rows: list[int]) -> None:
    assert "of no rows" in reason_of(shard_fields(rows=rows))


@pytest.mark.parametrize("etag", ["*", '"a", "b"', '"*"', '"a', "a\r\nX-Evil: 1", "é", " "])
def test_a_shard_message_whose_etag_could_fit_many_versions_is_refused(etag: str) -> None:
    assert "whose ETag is none" in reason_of(shard_fields(etag=etag))


@pytest.mark.parametrize("field", ["source", "etag", "rows"])
@pytest.mark.parametrize("value", [None, "", 1, ["s3://news/a.csv"]])
def test_a_shard_message_with_a_field_of_another_kind_is_refused(field: str, value: Any) -> None:
    assert reason_of(shard_fields(**{field: value}))


def test_a_shard_message_is_none_of_an_article_that_carries_its_key() -> None:
    assert reason_of({"batchclf": "x", "text": "a"})


# Events


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example("a b+c%d ü.csv")
def test_the_key_of_an_s3_event_is_decoded(key: str) -> None:
    assert parse({"Records": [record(quote_plus(key))]}) == ObjectRefs((f"s3://news/{key}",))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example("a b+c%20d ü.csv")
def test_the_key_of_an_event_bridge_event_is_taken_as_it_is(key: str) -> None:
    assert parse(event_bridge(key)) == ObjectRefs((f"s3://news/{key}",))


def test_a_key_whose_escapes_are_not_utf8_is_refused() -> None:
    assert "not UTF-8" in reason_of({"Records": [record("%ff.csv")]})


def test_every_new_object_of_an_event_is_a_source_once() -> None:
    records = [record("a.csv"), record("b.csv", "old"), record("a.csv")]
    assert parse({"Records": records}) == ObjectRefs(("s3://news/a.csv", "s3://old/b.csv"))


def test_records_of_other_events_are_passed_over_beside_those_of_new_objects() -> None:
    records = [
        record("gone.csv", event="ObjectRemoved:Delete"),
        record("a.csv", event="ObjectCreated:CompleteMultipartUpload"),
        record("b.csv", event="s3:ObjectCreated:Put"),
    ]
    assert parse({"Records": records}) == ObjectRefs(("s3://news/a.csv", "s3://news/b.csv"))


@pytest.mark.parametrize(
    "records",
    [
        None,
        {},
        [],
        [None],
        [{"eventName": "ObjectCreated:Put"}],
        [{"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "b"}, "object": {"key": 1}}}],
        [{"eventName": "ObjectCreated:Put", "dynamodb": {}}],
        [record("a.csv", event="ObjectRemoved:Delete")],
        [record("a.csv", event="ObjectCreatedX")],
        [record("a.csv", bucket="news/elsewhere")],
        [record("a.csv")] * (messages.MAX_RECORDS + 1),
    ],
)
def test_records_without_one_of_a_new_object_are_refused(records: Any) -> None:
    assert reason_of({"Records": records})


@pytest.mark.parametrize(
    "body",
    [
        event_bridge("a.csv", "Object Deleted"),
        {**event_bridge("a.csv"), "source": "my.app"},
        {**event_bridge("a.csv"), "detail": None},
        {**event_bridge("a.csv"), "detail": {"bucket": {"name": 1}, "object": {"key": "a"}}},
    ],
)
def test_events_of_event_bridge_without_a_new_object_are_refused(body: dict[str, Any]) -> None:
    assert reason_of(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"Records": [record("a+b.csv")]}, ObjectRefs(("s3://news/a b.csv",))),
        (event_bridge("a+b.csv"), ObjectRefs(("s3://news/a+b.csv",))),
        (TEST_EVENT, messages.TestEvent()),
    ],
)
def test_an_event_is_the_same_bare_and_in_an_envelope_of_sns(
    body: dict[str, Any], expected: Message
) -> None:
    assert (parse(body), parse(in_sns(body))) == (expected, expected)


# Pointers


@pytest.mark.parametrize("name", [POINTER, OLD_POINTER])
def test_the_pointer_of_the_extended_client_names_an_object(name: str) -> None:
    body = [name, {"s3BucketName": "large", "s3Key": "0b9f-11"}]
    assert parse(body) == Pointer("s3://large/0b9f-11")


@pytest.mark.parametrize(
    "body",
    [
        ["java.lang.Runtime", {"s3BucketName": "large", "s3Key": "k"}],
        [POINTER, {"s3BucketName": "large"}],
        [POINTER, {"s3BucketName": ["large"], "s3Key": "k"}],
        [POINTER, {"s3BucketName": "large/x", "s3Key": "k"}],
        [POINTER],
        [POINTER, {"s3BucketName": "large", "s3Key": "k"}, 1],
    ],
)
def test_an_array_that_is_no_pointer_is_refused(body: list[Any]) -> None:
    assert reason_of(body)


# Allowed sources


@pytest.mark.parametrize("uri", ["s3://news/in/a.csv", "s3://news/in/b/c", "s3://news/in/ü +%.csv"])
@pytest.mark.parametrize("prefix", ["s3://news", "s3://news/", "s3://news/in", "s3://news/in/"])
def test_what_lies_under_an_allowed_prefix_is_allowed(prefix: str, uri: str) -> None:
    AllowedSources(["s3://other", prefix]).check(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://news/inside.csv",
        "s3://news/in.csv",
        "s3://news/i",
        "s3://news/IN/a.csv",
        "s3://news/x/in/a.csv",
        "s3://news2/in/a.csv",
        "s3://new/in/a.csv",
    ],
)
@pytest.mark.parametrize("prefix", ["s3://news/in", "s3://news/in/"])
def test_a_prefix_ends_at_a_slash(prefix: str, uri: str) -> None:
    assert "outside every --allow-source" in reason_of(uri, AllowedSources([prefix]).check)


def test_a_prefix_without_a_slash_at_its_end_is_an_object_too() -> None:
    AllowedSources(["s3://news/in.csv"]).check("s3://news/in.csv")


@given(uris)
def test_without_an_allowed_source_nothing_is_allowed(uri: str) -> None:
    assert reason_of(uri, AllowedSources([]).check)


@pytest.mark.parametrize(
    "uri",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "http://169.254.169.254/latest/meta-data/",
        "https://news.s3.amazonaws.com/in/a.csv",
        "S3://news/in/a.csv",
        "s3:/news/in/a.csv",
        "s3n://news/in/a.csv",
        "",
        "s3://",
        "s3:///in/a.csv",
        "s3://news",
        "s3://news/",
        "s3://news@evil/in/a.csv",
        "s3://news:80/in/a.csv",
        "s3://arn:aws:s3:eu-west-1:1:accesspoint/in/a.csv",
        "s3://news/in/../secret/a.csv",
        "s3://news/in/..",
        "s3://news/in/./a.csv",
        "s3://news/in/%2e%2E/secret/a.csv",
        "s3://news/in/..%2fsecret/a.csv",
        "s3://news/../news/in/a.csv",
        "s3://news/in/a\r\nb.csv",
        "s3://news/in/a\0.csv",
        "s3://news/in/\ud800.csv",
        "s3://news/in/" + "a" * 2000,
    ],
)
def test_what_is_not_one_plain_object_is_refused_also_under_an_allowed_bucket(uri: str) -> None:
    reason = reason_of(uri, AllowedSources(["s3://news"]).check)
    assert reason.isascii()
    assert reason.isprintable()


@given(st.text(st.sampled_from("./abü%+")), st.text(st.sampled_from("./ab")))
def test_an_allowed_object_lies_under_the_prefix_also_after_normalising(
    key: str, prefix: str
) -> None:
    try:
        AllowedSources([f"s3://news/{prefix}"]).check(f"s3://news/{key}")
    except (ConfigError, MessageError):
        return
    resolved = PurePosixPath("/").joinpath(*(part for part in key.split("/") if part))
    assert ".." not in resolved.parts
    assert key.startswith(prefix)


@pytest.mark.parametrize(
    "given_prefix",
    ["", "news", "/data", "file:///data", "s3://", "s3:///in", "s3://news/*", "s3://news/in/../x"],
)
def test_a_prefix_of_another_form_is_a_usage_error(given_prefix: str) -> None:
    with pytest.raises(ConfigError, match="--allow-source"):
        AllowedSources([given_prefix])


@pytest.mark.parametrize(
    ("folder", "covered"),
    [("s3://news/in", True), ("s3://news/in/out", True), ("s3://news/out", False), ("/out", False)],
)
@pytest.mark.parametrize("prefix", ["s3://news/in", "s3://news/in/"])
def test_a_folder_is_covered_where_its_objects_would_be_allowed(
    prefix: str, folder: str, covered: bool
) -> None:
    assert AllowedSources([prefix]).covers_folder(folder) is covered
