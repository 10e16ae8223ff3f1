"""A source costs what its settings allow, whatever it promises and however small it is."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO, cast

import bombs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from batchclf.config import CutSettings, ReadSettings
from batchclf.errors import InputError
from batchclf.planning import make_plan
from batchclf.shards import Contents
from batchclf.source import (
    Reader,
    RowBatch,
    lines,
    open_reader,
    parquet_pages,
    parquet_reader,
)
from batchclf.store import Source

MIB = 1 << 20
GIB = 1 << 30
REFUSED = "raise --max-source-bytes"
# Python with pyarrow takes 100 to 200 MiB; one line may take MAX_ROW_BYTES a few times over.
MOST_RSS_MIB = 1500


def reader_of(content: bytes, suffix: str, most: int | None = None, **options: Any) -> Reader:
    # pyarrow once hung after an error from BytesIO
    file = pa.BufferReader(content) if suffix == ".parquet" else io.BytesIO(content)
    source = Source(f"s3://news/a{suffix}", "v1", len(content))
    settings = ReadSettings(max_source_bytes=most, **options)
    return open_reader(cast("BinaryIO", file), source, settings)


def contents_of(content: bytes, suffix: str, most: int | None = None) -> Contents:
    return reader_of(content, suffix, most).contents(1000)


def rows_of(batches: list[RowBatch]) -> list[tuple[int, Any]]:
    return [
        (batch.first_row + index, value)
        for batch in batches
        for index, value in enumerate(batch.text[0].to_pylist())
    ]


# The stored object


def test_a_source_that_is_too_large_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\nwords\n")
    read = ReadSettings(max_source_bytes=path.stat().st_size - 1)
    (error,) = make_plan([str(path)], read, CutSettings()).unreadable
    assert REFUSED in str(error)


def test_a_source_as_large_as_it_may_be_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\nwords\n")
    read = ReadSettings(max_source_bytes=path.stat().st_size)
    assert not make_plan([str(path)], read, CutSettings()).unreadable


# Compressed text


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl.gz"])
@pytest.mark.parametrize("chunk", [b"\0" * MIB, b"\n" * MIB, b'"' * MIB, b"a,b\n" * (MIB // 4)])
def test_text_that_expands_to_more_than_it_may_is_refused(suffix: str, chunk: bytes) -> None:
    bomb = bombs.gzip_bomb(b"text\n" if suffix == ".csv.gz" else b'{"text": 1}\n', chunk, 4)
    with pytest.raises(InputError, match=REFUSED):
        contents_of(bomb, suffix, 2 * MIB)


def test_text_may_expand_to_as_much_as_it_may() -> None:
    content = b"text\n" + b"words\n" * 10_000
    packed = bombs.gzip_bomb(content, b"", 0)
    assert contents_of(packed, ".csv.gz", len(content)).num_rows == 10_000
    with pytest.raises(InputError, match=REFUSED):
        contents_of(packed, ".csv.gz", len(content) - 1)


def test_without_a_bound_text_expands_as_it_will() -> None:
    bomb = bombs.gzip_bomb(b"text\n", b"words\n" * 1000, 100)
    assert contents_of(bomb, ".csv.gz").num_rows == 100_000


# Rows of many values


@pytest.fixture
def few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_ROW_VALUES", 100)


@pytest.mark.parametrize(
    "row",
    [
        b'{"text": "a", "x": [' + b"{}," * 200 + b"{}]}\n",
        b'{"text": "a", "x": [' + b'["ab"],' * 100 + b"1]}\n",
    ],
)
def test_a_json_row_of_too_many_values_is_marked_and_the_next_is_read(
    few_values: None, row: bytes
) -> None:
    (batch,) = reader_of(row + b'{"text": "b"}\n', ".jsonl").read(0, 2)
    assert batch.faults == {0: "unparseable: more than 100 values in it"}
    assert rows_of([batch]) == [(0, None), (1, "b")]


def test_a_csv_row_of_too_many_fields_is_marked_and_the_next_is_read(few_values: None) -> None:
    (batch,) = reader_of(b"text\n" + b"ab," * 200 + b"\nwords\n", ".csv").read(0, 2)
    assert batch.faults == {0: "unparseable: more than 100 values in it"}
    assert rows_of([batch])[1] == (1, "words")


def test_a_csv_row_that_goes_on_over_too_many_fields_ends_there(few_values: None) -> None:
    reader = reader_of(b'text\na,"' + b'b\n","' * 200 + b'"\n', ".csv")
    (batch,) = reader.read(0, reader.contents(1000).num_rows)
    assert batch.faults[0] == "unparseable: more than 100 values in it"


def test_a_long_text_with_commas_is_no_row_of_many_values(few_values: None) -> None:
    text = "some, words " * 90
    (batch,) = reader_of(f'{{"text": "{text}"}}\n'.encode(), ".jsonl").read(0, 1)
    assert (rows_of([batch]), batch.faults) == ([(0, text)], {})


# Parquet


def test_a_value_that_the_file_repeats_is_decoded_a_few_rows_at_a_time() -> None:
    value = "word " * (MIB // 5)
    reader = reader_of(bombs.dictionary_bomb(value, 100), ".parquet")
    batches = list(reader.read(0, 100))
    assert max(batch.text[0].nbytes for batch in batches) < 20 * MIB
    assert rows_of(batches) == [(row, value) for row in range(100)]


def test_narrow_rows_are_gathered_again() -> None:
    reader = reader_of(bombs.dictionary_bomb("words", 3000), ".parquet")
    assert [batch.num_rows for batch in reader.read(0, 3000)] == [1024, 1024, 952]


def test_rows_of_parquet_that_expand_to_more_than_they_may_are_refused() -> None:
    bomb = bombs.dictionary_bomb("a" * MIB, 1_000_000)
    assert len(bomb) < MIB
    reader = reader_of(bomb, ".parquet", 100 * MIB)
    with pytest.raises(InputError, match=REFUSED):
        list(reader.read(0, 100_000))


def test_the_bound_on_rows_of_parquet_is_for_those_of_one_shard() -> None:
    reader = reader_of(bombs.dictionary_bomb("a" * MIB, 60), ".parquet", 40 * MIB)
    for start in (0, 30):
        assert len(rows_of(list(reader.read(start, start + 30)))) == 30


def test_a_dictionary_of_arrow_counts_once() -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), ["a" * MIB])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": column}), sink)
    reader = reader_of(bytes(sink.getvalue()), ".parquet", 10 * MIB)
    assert sum(batch.num_rows for batch in reader.read(0, 5000)) == 5000


def test_nested_dictionaries_that_differ_stay_in_batches_of_their_own() -> None:
    kind = pa.list_(pa.dictionary(pa.int32(), pa.string()))
    batches = [pa.record_batch({"tags": pa.array([[word]], kind)}) for word in ("a", "b")]
    joined = pa.Table.from_batches(parquet_reader._join(batches))
    assert joined.column("tags").to_pylist() == [["a"], ["b"]]


@pytest.mark.parametrize("claimed", [2**40, 2**61])
def test_a_footer_that_claims_more_rows_than_could_be_is_refused(claimed: int) -> None:
    forged = bombs.forged_rows(claimed)
    with pytest.raises(InputError, match=REFUSED):
        contents_of(forged, ".parquet", 5 * GIB)


@pytest.mark.parametrize("most", [None, GIB])
def test_a_footer_that_claims_less_than_no_rows_is_refused(most: int | None) -> None:
    with pytest.raises(InputError, match="Parquet file"):
        reader_of(bombs.forged_rows(-5), ".parquet", most)


def test_a_footer_that_claims_rows_that_are_not_there_is_an_input_error() -> None:
    reader = reader_of(bombs.forged_rows(1_000_000), ".parquet", 5 * GIB)
    assert reader.contents(1000).num_rows == 1_000_000
    with pytest.raises(InputError):
        list(reader.read(0, 1_000_000))


def test_a_page_that_expands_to_more_than_a_page_may_is_refused_unread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_PAGE_BYTES", 2 * MIB)
    reader = reader_of(bombs.page_bomb(2 * MIB), ".parquet", GIB)
    with pytest.raises(InputError, match="a page that expands to 2,097,"):
        next(reader.read(0, 1))


def test_a_page_that_is_not_read_may_be_as_large_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_PAGE_BYTES", MIB)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["words"], "image": [b"a" * 2 * MIB]}), sink)
    reader = reader_of(bytes(sink.getvalue()), ".parquet", GIB)
    assert rows_of(list(reader.read(0, 1))) == [(0, "words")]


def test_without_a_bound_a_page_is_as_large_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_PAGE_BYTES", MIB)
    (batch,) = reader_of(bombs.page_bomb(2 * MIB), ".parquet").read(0, 1)
    assert batch.num_rows == 1


texts = st.lists(st.none() | st.text(max_size=20), max_size=50)


@given(
    texts,
    st.integers(1, 20),
    st.sampled_from(["none", "snappy", "zstd", "gzip"]),
    st.booleans(),
    st.sampled_from(["1.0", "2.0"]),
)
def test_rows_are_the_same_with_a_bound_as_without(
    column: list[str | None], group_rows: int, compression: str, dictionary: bool, version: str
) -> None:
    table = pa.table({"text": pa.array(column, pa.string()), "tags": [["a", "b"]] * len(column)})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=group_rows,
        compression=compression,
        use_dictionary=dictionary,
        data_page_version=version,
        data_page_size=64,
    )
    content = bytes(sink.getvalue())
    trusted, bounded = (
        list(reader_of(content, ".parquet", most, keep="all").read(0, len(column)))
        for most in (None, GIB)
    )
    assert rows_of(bounded) == rows_of(trusted) == list(enumerate(column))
    assert [batch.kept for batch in bounded] == [batch.kept for batch in trusted]


@given(st.data())
def test_a_parquet_file_with_flipped_bytes_is_read_or_an_input_error(data: st.DataObject) -> None:
    content = bytearray(bombs.dictionary_bomb("words", 100))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    try:
        chunks = parquet_pages.find_chunks(io.BytesIO(content), ["text"])
        for of_group in chunks:
            parquet_pages.largest_page_bytes(io.BytesIO(content), of_group)
    except parquet_pages.PagesError:
        pass


@pytest.mark.parametrize(
    "footer",
    [
        b"",
        b"\x1c" * 1000,  # structures without end
        b"\x19" * 1000,  # lists in lists
        b"\x49\xfc\xff\xff\xff\xff\x0f",  # a list of more row groups than bytes
        b"\x49\x1c\x00\x00",  # a row group of nothing
        b"\x15" + b"\xff" * 20,  # a number without an end
    ],
)
def test_a_footer_of_nonsense_is_refused(footer: bytes) -> None:
    content = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    with pytest.raises(InputError, match="not a readable Parquet file"):
        reader_of(content, ".parquet", GIB)
    with pytest.raises(parquet_pages.PagesError):
        parquet_pages.find_chunks(io.BytesIO(content), ["text"])


def test_a_footer_that_is_too_large_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_pages, "MAX_FOOTER_BYTES", 100)
    with pytest.raises(InputError, match="more than 100"):
        reader_of(bombs.dictionary_bomb("words", 10), ".parquet", GIB)


# Memory

_READ = """
import json, sys
from pathlib import Path
from batchclf.config import ReadSettings
from batchclf.errors import InputError
from batchclf.source import open_reader
from batchclf.store import Source
path, most = Path(sys.argv[1]), int(sys.argv[2])
source = Source(path.as_uri(), "v1", path.stat().st_size)
try:
    reader = open_reader(path.open("rb"), source, ReadSettings(max_source_bytes=most))
    num_rows = reader.contents(100_000).num_rows
    for batch in reader.read(0, num_rows):
        pass
    reason = ""
