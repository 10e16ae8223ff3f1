import re
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, strategies as st

from batchclf.config import CutSettings, Share
from batchclf.errors import ConfigError
from batchclf.shards import Contents, Shard, check_same_cut, cut_rows, plan_shards, take_share
from batchclf.store import Source

sizes = st.integers(1, 60)
plain_contents = st.builds(Contents, st.integers(0, 200))
grouped_contents = st.lists(st.integers(0, 80), min_size=1, max_size=12).map(
    lambda groups: Contents(sum(groups), tuple(groups))
)
contents_of_any_kind = plain_contents | grouped_contents
contents_lists = st.lists(contents_of_any_kind, max_size=6)


def source(name: str = "news.csv", version: str = "v1") -> Source:
    return Source((PurePosixPath("/in") / name).as_uri(), version, 0)


def plan(contents: list[Contents], rows_per_shard: int, limit: int | None = None) -> list[Shard]:
    sources = [(source(f"{i}.csv"), each) for i, each in enumerate(contents)]
    return plan_shards(sources, CutSettings(rows_per_shard, limit))


def rows_of(shards: list[Shard]) -> list[tuple[str, int]]:
    return [(shard.source.uri, row) for shard in shards for row in range(shard.start, shard.stop)]


# The cut


@given(contents_of_any_kind, sizes)
def test_ranges_follow_each_other_from_the_first_row_to_the_last(
    contents: Contents, rows_per_shard: int
) -> None:
    ranges = cut_rows(contents, rows_per_shard)
    assert (ranges[0][0], ranges[-1][1]) == (0, contents.num_rows)
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


@given(contents_of_any_kind, sizes)
def test_a_range_has_at_least_one_row_and_at_most_those_of_a_shard(
    contents: Contents, rows_per_shard: int
) -> None:
    assume(contents.num_rows)
    assert all(
        1 <= stop - start <= rows_per_shard for start, stop in cut_rows(contents, rows_per_shard)
    )


@pytest.mark.parametrize("contents", [Contents(0), Contents(0, (0,)), Contents(0, (0, 0))])
def test_a_source_without_rows_is_one_empty_range(contents: Contents) -> None:
    assert cut_rows(contents, 10) == [(0, 0)]


@given(grouped_contents, sizes)
def test_a_row_group_that_fits_into_a_shard_is_never_cut(
    contents: Contents, rows_per_shard: int
) -> None:
    cuts = {start for start, _ in cut_rows(contents, rows_per_shard)}
    first = 0
    for size in contents.row_groups:
        if size <= rows_per_shard:
            assert not cuts & set(range(first + 1, first + size))
        first += size


@given(contents_of_any_kind, sizes)
def test_two_neighbouring_ranges_would_not_fit_into_one(
    contents: Contents, rows_per_shard: int
) -> None:
    ranges = cut_rows(contents, rows_per_shard)
    assert all(after[1] - before[0] > rows_per_shard for before, after in pairwise(ranges))


def test_row_groups_are_gathered_and_one_that_is_too_large_is_cut_inside() -> None:
    contents = Contents(34, (4, 4, 4, 21, 1))
    assert cut_rows(contents, 10) == [(0, 8), (8, 12), (12, 22), (22, 32), (32, 34)]


@pytest.mark.parametrize("rows_per_shard", [0, -1])
def test_shards_of_no_rows_are_refused(rows_per_shard: int) -> None:
    with pytest.raises(
        ConfigError, match=f"--rows-per-shard must be at least 1, not {rows_per_shard}"
    ):
        cut_rows(Contents(1), rows_per_shard)


# The plan


@given(contents_lists, sizes)
def test_a_plan_holds_every_row_of_every_source_once_and_in_order(
    contents: list[Contents], rows_per_shard: int
) -> None:
    expected = [
        (source(f"{i}.csv").uri, row)
        for i, each in enumerate(contents)
        for row in range(each.num_rows)
    ]
    assert rows_of(plan(contents, rows_per_shard)) == expected


@given(contents_lists, sizes, st.integers(0, 500))
def test_a_limit_plans_the_first_rows_and_no_others(
    contents: list[Contents], rows_per_shard: int, limit: int
) -> None:
    everything = rows_of(plan(contents, rows_per_shard))
    assert rows_of(plan(contents, rows_per_shard, limit)) == everything[:limit]


@given(contents_lists, sizes, st.integers(0, 500))
def test_a_limit_cuts_one_shard_at_the_most(
    contents: list[Contents], rows_per_shard: int, limit: int
) -> None:
    whole = {shard.name for shard in plan(contents, rows_per_shard)}
    limited = [shard.name for shard in plan(contents, rows_per_shard, limit)]
    assert set(limited[:-1]) <= whole


@given(contents_lists)
def test_every_source_has_an_output_even_without_rows(contents: list[Contents]) -> None:
    assert len({shard.source.uri for shard in plan(contents, 10)}) == len(contents)


def test_a_shard_knows_the_offset_that_planning_saw() -> None:
    contents = Contents(5, offsets={0: 8, 2: 99, 4: 120})
    assert [shard.offset for shard in plan([contents], 2)] == [8, 99, 120]
    assert [shard.offset for shard in plan([contents], 3)] == [8, None]


