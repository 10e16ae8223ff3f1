"""What the body of a queue's message says: an article, or objects on S3 that hold some.

A body comes from whoever may write to the queue, so nothing here trusts it: it either parses
within these bounds or is refused with a reason, and what it points to is read only where
`AllowedSources` says so.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import unquote, unquote_plus

from batchclf.errors import ConfigError, MessageError
from batchclf.shards import Shard

# The largest body. SQS itself takes 1 MiB; longer ones lie on S3 behind a pointer. Parsed, a byte
# of JSON takes up to 28 bytes (measured on 4 MiB of `{"":1},`).
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html
MAX_BODY_BYTES = 16 << 20
MAX_DEPTH = 64  # of arrays and objects in each other; what nests deeper is no article
MAX_RECORDS = 1000  # of one event notification; S3 sends one or a few
MAX_ROW = 2**63 - 1  # positions of rows are int64

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
_MAX_KEY_BYTES = 1024
# Names of buckets, also of those from before 2018. An ARN is none: it could name another account's.
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")

# It travels in If-Match, where * and a list would fit more than one version.
_ETAG = re.compile(r'("?)[!#-)+\-./0-~]+\1')

_SHARD_KEY = "batchclf"
_SHARD_VERSION = 1
_TEST_EVENT = "s3:TestEvent"
_CREATED = "ObjectCreated:"

# What the extended client libraries, new and old, put before the place of the body.
# https://github.com/awslabs/payload-offloading-java-common-lib-for-aws
# https://github.com/awslabs/amazon-sqs-java-extended-client-lib
_POINTER_CLASSES = (
    "software.amazon.payloadoffloading.PayloadS3Pointer",
    "com.amazon.sqs.javamessaging.MessageS3Pointer",
)

# What the source of a set of articles begins with, in the footer of its output.
ARTICLES = "sqs://"
MESSAGE_ID = "message_id"

_SHOWN_CHARS = 100
_SHOWN_NAMES = 10


@dataclass(frozen=True)
class Article:
    """One text to label, with whatever fields came with it."""

    fields: Mapping[str, object]


@dataclass(frozen=True)
class ShardRef:
    """Rows `start` to `stop` (exclusive) of an object in one version, as `enqueue` sends them."""

    source_uri: str
    etag: str
    start: int
    stop: int


@dataclass(frozen=True)
class ObjectRefs:
    """The objects that an event notification tells of, each once, in its order."""

    uris: tuple[str, ...]


@dataclass(frozen=True)
class Pointer:
    """The object that holds the body, where the extended client found it too long for SQS."""

    uri: str


@dataclass(frozen=True)
class TestEvent:
    """What S3 sends when notifications are switched on: nothing to do."""


Message = Article | ShardRef | ObjectRefs | Pointer | TestEvent


class AllowedSources:
    """The buckets and prefixes that messages may point to.

    A prefix ends at a `/`: `s3://news/in` allows `s3://news/in/a.csv`, and an object `s3://news/in`,
    but not `s3://news/inside.csv`.

    Args:
        prefixes: `s3://bucket`, `s3://bucket/prefix` or `s3://bucket/prefix/`. Without any, no
            message may point anywhere.

    Raises:
        ConfigError: one is not of that form.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        for given in prefixes:
            _check_prefix(given)
        self._objects = frozenset(given for given in prefixes if not given.endswith("/"))
        self._folders = tuple(given if given.endswith("/") else f"{given}/" for given in prefixes)

    def covers_folder(self, uri: str) -> bool:
        """Whether messages may point to what is under `uri`, such as the output's folder."""
        return f"{uri.rstrip('/')}/".startswith(self._folders)

    def check(self, uri: str) -> None:
        """Raise MessageError unless `uri` is an object that messages may point to."""
        _check_object(uri)
        if uri in self._objects or uri.startswith(self._folders):
            return
        if not self._folders:
            raise MessageError(
                f"points to {shown(uri)}, and no source is allowed; allow it with --allow-source"
            )
        raise MessageError(f"points to {shown(uri)}, which is outside every --allow-source")


