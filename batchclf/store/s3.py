"""S3 and what speaks its language."""

import fnmatch
import functools
import io
import os
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, NoRegionError

from batchclf.errors import ConfigError, InputError
from batchclf.retries import ONE_ATTEMPT, retry
from batchclf.store.base import Source, hidden, source_suffix, translate_os_error
from batchclf.store.etag import EtagDigest
from batchclf.store.s3_errors import BROKEN_BODY, WrongDigestError, retrying, s3_errors

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        GetObjectOutputTypeDef,
        HeadObjectOutputTypeDef,
    )

_CHUNK_BYTES = 1 << 20
_HEAD_THREADS = 8
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60

# Checksums of the whole object that botocore holds against the body by itself.
_BY_BOTOCORE = ("ChecksumCRC32", "ChecksumSHA1", "ChecksumSHA256")
_MD5_ETAG = re.compile(r'"[0-9a-f]{32}(-(?P<num_parts>[0-9]+))?"')


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
            retries=ONE_ATTEMPT,
            max_pool_connections=32,
            tcp_keepalive=True,
            # bucket.host names resolve at AWS; elsewhere they rarely do
            s3={"addressing_style": "path" if elsewhere else "auto"},
        )
        try:
            client = boto3.session.Session().client(
                "s3",
                # boto3 itself reads AWS_DEFAULT_REGION alone
                region_name=os.environ.get("AWS_REGION") or None,
                endpoint_url=endpoint_url,
                config=config,
            )
        except NoRegionError as error:
            raise ConfigError(f"S3: {error} Set AWS_REGION.") from error
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"S3: {error}") from error
        retry(client)
        return cls(client)

    def find(self, given: str) -> list[Source]:
        """The sources under an s3:// prefix or glob; one alone if the prefix is its whole key."""
        bucket, pattern = split_uri(given)
        magic = min((pattern.index(c) for c in "*?[" if c in pattern), default=len(pattern))
        sources = []
        with s3_errors(given, reading=True):
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

    def list_objects(self, uri: str) -> Mapping[str, Source]:
        """Name to object of what is directly under a prefix."""
        bucket, prefix = split_uri(f"{uri.rstrip('/')}/")
        with s3_errors(uri, reading=True):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket, Prefix=prefix, Delimiter="/"
            )
            return {
                item["Key"].removeprefix(prefix): Source(
                    f"s3://{bucket}/{item['Key']}", item["ETag"], item["Size"]
                )
                for page in pages
                for item in page.get("Contents", [])
                if item["Key"] != prefix
            }

    def head(self, uri: str) -> Source:
        """The source of exactly this name; `find` takes a name for a prefix or a glob as well."""
        bucket, key = split_uri(uri)
        with s3_errors(uri, reading=True):
            reply = self.client.head_object(Bucket=bucket, Key=key)
        return _known(Source(uri, reply["ETag"], reply["ContentLength"]))

    def read(self, uri: str, most_bytes: int) -> bytes:
        """The content of the object of exactly this name, at most so much."""
        bucket, key = split_uri(uri)
        with s3_errors(uri, reading=True):
            for attempt in retrying(*BROKEN_BODY):
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
        with s3_errors(str(source), reading=True):
            for attempt in retrying(*BROKEN_BODY, WrongDigestError):
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
                raise WrongDigestError(etag=reply["ETag"])
            file.seek(0)
        except OSError as error:
            file.close()
            raise translate_os_error(error, f"scratch space in {tempfile.gettempdir()}") from error
        except BaseException:
            file.close()
            raise
        return file

    def _etag_digest(self, source: Source, reply: "GetObjectOutputTypeDef") -> "EtagDigest | None":
        """What works out the ETag from the bytes; None where that cannot be done."""
        if _is_encrypted(reply) or any("-" not in str(reply.get(key, "-")) for key in _BY_BOTOCORE):
            return None
        match = _MD5_ETAG.fullmatch(reply["ETag"])
        if match is None:
            return None
        if match["num_parts"] is None:
            return EtagDigest()
        part_sizes = self._part_sizes(source, int(match["num_parts"]))
        return EtagDigest(part_sizes) if part_sizes else None

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
        with s3_errors(str(self._source), reading=True):
            for attempt in retrying(*BROKEN_BODY):
                with attempt:
                    reply = self._s3._get(self._source, f"bytes={self._position}-{stop - 1}")  # noqa: SLF001 - one room
                    content = reply["Body"].read()
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


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


def _is_encrypted(reply: "GetObjectOutputTypeDef") -> bool:
    """Whether KMS or its owner encrypted an object: then no MD5 is in its ETag.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    return bool(reply.get("SSECustomerAlgorithm")) or "kms" in reply.get("ServerSideEncryption", "")
