"""A folder to publish into, under an s3:// prefix."""

import contextlib
import io
import logging
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from botocore.exceptions import BotoCoreError, ClientError

from batchclf.errors import ConfigError
from batchclf.retries import code_of, status_of
from batchclf.store.base import Folder, Scratch, Source, translate_os_error
from batchclf.store.s3 import S3, split_uri
from batchclf.store.s3_errors import (
    NOT_FOUND,
    PRECONDITION_FAILED,
    NotTakenError,
    retrying,
    s3_errors,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

log = logging.getLogger(__name__)

_SINGLE_PUT_BYTES = 32 << 20  # larger objects go up in parts
_PART_BYTES = 16 << 20  # at least 5 MiB and at most 10,000 parts:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
_CONFLICT = 409
_DAMAGED = {
    "BadDigest",
    "IncompleteBody",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}


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
        with s3_errors(self.uri, reading=False):
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
        with s3_errors(self.uri, reading=False):
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
        with s3_errors(uri, reading=False):
            try:
                head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
            except ClientError as error:
                if status_of(error) == NOT_FOUND:
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
        with s3_errors(f"s3://{self._bucket}/{key}", reading=False):
            for attempt in retrying(NotTakenError):
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
            if code_of(error) == "NoSuchUpload":
                # The reply to an earlier attempt was lost: either it completed, or somebody
                # aborted the upload. The object tells.
                if self.open(key.removeprefix(self._prefix)) is not None:
                    return False
                raise NotTakenError("the multipart upload was aborted by somebody") from error
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
        with s3_errors(f"{self.uri}/{name}", reading=False):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=content)

    def delete(self, name: str) -> None:
        with s3_errors(f"{self.uri}/{name}", reading=False):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)


def _not_created(error: ClientError) -> bool:
    if status_of(error) == PRECONDITION_FAILED:
        return False
    if status_of(error) == _CONFLICT:
        raise NotTakenError("another write of this object kept being under way") from error
    if code_of(error) in _DAMAGED:
        raise NotTakenError(f"its bytes kept arriving damaged ({code_of(error)})") from error
    raise error