except InputError as error:
    reason = str(error)
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
print(json.dumps({"reason": reason, "peak_rss_mib": peak}))
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zeros.csv.gz", bombs.gzip_bomb(b"text\n", b"\0" * MIB, 600)),
        ("fields.csv.gz", bombs.gzip_bomb(b"text\n", b"ab," * (MIB // 3), 600)),
        ("zeros.jsonl.gz", bombs.gzip_bomb(b"", b"\0" * MIB, 600)),
        ("objects.jsonl.gz", bombs.gzip_bomb(b'{"text":[{}', b",{}" * (MIB // 3), 600)),
        ("deep.jsonl.gz", bombs.gzip_bomb(b'{"text":', b"[" * MIB, 600)),
        ("repeated.parquet", bombs.dictionary_bomb("a" * MIB, 100_000)),
        ("page.parquet", bombs.page_bomb(400 * MIB)),
        ("forged.parquet", bombs.forged_rows(2**61)),
    ],
)
def test_a_bomb_is_refused_in_bounded_memory(tmp_path: Path, name: str, content: bytes) -> None:
    assert len(content) < 4 * MIB
    path = tmp_path / name
    path.write_bytes(content)
    ended = subprocess.run(
        [sys.executable, "-c", _READ, str(path), str(512 * MIB)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert REFUSED in found["reason"] or "a page that expands" in found["reason"]
    assert found["peak_rss_mib"] < MOST_RSS_MIB, found
