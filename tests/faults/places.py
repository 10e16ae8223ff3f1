"""Where the inputs of a test lie and its output grows: a local folder, or a bucket."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import fs
from servers import ACCESS_KEY, REGION, SECRET_KEY, Endpoint


class Place(ABC):
    """Inputs and an output beside them; seen directly, whatever stands before batchclf.

    Attributes:
        env: variables that batchclf needs to get there.
    """

    env: Mapping[str, str]
    _output = "out"

    def with_output(self, name: str) -> Self:
        """The same inputs, and an output of another name."""
        other = copy.copy(self)
        other._output = name
        return other

    @property
    @abstractmethod
    def output(self) -> str:
        """What batchclf is given as --output."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> str:
        """Write, or replace, an input; returns what batchclf is given for it."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete an input."""

    @abstractmethod
    def names(self) -> list[str]:
        """Everything below the output, hidden names too, sorted."""

    @abstractmethod
    def read_output(self, name: str) -> bytes: ...

    @abstractmethod
    def write_output(self, name: str, content: bytes) -> None: ...

    @abstractmethod
    def dataset(self, under: str = "") -> ds.Dataset:
        """The output, or a folder of it, as pyarrow.dataset finds it."""

    def visible(self) -> list[str]:
        """The names below the output that its readers do not pass over."""
        return [
            name
            for name in self.names()
            if not any(part.startswith(("_", ".")) for part in name.split("/"))
        ]

    def rows(self, under: str = "") -> pa.Table:
        """All rows that a reader of the output sees; no rows where there is no output."""
        if not self.visible():
            return pa.table({"id": pa.array([], pa.string())})
        return self.dataset(under).to_table()


class LocalPlace(Place):
    def __init__(self, root: Path) -> None:
        self._root = root
        self._input = root / "in"
        self.env = {}

    @property
    def folder(self) -> Path:
        return self._root / self._output

    @property
    def output(self) -> str:
        return str(self.folder)

    def write(self, name: str, content: bytes) -> str:
        path = self._input / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    def remove(self, name: str) -> None:
        (self._input / name).unlink()

    def names(self) -> list[str]:
        return sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if not path.is_dir()
        )

    def read_output(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write_output(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def dataset(self, under: str = "") -> ds.Dataset:
        return ds.dataset(self.folder / under, format="parquet")


class S3Place(Place):
    """A bucket.

    Args:
        server: the server itself, for the test.
        bucket: an empty bucket.
        seen_by_batchclf: another way to the same server.
    """

    def __init__(
        self, server: Endpoint, bucket: str, seen_by_batchclf: Endpoint | None = None
    ) -> None:
        self.server = server
        self.bucket = bucket
        self.env = (seen_by_batchclf or server).env

    @property
    def output(self) -> str:
        return f"s3://{self.bucket}/{self._output}"

    def write(self, name: str, content: bytes) -> str:
        self.server.s3.put_object(Bucket=self.bucket, Key=f"in/{name}", Body=content)
        return f"s3://{self.bucket}/in/{name}"

    def write_parts(self, name: str, parts: Sequence[bytes]) -> str:
        """Write an input by a multipart upload."""
        s3, bucket, key = self.server.s3, self.bucket, f"in/{name}"
        upload_id = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        for number, part in enumerate(parts, 1):
            s3.upload_part(Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=part)
        uploaded = s3.list_parts(Bucket=bucket, Key=key, UploadId=upload_id)["Parts"]
        s3.complete_multipart_upload(
            Bucket=bucket,
            Key=key,
            UploadId=upload_id,
            MultipartUpload={
                "Parts": [{"PartNumber": p["PartNumber"], "ETag": p["ETag"]} for p in uploaded]
            },
        )
        return f"s3://{self.bucket}/in/{name}"

    def remove(self, name: str) -> None:
        self.server.s3.delete_object(Bucket=self.bucket, Key=f"in/{name}")

    def names(self) -> list[str]:
        pages = self.server.s3.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{self._output}/"
        )
        return sorted(
            item["Key"].partition("/")[2] for page in pages for item in page.get("Contents", [])
        )

    def read_output(self, name: str) -> bytes:
        key = f"{self._output}/{name}"
        return self.server.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def write_output(self, name: str, content: bytes) -> None:
        key = f"{self._output}/{name}"
        self.server.s3.put_object(Bucket=self.bucket, Key=key, Body=content)

    def dataset(self, under: str = "") -> ds.Dataset:
        path = f"{self.bucket}/{self._output}/{under}".rstrip("/")
        return ds.dataset(path, filesystem=self._filesystem, format="parquet")

    @cached_property
    def _filesystem(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            region=REGION,
            scheme="http",
            endpoint_override=self.server.endpoint_url.removeprefix("http://"),
        )


def labels_of(place: Place, under: str = "") -> dict[str, str | None]:
    """By id, the label of every row that a reader of an output sees; no row may stand twice."""
    rows = place.rows(under)
    ids = rows["id"].to_pylist()
    found = dict(zip(ids, rows["label"].to_pylist(), strict=True)) if ids else {}
    assert len(found) == len(ids), "some rows stand there twice"
    return found


def temporary(place: Place) -> list[str]:
    """What is left of files that were being written."""
    return [name for name in place.names() if name.rpartition("/")[2].startswith(".")]
