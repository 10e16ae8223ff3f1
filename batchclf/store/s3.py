"""S3 and what speaks its language."""

import contextlib
import fnmatch
import functools
import hashlib
import io
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError as BotoConnectionError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from urllib3.exceptions import HTTPError as UrllibError

from batchclf.errors import (
    BatchclfError,
    ConfigError,
    CredentialsError,
    DamagedError,
    InputChangedError,
    InputError,
    StoreError,
)
from batchclf.store.base import Folder, Scratch, Source, hidden, source_suffix, translate_os_error

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        CompletedPartTypeDef,
        GetObjectOutputTypeDef,
        HeadObjectOutputTypeDef,
    )

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_HEAD_THREADS = 8
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
# Attempts of one call, waits between them random up to 1, 2, 4 ... 20 s: half a minute on average.
# https://docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html
_ATTEMPTS = 8
_SINGLE_PUT_BYTES = 32 << 20  # larger objects go up in parts
_PART_BYTES = 16 << 20  # at least 5 MiB and at most 10,000 parts:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html

# A download that broke off, or whose bytes do not fit their checksum, is done again from its start:
# botocore retries a call until its headers are there, but never the body.
_BROKEN_BODY = (
    IncompleteReadError,  # fewer bytes than Content-Length said
    ResponseStreamingError,  # reset, or a broken chunk
    ReadTimeoutError,  # stalled
    FlexibleChecksumError,  # a byte flipped on the way
    UrllibError,  # a stall while botocore reads the body of an error comes out as it is
)


class _WrongDigestError(BotoCoreError):
    """The bytes do not fit the MD5 that the ETag of a plain upload is."""

    fmt = "The body does not fit its ETag {etag}"


class _NotTakenError(Exception):
    """An upload that has to be made again, a multipart one from its start; botocore does neither.

    409: another conditional write of this key was under way.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
    400 BadDigest and its like: the bytes that arrived do not fit their checksum.
    https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
    """


