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
    sources = find_sources(inputs, endpoint_url)

    def look(source: Source) -> Contents | InputError:
        try:
            return _contents(source, read, cut.rows_per_shard, endpoint_url)
        except InputError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        looked = list(zip(sources, pool.map(look, sources), strict=True))
    readable = [(source, found) for source, found in looked if isinstance(found, Contents)]
    unreadable = tuple(found for _, found in looked if isinstance(found, InputError))
    return Plan(tuple(sources), tuple(plan_shards(readable, cut)), unreadable)


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
    source: Source, read: ReadSettings, rows_per_shard: int, endpoint_url: str | None
) -> Contents:
    read.check_size(source.size_bytes, str(source))
    # The footer of a Parquet file tells its rows; text has to be read to its end.
    is_parquet = source_suffix(source.uri) == ".parquet"
    file = (open_source_tail if is_parquet else open_source)(source, endpoint_url)
    try:
        return open_reader(file, source, read).contents(rows_per_shard)
    finally:
        file.close()
