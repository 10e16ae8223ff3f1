"""Predictions to one Parquet file per shard, committed by its appearance."""

import contextlib
import hashlib
import io
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchclf import __version__
from batchclf.errors import OutputError
from batchclf.predictions import Predictions, to_record_batch
from batchclf.schema import output_schema
from batchclf.shards import Shard
from batchclf.store import Folder, Scratch

_ROW_GROUP_ROWS = 32_768
_ROW_GROUP_BYTES = 64 << 20
_PREFIX = "batchclf."
_CHUNK_BYTES = 1 << 20
_MOST_FOOTER_BYTES = 16 << 20  # that are searched for the seal

# The last entry of the footer's metadata is the SHA-256, in hex, of the whole file with zeros in
# the place of that digest: page checksums guard neither page headers nor the footer.
_SEAL = _PREFIX + "sha256"
_UNSEALED = "0" * 64


@dataclass
class Counts:
    """Rows of one shard, or of many, by what became of them; and the tokens the model saw."""

    num_rows: int = 0
    num_labelled: int = 0
    num_abstained: int = 0
    num_failed: int = 0
    num_truncated: int = 0
    num_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Footer:
    """What an output says of itself in its Parquet metadata, under `batchclf.*`."""

    source: str
    source_version: str
    start: int
    stop: int
    fingerprint: str
    version: str
    nonce: str
    finished_at: str
    counts: Counts

    def to_metadata(self) -> dict[str, str]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "counts"}
        values |= asdict(self.counts)
        return {_PREFIX + name: str(value) for name, value in values.items()}

    @classmethod
    def read(cls, file: BinaryIO, name: str) -> "Footer":
        """The footer of a published file.

        Raises:
            OutputError: not a Parquet file, or one that batchclf did not write.
        """
        try:
            metadata = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise OutputError(f"{name}: not a whole Parquet file: {error}") from error
        try:
            found = {
                key.decode().removeprefix(_PREFIX): value.decode()
                for key, value in (metadata.metadata or {}).items()
                if key.startswith(_PREFIX.encode())
            }
            footer = cls(
                source=found["source"],
                source_version=found["source_version"],
                start=int(found["start"]),
                stop=int(found["stop"]),
                fingerprint=found["fingerprint"],
                version=found["version"],
                nonce=found["nonce"],
                finished_at=found["finished_at"],
                counts=Counts(**{f.name: int(found[f.name]) for f in fields(Counts)}),
            )
        except (KeyError, ValueError) as error:
            raise OutputError(f"{name}: not written by batchclf: no good {error}") from error
        if not metadata.num_rows == footer.counts.num_rows == footer.stop - footer.start:
            raise OutputError(
                f"{name}: holds {metadata.num_rows} rows, its footer speaks of "
                f"{footer.counts.num_rows} for rows {footer.start} to {footer.stop}"
            )
        return footer

    def is_of(self, shard: Shard, fingerprint: str) -> bool:
        """Whether this is the finished work of a shard under a fingerprint."""
        return (self.source, self.source_version, self.start, self.stop, self.fingerprint) == (
            shard.source.uri,
            shard.source.version,
            shard.start,
            shard.stop,
            fingerprint,
        )


class ShardWriter:
    """Writes the rows of one shard to scratch, in order."""

    def __init__(
        self, scratch: Scratch, shard: Shard, kept: pa.Schema, labels: Sequence[str], *, probs: bool
    ) -> None:
        self.scratch = scratch
        self.shard = shard
        self.counts = Counts()
        self.label_counts = np.zeros(len(labels), dtype=np.int64)
        self.first_error: str | None = None
        self._schema = output_schema(kept, labels, probs=probs)
        self._labels = pa.array(labels, pa.string())
        self._writer = pq.ParquetWriter(
            scratch.file,
            self._schema,
            compression="zstd",
            write_statistics=True,
            write_page_checksum=True,
        )
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._pending_bytes = 0

    def write(self, first_row: int, kept: pa.RecordBatch, predictions: Predictions) -> None:
        """Append neighbouring rows that begin at `first_row` of the source."""
        batch = to_record_batch(first_row, kept, predictions, self._labels, self._schema)
        failed = predictions.label < 0
        self.counts += Counts(
            num_rows=batch.num_rows,
            num_labelled=int((~failed & ~predictions.abstained).sum()),
            num_abstained=int((~failed & predictions.abstained).sum()),
            num_failed=int(failed.sum()),
            num_truncated=int(predictions.truncated.sum()),
            num_tokens=int(predictions.num_tokens.sum()),
        )
        shown = predictions.label[~failed & ~predictions.abstained]
        self.label_counts += np.bincount(shown, minlength=len(self.label_counts))
        if self.first_error is None and predictions.errors:
            index = min(predictions.errors)
            self.first_error = f"row {first_row + index}: {predictions.errors[index]}"
        self._pending.append(batch)
        self._pending_rows += batch.num_rows
        self._pending_bytes += batch.nbytes
        if self._pending_rows >= _ROW_GROUP_ROWS or self._pending_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending, self._schema)
            self._writer.write_table(table, row_group_size=max(self._pending_rows, 1))
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0

    def finish(self, fingerprint: str) -> Footer:
        """Close the file and read it back: as many rows as the shard has, or no commit.

        Raises:
            OutputError: rows in and rows out differ.
        """
        self._flush()
        footer = Footer(
            source=self.shard.source.uri,
            source_version=self.shard.source.version,
            start=self.shard.start,
            stop=self.shard.stop,
            fingerprint=fingerprint,
            version=__version__,
            nonce=uuid.uuid4().hex,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            counts=self.counts,
        )
        self._writer.add_key_value_metadata({**footer.to_metadata(), _SEAL: _UNSEALED})
        self._writer.close()
        _seal(self.scratch.file)
        self.scratch.file.flush()
        self.scratch.file.seek(0)
        return Footer.read(self.scratch.file, self.scratch.name)

    def abandon(self) -> None:
        """Let go of a file that will not be published."""
        with contextlib.suppress(OSError):  # the disk that was full still is
            self._writer.close()


