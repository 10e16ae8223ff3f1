"""The plan of a job: look into every input, count its rows, cut it into shards."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from batchclf.config import CutSettings, ReadSettings
from batchclf.errors import InputError
from batchclf.shards import Contents, Shard, plan_shards
from batchclf.source import open_reader
from batchclf.store import Source, find_sources, open_source, open_source_tail, source_suffix

_THREADS = 8  # counting waits for the store, or runs in C


@dataclass(frozen=True)
class Plan:
    """All shards of a job, in input order, and the sources that cannot be read."""

    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    unreadable: tuple[InputError, ...]


@dataclass(frozen=True)
class Looked:
    """What a look into every input found.

    Attributes:
        sources: all of them, in input order.
        readable: those that can be read, and what is in them.
        unreadable: why the others cannot.
    """

    sources: tuple[Source, ...]
    readable: tuple[tuple[Source, Contents], ...]
    unreadable: tuple[InputError, ...]


def make_plan(
    inputs: Sequence[str],
    read: ReadSettings,
    cut: CutSettings,
    endpoint_url: str | None = None,
) -> Plan:
    """Find the inputs and cut them. A source that cannot be read does not stop the others.

    Raises:
        InputError: an argument matches nothing at all.
        StoreError: the store kept failing.
    """
    looked = look_into(inputs, read, cut.rows_per_shard, endpoint_url)
    shards = plan_shards(looked.readable, cut)
    return Plan(looked.sources, tuple(shards), looked.unreadable)


def look_into(
    inputs: Sequence[str], read: ReadSettings, offset_rows: int, endpoint_url: str | None
) -> Looked:
    """Find the inputs and count their rows.

    Args:
        inputs: files, folders, globs and prefixes.
        read: which columns they have to have.
        offset_rows: of uncompressed text, every so many rows the place in the file is noted.
        endpoint_url: of the store.

    Raises:
        InputError: an argument matches nothing at all.
        StoreError: the store kept failing.
    """
    sources = find_sources(inputs, endpoint_url)

    def look(source: Source) -> Contents | InputError:
        try:
            return _contents(source, read, offset_rows, endpoint_url)
        except InputError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        looked = list(zip(sources, pool.map(look, sources), strict=True))
    return Looked(
        tuple(sources),
        tuple((source, found) for source, found in looked if isinstance(found, Contents)),
        tuple(found for _, found in looked if isinstance(found, InputError)),
    )


def cut_source(
    source: Source, read: ReadSettings, cut: CutSettings, endpoint_url: str | None = None
) -> list[Shard]:
    """The shards of one source, as in the plan of a job that has it among its inputs.

    Raises:
        InputError: it cannot be read.
        StoreError: the store kept failing.
    """
    contents = _contents(source, read, cut.rows_per_shard, endpoint_url)
    return plan_shards([(source, contents)], cut)


def _contents(
    source: Source, read: ReadSettings, offset_rows: int, endpoint_url: str | None
) -> Contents:
    read.check_size(source.size_bytes, str(source))
    # The footer of a Parquet file tells its rows; text has to be read to its end.
    is_parquet = source_suffix(source.uri) == ".parquet"
    file = (open_source_tail if is_parquet else open_source)(source, endpoint_url)
    try:
        return open_reader(file, source, read).contents(offset_rows)
    finally:
        file.close()