def parse(body: str | bytes, text_columns: Sequence[str]) -> Message:
    """What a body says.

    Args:
        body: of the message, or the content of the object that a pointer names.
        text_columns: the fields that make an object an article; one of them is enough, and what
            is wrong with its value is an error of that row, as in JSON lines.

    Raises:
        MessageError: anything else, with the reason.
    """
    return _read(_load(body), text_columns, in_envelope=False)


def format_shard(shard: Shard) -> str:
    """The body that `parse` reads as this shard."""
    source = shard.source
    fields = {
        _SHARD_KEY: _SHARD_VERSION,
        "source": source.uri,
        "etag": source.version,
        "rows": [shard.start, shard.stop],
    }
    return json.dumps(fields)


def shown(value: object) -> str:
    """A name or place from a body for a log line: ASCII without line breaks, and short."""
    if isinstance(value, dict | list):
        return _kind(value)
    if isinstance(value, str):
        value = value[:_SHOWN_CHARS]
    written = ascii(value)
    return written if len(written) <= _SHOWN_CHARS else f"{written[:_SHOWN_CHARS]}..."


def _kind(value: object) -> str:
    """What a value is, where it could be the text of an article, which no log may show."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    return "null" if value is None else "a number or boolean"


def _load(body: str | bytes) -> Any:
    if len(body) > MAX_BODY_BYTES:
        raise MessageError(f"a body of more than {MAX_BODY_BYTES >> 20} MiB")
    if isinstance(body, bytes):
        body = body.decode("utf-8", "surrogateescape")  # as in a line of a file
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        raise MessageError(f"not JSON: {error}") from None
    except ValueError:  # what Python refuses to convert, since it takes quadratic time
        raise MessageError("not JSON: a number with thousands of digits") from None
    except RecursionError:
        raise MessageError(_too_deep()) from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below.extend(v for v in each.values() if isinstance(v, dict | list))
            elif isinstance(each, list):
                below.extend(v for v in each if isinstance(v, dict | list))
        if not below:
            return
        level = below
    raise MessageError(_too_deep())


def _too_deep() -> str:
    return f"JSON nested more than {MAX_DEPTH} deep"


def _read(value: Any, text_columns: Sequence[str], *, in_envelope: bool) -> Message:
    if isinstance(value, list):
        return _pointer(value)
    if not isinstance(value, dict):
        raise MessageError(f"JSON, but no object: {_kind(value)}")
    if _SHARD_KEY in value:
        return _shard_ref(value)
    if any(name in value for name in text_columns):
        return Article(value)
    if value.get("Event") == _TEST_EVENT:
        return TestEvent()
    if "Records" in value:
        return ObjectRefs(_recorded(value["Records"]))
    if "detail-type" in value:
        return ObjectRefs((_event_bridge(value),))
    if "TopicArn" in value and not in_envelope:
        return _read(_load(_enclosed(value)), text_columns, in_envelope=True)
    wanted = " or ".join(repr(name) for name in text_columns)
    found = ", ".join(shown(name) for name in islice(value, _SHOWN_NAMES)) or "none"
    raise MessageError(f"no article, for want of a field {wanted}, nor an event; it has {found}")


def _pointer(value: list[Any]) -> Pointer:
    match value:
        case [str() as name, {"s3BucketName": bucket, "s3Key": key}] if name in _POINTER_CLASSES:
            return Pointer(_object_uri(bucket, key))
    raise MessageError(f"a JSON array that is no pointer of the extended client: {_kind(value)}")


def _shard_ref(value: dict[str, Any]) -> ShardRef:
    version = value[_SHARD_KEY]
    if type(version) is not int or version != _SHARD_VERSION:
        raise MessageError(
            f"a shard message of version {shown(version)}, and {_SHARD_VERSION} is known here"
        )
    match value:
        case {"source": str() as uri, "etag": str() as etag, "rows": [start, stop]} if (
            uri and etag and type(start) is int and type(stop) is int
        ):
            if not 0 <= start <= stop <= MAX_ROW:
                raise MessageError(f"a shard message of no rows: {shown(value['rows'])}")
            if not _ETAG.fullmatch(etag):
                raise MessageError(f"a shard message whose ETag is none: {shown(etag)}")
            return ShardRef(uri, etag, start, stop)
    raise MessageError(
        'a shard message that is not {"batchclf": 1, "source": "s3://...", "etag": "...", '
        '"rows": [a, b]}'
    )


def _recorded(records: Any) -> tuple[str, ...]:
    """The objects of an event notification; of their records, those of new objects.

    https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html
    """
    if not isinstance(records, list) or len(records) > MAX_RECORDS:
        raise MessageError(f"an event whose Records are no array of at most {MAX_RECORDS}")
    uris = []
    for record in records:
        match record:
            case {
                "eventName": str() as event,
                "s3": {"bucket": {"name": bucket}, "object": {"key": str() as key}},
            }:
                if event.removeprefix("s3:").startswith(_CREATED):  # with s3: in MinIO
                    uris.append(_object_uri(bucket, _decode_key(key)))
            case _:
                raise MessageError(f"an event with a record that is not of S3: {_kind(record)}")
    if not uris:
        raise MessageError(f"an event without a record of {_CREATED}*")
    return tuple(dict.fromkeys(uris))


def _decode_key(key: str) -> str:
    try:
        return unquote_plus(key, errors="strict")
    except UnicodeError:
        raise MessageError(f"an event with a key that is not UTF-8: {shown(key)}") from None


def _event_bridge(value: dict[str, Any]) -> str:
    """The object of an EventBridge event, whose key is not encoded.

    https://docs.aws.amazon.com/AmazonS3/latest/userguide/ev-events.html
    """
    match value:
        case {
            "source": "aws.s3",
            "detail-type": "Object Created",
            "detail": {"bucket": {"name": bucket}, "object": {"key": key}},
        }:
            return _object_uri(bucket, key)
    raise MessageError(
        f"an EventBridge event other than 'Object Created' of S3: {shown(value['detail-type'])}"
    )


def _enclosed(value: dict[str, Any]) -> str:
    """The message in an SNS envelope.

    https://docs.aws.amazon.com/sns/latest/dg/sns-message-and-json-formats.html
    """
    match value:
        case {"Type": "Notification", "Message": str() as enclosed}:
            return enclosed
    raise MessageError(f"a message of SNS that is no Notification: {shown(value.get('Type'))}")


def _object_uri(bucket: Any, key: Any) -> str:
    if not isinstance(bucket, str) or not isinstance(key, str) or "/" in bucket:
        raise MessageError(f"no bucket and key: {shown(bucket)}, {shown(key)}")
    return f"s3://{bucket}/{key}"


def _check_object(uri: str) -> None:
    """Raise MessageError unless a URI names one object on S3 in one way only."""
    if not uri.startswith("s3://"):
        raise MessageError(f"points to {shown(uri)}, and only objects on S3 are read")
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket) or not 0 < len(key) <= _MAX_KEY_BYTES:
        raise MessageError(f"points to {shown(uri)}, which is no object on S3")
    # Lone surrogates, which cannot be encoded, are of category Cs.
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in key):
        raise MessageError(f"points to {shown(uri)}, with control characters in its key")
    if _climbs(key):
        raise MessageError(f"points to {shown(uri)}, with . or .. between its slashes")


def _climbs(key: str) -> bool:
    """Whether what normalises paths on the way to the store could make another key of it."""
    # unquoted too, lest something on the way decodes twice
    return not {".", ".."}.isdisjoint([*key.split("/"), *unquote(key).split("/")])


def _check_prefix(given: str) -> None:
    bucket, _, prefix = given.removeprefix("s3://").partition("/")
    if not given.startswith("s3://") or not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"--allow-source {given}: write s3://bucket or s3://bucket/prefix")
    if "*" in prefix or _climbs(prefix):
        raise ConfigError(
            f"--allow-source {given}: a prefix is taken as it stands, without * and .. in it"
        )