def _seal(file: BinaryIO) -> None:
    place = _find_seal(file)
    digest = _digest(file, place)
    file.seek(place)
    file.write(digest.encode())


def check_seal(file: BinaryIO, name: str) -> None:
    """Raise OutputError unless every byte of a file is as it was written."""
    place = _find_seal(file)
    if place < 0:
        raise OutputError(f"{name}: damaged, or not written by batchclf: no {_SEAL} in its footer")
    file.seek(place)
    if file.read(len(_UNSEALED)) != _digest(file, place).encode():
        raise OutputError(f"{name}: damaged: its bytes do not fit their SHA-256")


def _find_seal(file: BinaryIO) -> int:
    """Where the digest begins in a file, or -1.

    In Thrift's compact protocol a value follows its key after two bytes: the type and the length.
    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """
    key = _SEAL.encode() + bytes([0x18, len(_UNSEALED)])
    first = max(file.seek(0, io.SEEK_END) - _MOST_FOOTER_BYTES, 0)
    file.seek(first)
    found = file.read().rfind(key)
    return -1 if found < 0 else first + found + len(key)


def _digest(file: BinaryIO, place: int) -> str:
    """SHA-256 of a file with zeros where its seal begins."""
    digest = hashlib.sha256()
    file.seek(0)
    left = place
    while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
        digest.update(chunk)
        left -= len(chunk)
    file.seek(place + len(_UNSEALED))
    digest.update(_UNSEALED.encode())
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Receipt:
    """An output that is committed: by this attempt (`created`, with its labels), or found so.

    Attributes:
        attempt: the nonce of the attempt that committed it, as it stands in the footer.
    """

    name: str
    counts: Counts
    created: bool
    labels: Mapping[str, int] = field(default_factory=dict)
    attempt: str = ""


class Sink:
    """The folder `fp=<fingerprint>` under the output, and the protocol of its commits."""

    def __init__(
        self, folder: Folder, fingerprint: str, labels: Sequence[str], *, probs: bool
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.prefix = f"fp={fingerprint}/"
        self._labels = tuple(labels)
        self._probs = probs

    def name(self, shard: Shard) -> str:
        return self.prefix + shard.name

    def committed(self, shard: Shard) -> Receipt | None:
        """The receipt of a shard whose output is there already.

        Raises:
            OutputError: something else has its name.
        """
        footer = self._read_footer(shard)
        if footer is None:
            return None
        return Receipt(self.name(shard), footer.counts, created=False, attempt=footer.nonce)

    @contextmanager
    def writer(self, shard: Shard, kept: pa.Schema) -> Iterator[ShardWriter]:
        """A writer for a shard; what it wrote is gone on leaving unless it was committed."""
        with self.folder.scratch(self.name(shard)) as scratch:
            writer = ShardWriter(scratch, shard, kept, self._labels, probs=self._probs)
            try:
                yield writer
            finally:
                writer.abandon()

    def commit(self, writer: ShardWriter) -> Receipt:
        """Publish a finished shard, create-only.

        Where an object is there already, it decides: with our own nonce the reply to our write
        was lost, with another valid footer somebody else did the same work; both are success.

        Raises:
            OutputError: something else has the shard's name.
        """
        own = writer.finish(self.fingerprint)
        created = self.folder.publish(writer.scratch)
        if not created:
            there = self._read_footer(writer.shard)
            if there is None:
                raise OutputError(
                    f"{self.name(writer.shard)}: the store refused to create it, but holds nothing"
                )
            created = there.nonce == own.nonce
            own = there
        labels = dict(zip(self._labels, writer.label_counts.tolist(), strict=True))
        return Receipt(self.name(writer.shard), own.counts, created, labels, own.nonce)

    def _read_footer(self, shard: Shard) -> Footer | None:
        name = self.name(shard)
        file = self.folder.open(name)
        if file is None:
            return None
        with file:
            footer = Footer.read(file, f"{self.folder.uri}/{name}")
        if not footer.is_of(shard, self.fingerprint):
            raise OutputError(
                f"{self.folder.uri}/{name}: holds other rows than {shard}; move it away"
            )
        return footer