# Shares


@given(contents_lists, sizes, st.integers(1, 40))
def test_the_shares_of_all_workers_are_the_plan_of_one(
    contents: list[Contents], rows_per_shard: int, count: int
) -> None:
    shards = plan(contents, rows_per_shard)
    shares = [take_share(shards, Share(index, count)) for index in range(count)]
    assert [shard for share in shares for shard in share] == shards


@given(st.integers(0, 300), st.integers(1, 400))
def test_shares_differ_by_one_shard_at_the_most(num_shards: int, count: int) -> None:
    shards = [Shard(source(), i, i + 1) for i in range(num_shards)]
    lengths = {len(take_share(shards, Share(index, count))) for index in range(count)}
    assert max(lengths) - min(lengths) <= 1


def test_workers_beyond_the_shards_have_nothing_to_do() -> None:
    shares = [take_share([Shard(source(), 0, 1)], Share(index, 5)) for index in range(5)]
    assert sorted(len(share) for share in shares) == [0, 0, 0, 0, 1]


# Names

any_names = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=300
).filter(lambda name: name not in (".", ".."))
weird_names = st.sampled_from(
    [
        "_hidden.csv",
        ".hidden.csv",
        "__.._-x.csv",
        "новости.csv",
        "100%25.csv",
        "a b+c=d.csv",
        "..csv",
        "-rf.csv",
        "x" * 400 + ".csv",
        "新" * 100 + ".csv",
        "a\nb.csv",
        "_" * 300,
    ]
)


@example("новости-2024.csv")
@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9.=+-]{0,99}", fullmatch=True))
def test_a_plain_name_begins_the_name_of_its_outputs(name: str) -> None:
    assert Shard(source(name), 0, 7).name.startswith(f"{name}-")


@given(weird_names | any_names)
def test_the_name_of_an_output_is_one_safe_and_visible_file_name(name: str) -> None:
    output = Shard(source(name), 0, 7).name
    assert re.fullmatch(r"[^\W_]?[\w=+][\w.=+-]*\.parquet", output)
    assert len(output.encode()) < 200


@given(weird_names | any_names, st.integers(0, 10**12), st.integers(0, 10**12))
def test_names_of_outputs_are_recognised_whatever_the_name_of_the_input(
    name: str, start: int, num_rows: int
) -> None:
    shard = Shard(source(name), start, start + num_rows)
    other = Shard(source(name), start, start + num_rows + 1)
    with pytest.raises(ConfigError):
        check_same_cut([other], [shard.name])


def test_a_name_is_the_same_in_every_version_of_batchclf() -> None:
    shard = Shard(Source("file:///in/news.csv", "sha256:00", 9), 5, 12)
    assert shard.name == "news.csv-2db32940424d5b50-000000005-000000012.parquet"


@pytest.mark.parametrize(
    "other",
    [
        Shard(source(version="v2"), 0, 10),
        Shard(source("other/news.csv"), 0, 10),
        Shard(source(), 1, 10),
        Shard(source(), 0, 11),
    ],
    ids=["version", "source", "start", "stop"],
)
def test_another_shard_has_another_name(other: Shard) -> None:
    assert other.name != Shard(source(), 0, 10).name


def test_neither_offset_nor_size_is_part_of_what_a_shard_is() -> None:
    shard = Shard(source(), 0, 10)
    seen = Shard(Source(shard.source.uri, "v1", 777, (1, 2)), 0, 10, offset=8)
    assert (seen, seen.name) == (shard, shard.name)


def test_names_sort_by_row() -> None:
    shards = plan([Contents(1200)], 100)
    assert [shard.name for shard in shards] == sorted(shard.name for shard in shards)


def test_readers_of_a_folder_pass_over_no_output(tmp_path: Path) -> None:
    names = ["_hidden.csv", ".hidden.csv", "новости.csv", "a=b.csv", "x" * 300, "100%.csv"]
    for name in names:
        pq.write_table(pa.table({"name": [name]}), tmp_path / Shard(source(name), 0, 1).name)
    found = ds.dataset(tmp_path, format="parquet").to_table().column("name").to_pylist()
    assert sorted(found) == sorted(names)


# Earlier cuts


def test_outputs_of_the_same_cut_are_welcome() -> None:
    shards = plan([Contents(10)], 4)
    check_same_cut(shards, [f"fp=0/{shard.name}" for shard in shards])


def test_outputs_of_another_cut_are_refused_and_named() -> None:
    earlier = [f"fp=0/{shard.name}" for shard in plan([Contents(10)], 4)]
    with pytest.raises(ConfigError, match=r"/in/0\.csv: .* rows 0 to 4 .* same --rows-per-shard"):
        check_same_cut(plan([Contents(10)], 5), earlier)


def test_outputs_of_other_sources_and_versions_and_other_files_do_not_matter() -> None:
    others = [
        Shard(source("0.csv", "v0"), 0, 3).name,
        Shard(source("another.csv"), 0, 3).name,
        "_SUCCESS.json",
        "_runs/1.json",
        "notes.parquet",
    ]
    check_same_cut(plan([Contents(10)], 4), others)
