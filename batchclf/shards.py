"""Inputs to shards: row ranges that are read, labelled and committed as one. Pure planning.

A shard is known by its source URI, the source's version and its rows, and so is its output. The
cut depends on the input and on `--rows-per-shard` alone, never on the number of workers.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from batchclf.config import CutSettings, Share
from batchclf.errors import ConfigError
from batchclf.store import Source

_SUFFIX = ".parquet"
_SOURCE_DIGITS = 16
_NAME = re.compile(
    rf".+-(?P<source>[0-9a-f]{{{_SOURCE_DIGITS}}})-(?P<start>\d+)-(?P<stop>\d+)\.parquet"
)
_UNSAFE = re.compile(r"[^\w.=+-]+")
_MOST_NAME_BYTES = 120  # of the input's own name; a file name may have 255 in all


@dataclass(frozen=True)
class Contents:
    """What planning needs to know of a source.

    Attributes:
        num_rows: rows in it, bad ones included.
        row_groups: rows of each Parquet row group, in order; empty for other formats.
        offsets: for uncompressed text formats, byte offset of some rows, for seeking.
    """

    num_rows: int
    row_groups: tuple[int, ...] = ()
    offsets: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """Rows `start` to `stop` (exclusive) of a source; unit of input and of commit.

    `offset` is where row `start` begins in bytes, if planning saw it: a shortcut, no identity.
    """

    source: Source
    start: int
    stop: int
    offset: int | None = field(default=None, compare=False)

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        """File name of the output: the input's own name, its identity, and the rows."""
        own = _UNSAFE.sub("_", unquote(self.source.uri).rsplit("/", 1)[-1])
        own = own.encode()[:_MOST_NAME_BYTES].decode(errors="ignore").lstrip("._-") or "input"
        return f"{own}-{source_digest(self.source)}-{self.start:09d}-{self.stop:09d}{_SUFFIX}"

    def __str__(self) -> str:
        return f"{self.source} rows {self.start} to {self.stop}"


def source_digest(source: Source) -> str:
    """Sixteen hex digits that stand for a source in this version."""
    identity = f"{source.uri}\0{source.version}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(identity).hexdigest()[:_SOURCE_DIGITS]


def source_of_name(name: str) -> str | None:
    """The digits in the name of an output that stand for its source."""
    match = _NAME.fullmatch(name.rsplit("/", 1)[-1])
    return match["source"] if match else None


def cut_rows(contents: Contents, rows_per_shard: int) -> list[tuple[int, int]]:
    """Cut one source into row ranges of at most `rows_per_shard` rows.

    Along row groups where it can: whole row groups are gathered while they fit, and only a row
    group that is larger than a shard is cut inside. A source without rows is one empty shard, so
    that its output exists.
    """
    if rows_per_shard < 1:
        raise ConfigError(f"--rows-per-shard must be at least 1, not {rows_per_shard}")
    ranges: list[tuple[int, int]] = []
    start = position = 0
    for size in contents.row_groups or (contents.num_rows,):
        if position > start and position + size - start > rows_per_shard:
            ranges.append((start, position))
            start = position
        position += size
        while position - start > rows_per_shard:
            ranges.append((start, start + rows_per_shard))
            start += rows_per_shard
    if position > start or not ranges:
        ranges.append((start, position))
    return ranges


def plan_shards(sources: Sequence[tuple[Source, Contents]], settings: CutSettings) -> list[Shard]:
    """All shards of a job, in input order; with a limit, those of the first `limit` rows."""
    shards: list[Shard] = []
    left = settings.limit
    for source, contents in sources:
        for start, stop in cut_rows(contents, settings.rows_per_shard):
            if left is not None:
                if left <= 0:
                    return shards
                stop = min(stop, start + left)  # noqa: PLW2901
                left -= stop - start
            shards.append(Shard(source, start, stop, contents.offsets.get(start)))
    return shards


def take_share(shards: Sequence[Shard], share: Share) -> list[Shard]:
    """This worker's shards: a run of neighbours, so that few workers read the same file.

    The shares of all workers together are all shards, each once, and differ by one at the most.
    """
    first = len(shards) * share.index // share.count
    last = len(shards) * (share.index + 1) // share.count
    return list(shards[first:last])


def check_same_cut(shards: Sequence[Shard], existing: Sequence[str]) -> None:
    """Raise ConfigError if an earlier run cut one of these sources in another way.

    Its outputs would hold some rows a second time.
    """
    planned = {shard.name for shard in shards}
    digests = {source_digest(shard.source): shard.source for shard in shards}
    for name in existing:
        match = _NAME.fullmatch(name.rsplit("/", 1)[-1])
        if match and match["source"] in digests and match[0] not in planned:
            raise ConfigError(
                f"{digests[match['source']]}: the output already holds its rows "
                f"{int(match['start'])} to {int(match['stop'])} as one shard, which is another cut "
                "than asked for now; use the same --rows-per-shard as before, or a new --output"
            )