class S3:
    """A connection: one boto3 client, safe to share between threads."""

    def __init__(self, client: "S3Client") -> None:
        self.client = client

    @classmethod
    @functools.cache
    def connect(cls, endpoint_url: str | None = None) -> "S3":
        """The client for AWS, or for another server of the S3 protocol at `endpoint_url`.

        Raises:
            ConfigError: the AWS configuration or the URL makes no sense.
        """
        elsewhere = endpoint_url or os.environ.get(
            "AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL")
        )
        config = Config(
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_READ_TIMEOUT_S,
            retries={
                "mode": "standard",
                "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", _ATTEMPTS)),
            },
            max_pool_connections=32,
            tcp_keepalive=True,
            # bucket.host names resolve at AWS; elsewhere they rarely do
            s3={"addressing_style": "path" if elsewhere else "auto"},
        )
        try:
            client = boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=config)
        except NoRegionError as error:
            raise ConfigError(f"S3: {error} Set AWS_REGION.") from error
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"S3: {error}") from error
        return cls(client)

    def find(self, given: str) -> list[Source]:
        """The sources under an s3:// prefix or glob; one alone if the prefix is its whole key."""
        bucket, pattern = split_uri(given)
        magic = min((pattern.index(c) for c in "*?[" if c in pattern), default=len(pattern))
        sources = []
        with _s3_errors(given, reading=True):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket, Prefix=pattern[:magic]
            )
            for page in pages:
                for item in page.get("Contents", []):
                    key = item["Key"]
                    source = Source(f"s3://{bucket}/{key}", item["ETag"], item["Size"])
                    if key == pattern:
                        return [_known(source)]
                    if magic < len(pattern):
                        if source_suffix(key) and fnmatch.fnmatchcase(key, pattern):
                            sources.append(source)
                    elif source_suffix(key) and not hidden(_relative(key, pattern)):
                        sources.append(source)
        return sorted(sources, key=lambda source: source.uri)

    def head(self, uri: str) -> Source:
        """The source of exactly this name; `find` takes a name for a prefix or a glob as well."""
        bucket, key = split_uri(uri)
        with _s3_errors(uri, reading=True):
            reply = self.client.head_object(Bucket=bucket, Key=key)
        return _known(Source(uri, reply["ETag"], reply["ContentLength"]))

    def read(self, uri: str, most_bytes: int) -> bytes:
        """The content of the object of exactly this name, at most so much."""
        bucket, key = split_uri(uri)
        with _s3_errors(uri, reading=True):
            for attempt in _retrying(*_BROKEN_BODY):
                with attempt:
                    reply = self.client.get_object(Bucket=bucket, Key=key)
                    if reply["ContentLength"] > most_bytes:
                        raise InputError(f"{uri}: has more than {most_bytes:,} bytes")
                    return reply["Body"].read()
        raise AssertionError  # Retrying returns or raises

    def download(self, source: Source) -> BinaryIO:
        """The whole object in its planned version, in a nameless scratch file.

        Checked against the checksum that S3 keeps, and its ETag where that comes from MD5s.

        Raises:
            InputChangedError, InputError, StoreError: as `open_source`.
        """
        with _s3_errors(str(source), reading=True):
            for attempt in _retrying(*_BROKEN_BODY, _WrongDigestError):
                with attempt:
                    return self._download_once(source)
        raise AssertionError  # Retrying returns or raises

    def _download_once(self, source: Source) -> BinaryIO:
        reply = self._get(source)
        digest = self._etag_digest(source, reply)
        file = tempfile.TemporaryFile(prefix="batchclf-")  # noqa: SIM115 - the caller closes it
        try:
            for chunk in reply["Body"].iter_chunks(_CHUNK_BYTES):
                if digest is not None:
                    digest.update(chunk)
                file.write(chunk)
            if digest is not None and digest.etag() != reply["ETag"]:
                raise _WrongDigestError(etag=reply["ETag"])
            file.seek(0)
        except OSError as error:
            file.close()
            raise translate_os_error(error, f"scratch space in {tempfile.gettempdir()}") from error
        except BaseException:
            file.close()
            raise
        return file

    def _etag_digest(self, source: Source, reply: "GetObjectOutputTypeDef") -> "_EtagDigest | None":
        """What works out the ETag from the bytes; None where that cannot be done."""
        if _is_encrypted(reply) or any("-" not in str(reply.get(key, "-")) for key in _BY_BOTOCORE):
            return None
        match = _MD5_ETAG.fullmatch(reply["ETag"])
        if match is None:
            return None
        if match["num_parts"] is None:
            return _EtagDigest()
        part_sizes = self._part_sizes(source, int(match["num_parts"]))
        return _EtagDigest(part_sizes) if part_sizes else None

    def _part_sizes(self, source: Source, num_parts: int) -> list[int]:
        """Bytes of each part of a multipart upload; empty where the store does not tell.

        Those of another version, if the object was replaced just now, fit no digest.
        """
        bucket, key = split_uri(source.uri)

        def head(number: int) -> "HeadObjectOutputTypeDef":
            return self.client.head_object(Bucket=bucket, Key=key, PartNumber=number)

        if head(1).get("PartsCount") != num_parts:
            return []
        with ThreadPoolExecutor(_HEAD_THREADS) as pool:
            heads = pool.map(head, range(1, num_parts + 1))
            return [reply["ContentLength"] for reply in heads]

    def open_ranges(self, source: Source) -> BinaryIO:
        """The object as a file of which only the parts that are read are fetched."""
        return io.BufferedReader(_Ranges(self, source), buffer_size=_CHUNK_BYTES)

    def _get(self, source: Source, byte_range: str | None = None) -> "GetObjectOutputTypeDef":
        bucket, key = split_uri(source.uri)
        extra = {} if byte_range is None else {"Range": byte_range}
        return self.client.get_object(Bucket=bucket, Key=key, IfMatch=source.version, **extra)  # type: ignore[arg-type]


class _Ranges(io.RawIOBase):
    """Random access by ranged GETs of one version."""

    def __init__(self, s3: S3, source: Source) -> None:
        self._s3 = s3
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {
            io.SEEK_SET: 0,
            io.SEEK_CUR: self._position,
            io.SEEK_END: self._source.size_bytes,
        }
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        stop = min(self._position + len(buffer), self._source.size_bytes)
        if stop <= self._position:
            return 0
        with _s3_errors(str(self._source), reading=True):
            for attempt in _retrying(*_BROKEN_BODY):
                with attempt:
                    reply = self._s3._get(self._source, f"bytes={self._position}-{stop - 1}")  # noqa: SLF001 - one room
                    content = reply["Body"].read()
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


class _EtagDigest:
    """The ETag that an upload gets: its MD5, or the MD5 of its parts' MD5s and their number.

    https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html

    Args:
        part_sizes: bytes of each part of a multipart upload.
    """

    def __init__(self, part_sizes: Sequence[int] = ()) -> None:
        self._num_parts = len(part_sizes)
        self._sizes = iter(part_sizes)
        self._left = next(self._sizes, None)  # bytes until the part ends
        self._current = hashlib.md5(usedforsecurity=False)
        self._parts = hashlib.md5(usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        while self._left is not None and len(chunk) >= self._left:
            self._current.update(chunk[: self._left])
            self._parts.update(self._current.digest())
            self._current = hashlib.md5(usedforsecurity=False)
            chunk = chunk[self._left :]
            self._left = next(self._sizes, None)
        self._current.update(chunk)
        if self._left is not None:
            self._left -= len(chunk)

    def etag(self) -> str:
        if self._num_parts:
            return f'"{self._parts.hexdigest()}-{self._num_parts}"'
        return f'"{self._current.hexdigest()}"'


class S3Folder(Folder):
    """The objects under an s3:// prefix."""

    def __init__(self, s3: S3, uri: str) -> None:
        self._s3 = s3
        self._client = s3.client
        self._bucket, prefix = split_uri(uri)
        prefix = prefix.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{self._bucket}/{prefix}".rstrip("/")

    def prepare(self) -> None:
        name = f"_probe-{uuid.uuid4().hex}"
        created = []
        with _s3_errors(self.uri, reading=False):
            try:
                for _ in range(2):
                    with self.scratch(name) as scratch:
                        scratch.file.write(b"batchclf asks whether create-only writes are honoured")
                        created.append(self.publish(scratch))
            finally:
                self._remove_probe(name)
        # A lost reply to the first write makes it look refused, which is no harm.
        if created[1]:
            raise ConfigError(
                f"{self.uri}: this store ignores If-None-Match, so a second worker would replace "
                "what the first has committed. Use AWS S3, or a server with conditional writes"
            )

    def _remove_probe(self, name: str) -> None:
        try:
            self.delete(name)
        except ConfigError:
            log.info("left a probe object, since this role may not delete: %s/%s", self.uri, name)

    def sizes(self, prefix: str) -> Mapping[str, int]:
        with _s3_errors(self.uri, reading=False):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            return {
                item["Key"].removeprefix(self._prefix): item["Size"]
                for page in pages
                for item in page.get("Contents", [])
            }

    def open(self, name: str, *, whole: bool = False) -> BinaryIO | None:
        uri = f"s3://{self._bucket}/{self._prefix}{name}"
        with _s3_errors(uri, reading=False):
            try:
                head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
            except ClientError as error:
                if _status(error) == _NOT_FOUND:
                    return None
                raise
        source = Source(uri, head["ETag"], head["ContentLength"])
        return self._s3.download(source) if whole else self._s3.open_ranges(source)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Scratch]:
        try:
            with tempfile.TemporaryFile(prefix="batchclf-") as file:
                yield Scratch(name, file)
        except OSError as error:
            raise translate_os_error(error, f"scratch space in {tempfile.gettempdir()}") from error

    def publish(self, scratch: Scratch) -> bool:
        key = self._prefix + scratch.name
        size_bytes = scratch.file.seek(0, io.SEEK_END)
        create = self._put_once if size_bytes <= _SINGLE_PUT_BYTES else self._put_parts_once
        with _s3_errors(f"s3://{self._bucket}/{key}", reading=False):
            for attempt in _retrying(_NotTakenError):
                with attempt:
                    return create(key, scratch.file)
        raise AssertionError  # Retrying returns or raises

    def _put_once(self, key: str, file: BinaryIO) -> bool:
        file.seek(0)
        try:
            self._client.put_object(Bucket=self._bucket, Key=key, Body=file, IfNoneMatch="*")
        except ClientError as error:
            return _not_created(error)
        return True

    def _put_parts_once(self, key: str, file: BinaryIO) -> bool:
        file.seek(0)
        client, bucket = self._client, self._bucket
        upload_id = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        parts: list[CompletedPartTypeDef] = []
        try:
            while chunk := file.read(_PART_BYTES):
                number = len(parts) + 1
                reply = client.upload_part(
                    Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=chunk
                )
                parts.append({"ETag": reply["ETag"], "PartNumber": number})
            client.complete_multipart_upload(
                Bucket=bucket,
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )
        except ClientError as error:
            self._abort(key, upload_id)
            if _code(error) == "NoSuchUpload":
                # The reply to an earlier attempt was lost: either it completed, or somebody
                # aborted the upload. The object tells.
                if self.open(key.removeprefix(self._prefix)) is not None:
                    return False
                raise _NotTakenError("the multipart upload was aborted by somebody") from error
            return _not_created(error)
        except BaseException:
            self._abort(key, upload_id)
            raise
        return True

    def _abort(self, key: str, upload_id: str) -> None:
        # The parts cost money until they are gone; the bucket's lifecycle rule takes the rest.
        with contextlib.suppress(ClientError, BotoCoreError):
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload_id)

    def put(self, name: str, content: bytes) -> None:
        with _s3_errors(f"{self.uri}/{name}", reading=False):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=content)

    def delete(self, name: str) -> None:
        with _s3_errors(f"{self.uri}/{name}", reading=False):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/key` in two; the key may be empty and holds no escapes.

    Raises:
        ConfigError: there is no bucket in it.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(f"{uri}: no bucket; write s3://bucket/prefix")
    return bucket, key


def _relative(key: str, prefix: str) -> str:
    return key[prefix.rfind("/") + 1 :]


def _known(source: Source) -> Source:
    if source_suffix(source.uri) is None:
        raise InputError(f"{source}: not a .parquet, .csv, .csv.gz, .jsonl or .jsonl.gz file")
    return source


def _retrying(*transient: type[BaseException]) -> Retrying:
    return Retrying(
        retry=retry_if_exception_type(transient),
        stop=stop_after_attempt(5),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        reraise=True,
    )


def _is_encrypted(reply: "GetObjectOutputTypeDef") -> bool:
    """Whether KMS or its owner encrypted an object: then no MD5 is in its ETag.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    return bool(reply.get("SSECustomerAlgorithm")) or "kms" in reply.get("ServerSideEncryption", "")


# Checksums of the whole object that botocore holds against the body by itself.
_BY_BOTOCORE = ("ChecksumCRC32", "ChecksumSHA1", "ChecksumSHA256")
_MD5_ETAG = re.compile(r'"[0-9a-f]{32}(-(?P<num_parts>[0-9]+))?"')
_NOT_FOUND = 404
_CONFLICT = 409
_PRECONDITION_FAILED = 412
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500
_WRONG_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_BAD_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
}
_DAMAGED = {
    "BadDigest",
    "IncompleteBody",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_THROTTLED = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestTimeout",
    "RequestLimitExceeded",
}
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _not_created(error: ClientError) -> bool:
    if _status(error) == _PRECONDITION_FAILED:
        return False
    if _status(error) == _CONFLICT:
        raise _NotTakenError("another write of this object kept being under way") from error
    if _code(error) in _DAMAGED:
        raise _NotTakenError(f"its bytes kept arriving damaged ({_code(error)})") from error
    raise error


@contextmanager
def _s3_errors(what: str, *, reading: bool) -> Iterator[None]:
    try:
        yield
    except _NotTakenError as error:
        raise StoreError(f"{what}: {error}; try again later") from error
    except ClientError as error:
        raise _translate(error, what, reading=reading) from error
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError) as error:
        raise CredentialsError(
            f"{what}: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or "
            "give the machine a role"
        ) from error
    except ParamValidationError as error:
        raise ConfigError(f"{what}: {error}") from error
    except (FlexibleChecksumError, _WrongDigestError) as error:
        raise DamagedError(f"{what}: {error}") from error
    except (BotoConnectionError, HTTPClientError, *_BROKEN_BODY) as error:
        raise StoreError(f"{what}: {error}") from error
    except BotoCoreError as error:
        raise ConfigError(f"{what}: {error}") from error


def _translate(error: ClientError, what: str, *, reading: bool) -> BatchclfError:
    code, status = _code(error), _status(error)
    refused: type[BatchclfError] = InputError if reading else ConfigError
    message = error.response.get("Error", {}).get("Message", "")
    said = f"{code} {message}".strip()
    if code in _BAD_CREDENTIALS:
        return CredentialsError(f"{what}: the credentials are not accepted ({said}); renew them")
    if code in _WRONG_REGION:
        region = error.response["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        advice = f"set AWS_REGION={region}" if region else "set AWS_REGION to the bucket's region"
        return ConfigError(f"{what}: the bucket is in another region; {advice}")
    if code == "NoSuchBucket":
        return refused(f"{what}: there is no such bucket")
    if status == _NOT_FOUND:
        return refused(f"{what}: there is no such object")
    if status == _PRECONDITION_FAILED and reading:
        return InputChangedError(f"{what}: replaced since the plan was made; run again")
    if status >= _SERVER_ERROR or status == _TOO_MANY_REQUESTS or code in _THROTTLED:
        return StoreError(f"{what}: the store keeps answering {status} {said}; try again later")
    return refused(f"{what}: the store answered {status} {said}")
