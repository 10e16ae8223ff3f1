import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from batchclf.config import ReadSettings
from batchclf.errors import InputError
from batchclf.source import Reader, RowBatch, lines, open_reader, parquet_reader
from batchclf.store import Source

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
TEXT_SUFFIXES = SUFFIXES[1:]
MIB = 1 << 20


class Row(NamedTuple):
    position: int
    text: tuple[Any, ...]
    kept: dict[str, Any]
    fault: str | None


def reader_of(content: bytes, suffix: str = ".csv", **options: Any) -> Reader:
    # pyarrow once hung after an error from BytesIO
    file = pa.BufferReader(content) if suffix == ".parquet" else io.BytesIO(content)
    uri = Source(f"file:///in/news{suffix}", "v1", len(content))
    return open_reader(cast("BinaryIO", file), uri, ReadSettings(**options))


def rows_of(batches: Sequence[RowBatch]) -> list[Row]:
    rows = []
    for batch in batches:
        kept = [dict(zip(batch.kept.schema.names, values, strict=True)) for values in _rows(batch)]
        for index in range(batch.num_rows):
            text = tuple(column[index].as_py() for column in batch.text)
            fault = batch.faults.get(index)
            rows.append(Row(batch.first_row + index, text, kept[index], fault))
    return rows


def _rows(batch: RowBatch) -> list[tuple[Any, ...]]:
    columns = [column.to_pylist() for column in batch.kept.columns]
    return list(zip(*columns, strict=True)) if columns else [()] * batch.num_rows


def read_all(content: bytes, suffix: str = ".csv", **options: Any) -> list[Row]:
    """All rows of a file, after checking that they are as many as were counted."""
    reader = reader_of(content, suffix, **options)
    num_rows = reader.contents(10).num_rows
    rows = rows_of(list(reader.read(0, num_rows)))
    assert [row.position for row in rows] == list(range(num_rows))
    return rows


def texts_of(rows: Sequence[Row]) -> list[Any]:
    return [row.text[0] for row in rows]


def faults_of(rows: Sequence[Row]) -> list[str | None]:
    return [row.fault and row.fault.split(":")[0] for row in rows]


def table_bytes(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue())


Articles = list[tuple[str, str]]


def file_bytes(
    articles: Articles,
    suffix: str,
    *,
    rows_per_group: int = 1000,
    line_end: str = "\n",
    ascii_only: bool = False,
) -> bytes:
    """The same ids and texts as a file of any kind."""
    if suffix == ".parquet":
        ids, texts = [a[0] for a in articles], [a[1] for a in articles]
        table = pa.table({"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())})
        return table_bytes(table, row_group_size=rows_per_group)
    lines = io.StringIO()
    if suffix.startswith(".csv"):
        writer = csv.writer(lines, lineterminator=line_end, quoting=csv.QUOTE_ALL)
        writer.writerows([("id", "text"), *articles])
    for article_id, text in articles if suffix.startswith(".jsonl") else ():
        record = {"id": article_id, "text": text}
        lines.write(json.dumps(record, ensure_ascii=ascii_only) + line_end)
    content = lines.getvalue().encode()
    return gzip.compress(content, 1) if suffix.endswith(".gz") else content


words = st.text(
    st.sampled_from('aé新😀\0\r\n\t ,;"\\{}\x1c\u2028\ufeff')
    | st.characters(exclude_categories=["Cs"]),
    max_size=12,
)
articles_lists = st.lists(st.tuples(words, words), max_size=30)

# Every format


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(articles_lists, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_the_same_articles_are_the_same_rows_in_every_format(
    suffix: str, articles: Articles, line_end: str, ascii_only: bool
) -> None:
    content = file_bytes(articles, suffix, line_end=line_end, ascii_only=ascii_only)
    # a file without objects has no keys
    keep = ("id",) if suffix.startswith(".jsonl") else "id"
    assert read_all(content, suffix, keep=keep) == [
        Row(i, (text,), {"id": article_id}, None) for i, (article_id, text) in enumerate(articles)
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, deadline=None)
@given(
    articles=articles_lists,
    rows_per_shard=st.integers(1, 12),
    rows_per_group=st.integers(1, 12),
    rows_per_batch=st.integers(1, 9),
    ranges=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 30), st.booleans(), st.integers(0, 3)),
        max_size=6,
    ),
)
def test_ranges_in_any_order_by_any_reader_are_slices_of_the_whole(
    suffix: str,
    articles: Articles,
    rows_per_shard: int,
    rows_per_group: int,
    rows_per_batch: int,
    ranges: list[tuple[int, int, bool, int]],
) -> None:
    content = file_bytes(articles, suffix, rows_per_group=rows_per_group)
    whole = read_all(content, suffix, keep="none")
    with pytest.MonkeyPatch.context() as patch:
        for module in (lines, parquet_reader):
            patch.setattr(module, "BATCH_ROWS", rows_per_batch)
        reader = reader_of(content, suffix, keep="none")
        offsets = reader.contents(rows_per_shard).offsets
        for one, other, reopened, most_batches in ranges:
            start, stop = sorted(min(position, len(whole)) for position in (one, other))
            if reopened:
                reader = reader_of(content, suffix, keep="none")
            batches = []
            for batch in reader.read(start, stop, offsets.get(start)):
                batches.append(batch)
                if len(batches) == most_batches:
                    break  # left in the middle; the next range may begin anywhere
            rows = rows_of(batches)
            assert rows == whole[start : stop if most_batches == 0 else start + len(rows)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_shard_read_from_its_planned_offset_does_not_read_what_stands_before(suffix: str) -> None:
    content = file_bytes([(str(i), f"text {i}") for i in range(50)], suffix, rows_per_group=10)
    offsets = reader_of(content, suffix).contents(10).offsets
    assert sorted(offsets) == ([0, 10, 20, 30, 40, 50] if suffix in (".csv", ".jsonl") else [])
    for start, offset in offsets.items():
        damaged = bytearray(content)
        header = content.index(b"\n") + 1
        damaged[header:offset] = b"\xff" * (offset - header)
        found = rows_of(
            list(reader_of(bytes(damaged), suffix).read(start, min(start + 3, 50), offset))
        )
        assert texts_of(found) == [f"text {i}" for i in range(start, min(start + 3, 50))]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("start", [0, 2, 3, 7])
def test_rows_beyond_the_end_are_an_error_after_the_rows_that_are_there(
    suffix: str, start: int
) -> None:
    content = file_bytes([(str(i), f"text {i}") for i in range(3)], suffix)
    found: list[RowBatch] = []
    with pytest.raises(InputError, match=f"rows {start} to 9 were asked for, but it ends after 3"):
        found.extend(reader_of(content, suffix).read(start, 9))
    assert texts_of(rows_of(found)) == [f"text {i}" for i in range(start, 3)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_text_column_is_an_error_that_lists_the_columns(suffix: str) -> None:
    with pytest.raises(InputError, match="no text column 'body'; it has the columns id, text"):
        reader_of(file_bytes([("1", "a")], suffix), suffix, text_columns=("text", "body"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_columns_come_in_the_order_of_the_settings(suffix: str) -> None:
    rows = read_all(file_bytes([("1", "a")], suffix), suffix, text_columns=("text", "id"))
    assert [row.text for row in rows] == [("a", "1")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_kept_columns_batches_still_know_their_length(suffix: str) -> None:
    (batch,) = reader_of(file_bytes([("1", "a")] * 3, suffix), suffix, keep="none").read(0, 3)
    assert (batch.num_rows, batch.kept.num_columns) == (3, 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_reader_closes_its_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"news{suffix}"
    path.write_bytes(file_bytes([("1", "a")], suffix))
    file = path.open("rb")
    open_reader(file, Source(path.as_uri(), "v1", 0), ReadSettings()).close()
    assert file.closed


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_named_like_ours_are_renamed(suffix: str) -> None:
    columns = {"id": "1", "label": "old", "Score": "2", "input_label": "x", "text": "a"}
    if suffix == ".parquet":
        content = table_bytes(pa.table({name: [value] for name, value in columns.items()}))
    elif suffix.startswith(".csv"):
        content = f"{','.join(columns)}\n{','.join(columns.values())}\n".encode()
    else:
        content = json.dumps(columns).encode()
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    (row,) = read_all(content, suffix, keep="all")
    assert row.kept == {
        "id": "1",
        "input_input_label": "old",
        "input_Score": "2",
        "input_label": "x",
        "text": "a",
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_batches_of_wide_rows_are_a_few_megabytes(suffix: str) -> None:
    content = file_bytes([(str(i), f"{i} " * 300_000) for i in range(30)], suffix)
    batches = list(reader_of(content, suffix).read(0, 30))
    assert sum(batch.num_rows for batch in batches) == 30
    # the row that passes the bound is still part of a batch
    assert max(batch.text[0].nbytes for batch in batches) < 10 * MIB


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_value_of_64_mebibytes_is_read_whole(suffix: str) -> None:
    content = file_bytes([("1", "small"), ("2", "x" * (64 * MIB)), ("3", "small")], suffix)
    batches = list(reader_of(content, suffix).read(0, 3))
    lengths = [n for b in batches for n in pa.compute.binary_length(b.text[0]).to_pylist()]
    assert lengths == [5, 64 * MIB, 5]


@pytest.mark.parametrize(
    "content", [b"text\na\nb\nc\n", b'{"text":"a"}\n{"text":"b"}\n{"text":"c"}\n']
)
def test_a_byte_order_mark_moves_the_offsets(content: bytes) -> None:
    suffix = ".jsonl" if content.startswith(b"{") else ".csv"
    marked = b"\xef\xbb\xbf" + content
    plain = reader_of(content, suffix).contents(2).offsets
    offsets = reader_of(marked, suffix).contents(2).offsets
    assert offsets == {row: offset + 3 for row, offset in plain.items()}


# Files that are not what their names say, and files that end early

WRONG = {
    "parquet as csv": (".csv", file_bytes([], ".parquet"), "it is Parquet"),
    "parquet as jsonl": (".jsonl", file_bytes([], ".parquet"), "it is Parquet"),
    "parquet as csv.gz": (".csv.gz", file_bytes([], ".parquet"), "it is Parquet"),
    "gzip as csv": (".csv", file_bytes([], ".csv.gz"), "it is gzip"),
    "gzip as jsonl": (".jsonl", file_bytes([], ".csv.gz"), "it is gzip"),
    "gzip as parquet": (".parquet", file_bytes([], ".csv.gz"), "not a readable Parquet file"),
    "text as csv.gz": (".csv.gz", b"id,text\n", "it is not gzip"),
    "text as jsonl.gz": (".jsonl.gz", b"{}\n", "it is not gzip"),
    "text as parquet": (".parquet", b"id,text\n1,some text\n", "not a readable Parquet file"),
    "utf-16 csv": (".csv", "id,text\n".encode("utf-16"), "UTF-16 text, and UTF-8 is wanted"),
    "utf-16 jsonl": (".jsonl", "{}\n".encode("utf-16"), "UTF-16 text, and UTF-8 is wanted"),
    "nothing as csv": (".csv", b"", "empty, without even a header line"),
    "blank lines as csv": (".csv", b"\n\r\n\n", "empty, without even a header line"),
    "nothing as csv.gz": (".csv.gz", b"", "it is an empty file, not gzip"),
    "nothing as jsonl.gz": (".jsonl.gz", b"", "it is an empty file, not gzip"),
    "nothing as parquet": (".parquet", b"", "not a readable Parquet file"),
    "old mac line ends": (".csv", b"id,text\r1,a\r", "the header cannot be read: new-line"),
    "unclosed header": (".csv", b'id,"text\n1,a\n', "the header cannot be read: a quote"),
}


@pytest.mark.parametrize(("suffix", "content", "reason"), WRONG.values(), ids=WRONG)
def test_a_file_that_is_not_what_its_name_says_is_an_error_that_says_what_it_is(
    suffix: str, content: bytes, reason: str
) -> None:
    with pytest.raises(InputError, match=f"^/in/news{suffix}: .*({reason})"):
        reader_of(content, suffix)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_no_rows_has_the_kept_columns_all_the_same(suffix: str) -> None:
    reader = reader_of(file_bytes([], suffix), suffix, keep=("id",))
    assert reader.contents(10).num_rows == 0
    assert reader.kept_schema == pa.schema([("id", pa.string())])
    assert list(reader.read(0, 0)) == []


def test_a_csv_of_a_header_without_line_end_has_no_rows() -> None:
    assert read_all(b"id,text") == []


@pytest.mark.parametrize("content", [b"", b"\n \n", b"not JSON\n[]\n"])
def test_json_lines_without_objects_have_the_columns_that_were_asked_for(content: bytes) -> None:
    reader = reader_of(
        content, ".jsonl", text_columns=("title", "text"), id_column="key", keep=("url",)
    )
    assert reader.kept_schema.names == ["key", "url"]


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl.gz"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_gzip_is_an_error(suffix: str, share: float) -> None:
    content = file_bytes([(str(i), f"text {i * 7919}") for i in range(2000)], suffix)
    with pytest.raises(InputError, match="damaged gzip"):
        read_all(content[: int(len(content) * share)], suffix)


def test_a_gzip_with_a_flipped_byte_is_an_error() -> None:
    content = bytearray(file_bytes([(str(i), f"text {i * 7919}") for i in range(2000)], ".csv.gz"))
    content[len(content) // 2] ^= 1
    with pytest.raises(InputError, match="damaged gzip"):
        read_all(bytes(content), ".csv.gz")


def test_a_gzip_of_several_members_is_one_file() -> None:
    content = gzip.compress(b"id,text\n1,a\n2,") + gzip.compress(b"b\n")
    assert texts_of(read_all(content, ".csv.gz")) == ["a", "b"]


def test_a_truncated_parquet_is_an_error_wherever_it_ends() -> None:
    content = file_bytes([(str(i), f"text {i}") for i in range(100)], ".parquet")
    for length in range(0, len(content), 37):
        with pytest.raises(InputError, match="not a readable Parquet file"):
            read_all(content[:length], ".parquet")


# Parquet

CHECKED = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}


def test_a_flipped_byte_in_a_page_is_an_error_and_not_a_text(tmp_path: Path) -> None:
    path = tmp_path / "news.parquet"
    texts = [f"article {i}" for i in range(100)]
    content = table_bytes(pa.table({"text": texts}), row_group_size=50, **CHECKED)
    place = content.index(b"article 77")
    path.write_bytes(content[:place] + b"A" + content[place + 1 :])
    unchecked = pq.ParquetFile(path).read().column("text").to_pylist()
    assert "Article 77" in unchecked  # so that the checksum alone tells
    reader = open_reader(path.open("rb"), Source(path.as_uri(), "v1", 0), ReadSettings())
    found: list[RowBatch] = []
    with pytest.raises(InputError, match=r"not a readable Parquet file: .*CRC"):
        found.extend(reader.read(0, 100))
    reader.close()
    assert sum(batch.num_rows for batch in found) <= 50  # of the row group before it


def test_no_flipped_byte_before_the_footer_changes_a_row() -> None:
    texts = [f"article {i} of {i % 3}" for i in range(60)]
    content = table_bytes(pa.table({"text": texts}), row_group_size=25, write_page_checksum=True)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    outcomes: set[bool | str] = set()
    for place in range(footer):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        try:
            outcomes.add(texts_of(read_all(bytes(damaged), ".parquet")) == texts)
        except InputError:
            outcomes.add("refused")
    assert outcomes == {True, "refused"}  # bytes that nobody reads, such as the first magic


def test_a_footer_whose_row_groups_hold_other_rows_than_the_file_is_damaged() -> None:
    content = file_bytes(
        [(str(i), f"text {i}") for i in range(200)], ".parquet", rows_per_group=100
    )
    num_rows = b"\x16\xc8\x01"  # Thrift: the next field is an i64, 100
    last = content.rindex(num_rows)
    damaged = content[:last] + b"\x16\xc0\x01" + content[last + 3 :]  # 96
    with pytest.raises(InputError, match="200 rows by its footer, but 196 in its row groups"):
        reader_of(damaged, ".parquet")


def test_a_footer_whose_column_names_are_not_utf8_is_an_error() -> None:
    content = file_bytes([("1", "a")], ".parquet", rows_per_group=1)
    schema = content.rindex(b"\x02id")  # before it stands the same name as a length and bytes
    damaged = bytearray(content)
    for place in (content.index(b"\x02id", 4), schema):
        damaged[place + 1] = 0xFF
    with pytest.raises(InputError):
        read_all(bytes(damaged), ".parquet", keep="all")


KEPT = {
    "struct": pa.array([{"a": i, "b": [{"c": str(i)}]} for i in range(3000)]),
    "list": pa.array([[str(i)] * (i % 3) for i in range(3000)]),
    "map": pa.array([[("key", i)] for i in range(3000)], pa.map_(pa.string(), pa.int32())),
    "dictionary": pa.array([f"value {i}" for i in range(3000)]).dictionary_encode(),
    "null": pa.nulls(3000),
    "time": pa.array(range(3000), pa.timestamp("ns", "Europe/Berlin")),
    "view": pa.array([str(i) for i in range(3000)], pa.string_view()),
    "uuid": pa.array([i.to_bytes(16, "big") for i in range(3000)], pa.uuid()),
    "with.dot": pa.array(range(3000)),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_column_of_a_parquet_keeps_its_type_and_values(name: str) -> None:
    table = pa.table({name: KEPT[name], "text": pa.array(["a"] * 3000)})
    content = table_bytes(table, row_group_size=700)
    reader = reader_of(content, ".parquet", keep=(name,))
    batches = [batch.kept for batch in reader.read(0, 3000)]
    kept = pa.Table.from_batches(batches)
    assert (
        kept.schema.field(name).type
        == pq.read_table(pa.BufferReader(content)).schema.field(name).type
    )
    assert kept.column(name).cast(table.column(name).type).equals(table.column(name))


def test_two_thousand_columns_are_kept() -> None:
    names = [f"c{i}" for i in range(2000)]
    table = pa.table({"text": ["a", "b"], **{name: [0, i] for i, name in enumerate(names)}})
    rows = read_all(table_bytes(table), ".parquet", keep="all")
    assert rows[1].kept == {"text": "b", **{name: i for i, name in enumerate(names)}}


def test_a_row_group_larger_than_a_shard_is_read_in_ranges() -> None:
    table = pa.table({"id": range(100_000), "text": [f"text {i}" for i in range(100_000)]})
    reader = reader_of(table_bytes(table), ".parquet")
    assert reader.contents(30_000).row_groups == (100_000,)
    for start in range(0, 100_000, 30_000):
        stop = min(start + 30_000, 100_000)
        batches = list(reader.read(start, stop))
        ids = [n for batch in batches for n in batch.kept.column("id").to_pylist()]
        assert ids == list(range(start, stop))


def test_a_parquet_column_that_stands_there_twice_is_an_error_where_it_is_wanted() -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "tag", "tag"])
    assert texts_of(read_all(table_bytes(table), ".parquet")) == ["a"]
    with pytest.raises(InputError, match="the column 'tag' stands there 2 times"):
        reader_of(table_bytes(table), ".parquet", keep="all")


# CSV


def test_line_breaks_and_delimiters_within_quotes_are_text() -> None:
    rows = read_all(b'id,text\n1,"a,\nb\r\n\n""c"""\n2,d\n')
    assert texts_of(rows) == ['a,\nb\r\n\n"c"', "d"]


def test_a_byte_order_mark_is_no_part_of_the_header() -> None:
    assert read_all(b"\xef\xbb\xbfid,text\n1,a\n")[0].kept == {"id": "1"}


@pytest.mark.parametrize("delimiter", ["\t", ";", "|", "¦"])
def test_fields_may_be_delimited_otherwise(delimiter: str) -> None:
    content = f'id{delimiter}text\n1{delimiter}a, b\n2{delimiter}"c{delimiter}d"\n'.encode()
    assert texts_of(read_all(content, delimiter=delimiter)) == ["a, b", f"c{delimiter}d"]


def test_blank_lines_of_a_csv_are_no_rows() -> None:
    rows = read_all(b"\n\r\nid,text\n\n1,a\n\r\n\n2,b\n\n")
    assert texts_of(rows) == ["a", "b"]


def test_empty_fields_are_empty_strings() -> None:
    (row,) = read_all(b"id,text\n,\n")
    assert (row.text, row.kept) == (("",), {"id": ""})


def test_ragged_rows_are_marked_where_they_stand_and_keep_what_they_have() -> None:
    rows = read_all(b"id,text\n1,a\n2\n3,c,d\n4,e\n")
    assert faults_of(rows) == [None, "unparseable", "unparseable", None]
    assert rows[1].fault == "unparseable: 1 fields where the header has 2"
    assert rows[2].fault == "unparseable: 3 fields where the header has 2"
    assert [row.kept["id"] for row in rows] == ["1", "2", "3", "4"]


def test_a_quote_that_is_never_closed_spoils_the_row_that_it_is_in() -> None:
    rows = read_all(b'id,text\n1,a\n2,"b\n3,c\n')
    assert faults_of(rows) == [None, "unparseable"]
    assert "a quote in it is never closed" in str(rows[1].fault)


def test_a_carriage_return_outside_quotes_spoils_one_row() -> None:
    rows = read_all(b"id,text\n1,a\n2,b\rc\n3,d\n")
    assert faults_of(rows) == [None, "unparseable", None]
    assert texts_of(rows) == ["a", None, "d"]


def test_nul_bytes_are_text() -> None:
    assert texts_of(read_all(b"id,text\n1,a\0b\n2,\0\n")) == ["a\0b", "\0"]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", b"id,text\n1,fine\n\xe9,caf\xe9\n"),
        (".jsonl", b'{"id":"1","text":"fine"}\n{"id":"\xe9","text":"caf\xe9"}\n'),
    ],
)
def test_bytes_that_are_not_utf8_reach_the_reader_of_a_text_as_they_are(
    suffix: str, content: bytes
) -> None:
    rows = read_all(content, suffix)
    assert texts_of(rows) == [b"fine", b"caf\xe9"]
    assert [row.kept["id"] for row in rows] == ["1", "\ufffd"]


def test_a_header_that_is_not_utf8_names_columns_all_the_same() -> None:
    assert read_all(b"text,caf\xe9\na,b\n", keep="all")[0].kept == {"text": "a", "caf\ufffd": "b"}


def test_a_header_with_the_text_column_twice_is_an_error() -> None:
    with pytest.raises(InputError, match="the text column 'text' stands there 2 times"):
        reader_of(b"id,text,text\n1,a,b\n")


def test_a_header_with_another_column_twice_is_an_error_only_where_it_is_kept() -> None:
    content = b"id,tag,text,tag\n1,x,a,y\n"
    assert texts_of(read_all(content)) == ["a"]
    with pytest.raises(InputError, match="the column 'tag' stands there 2 times"):
        reader_of(content, keep="all")


# JSON lines


def json_lines(*lines: str) -> list[Row]:
    return read_all("".join(f"{line}\n" for line in lines).encode(), ".jsonl")


def test_a_byte_order_mark_is_no_part_of_the_first_object() -> None:
    assert texts_of(read_all(b'\xef\xbb\xbf{"text":"a"}\n', ".jsonl")) == ["a"]


def test_the_last_line_may_lack_its_end() -> None:
    assert texts_of(read_all(b'{"text":"a"}\n{"text":"b"}', ".jsonl")) == ["a", "b"]


def test_blank_lines_between_objects_are_no_rows() -> None:
    assert texts_of(json_lines("", '{"text":"a"}', " \t\r", '{"text":"b"}', "")) == ["a", "b"]


def test_a_null_text_and_a_missing_one_are_null() -> None:
    assert texts_of(json_lines('{"text":"a"}', '{"text":null}', "{}")) == ["a", None, None]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("7", "number"),
        ("1.5", "number"),
        ("NaN", "number"),
        ("true", "boolean"),
        ('["a"]', "array"),
        ('{"a":"b"}', "object"),
    ],
)
def test_a_text_that_is_no_string_is_marked_and_the_other_rows_go_on(value: str, kind: str) -> None:
    rows = json_lines('{"text":"a"}', f'{{"id":"2","text":{value}}}', '{"text":"c"}')
    assert [row.fault for row in rows] == [None, f"not_text: 'text' is a JSON {kind}", None]
    assert rows[1].kept == {"id": "2"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ('{"text":"a', "not JSON"),
        ('{"text":"a"} {"text":"b"}', "not JSON: Extra data"),
        ("some words", "not JSON"),
        ('["a"]', "a JSON array, not an object"),
        ('"a"', "a JSON string, not an object"),
        ("7", "a JSON number, not an object"),
        ("null", "a JSON null, not an object"),
        ('{"text":"a","n":' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
        ('{"text":"a","n":' + "[" * 100_000 + "]" * 100_000 + "}", "JSON nested too deeply"),
        ('{"text":"a","n":' + '{"n":' * 100_000, "JSON nested too deeply|not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_a_row_that_says_why(line: str, reason: str) -> None:
    rows = json_lines('{"text":"a"}', line, '{"text":"c"}')
    assert texts_of(rows) == ["a", None, "c"]
    assert faults_of(rows) == [None, "unparseable", None]
    assert str(rows[1].fault).removeprefix("unparseable: ").startswith(tuple(reason.split("|")))


@pytest.mark.parametrize("depth", [10, 400, *range(900, 1001, 4)])
def test_nesting_of_any_depth_is_a_row(depth: int) -> None:
    rows = json_lines(f'{{"id":{"[" * depth}{"]" * depth},"text":"a"}}', '{"text":"b"}')
    assert len(rows) == 2


@pytest.mark.parametrize("escaped", [r"\ud800", r"\udfff", r"a\ud83db", r"\ude00\ud83d"])
def test_a_lone_surrogate_is_kept_as_bytes_that_are_no_text(escaped: str) -> None:
    rows = json_lines(f'{{"id":"{escaped}","text":"{escaped}"}}', '{"text":"fine"}')
    assert rows[1].text == (b"fine",)
    with pytest.raises(UnicodeDecodeError):
        rows[0].text[0].decode()
    assert "\ufffd" in rows[0].kept["id"]


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert texts_of(json_lines(r'{"text":"\ud83d\ude00"}')) == ["😀"]


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("12345678901234567890123", "12345678901234567890123"),
        ("1.5", "1.5"),
        ("false", "false"),
        ("null", None),
        ('[1, {"a": "\\u00e9"}]', '[1,{"a":"é"}]'),
        ('"7"', "7"),
    ],
)
def test_a_kept_value_that_is_no_string_is_kept_as_its_json(value: str, kept: str | None) -> None:
    assert json_lines(f'{{"id":{value},"text":"a"}}')[0].kept == {"id": kept}


def test_keeping_all_finds_keys_that_come_late() -> None:
    lines = ['{"text":"a"}'] * 1500 + ['{"late":"x","text":"b"}']
    rows = read_all("\n".join(lines).encode(), ".jsonl", keep="all")
    assert rows[-1].kept == {"text": "b", "late": "x"}
    assert rows[0].kept == {"text": "a", "late": None}


# Lines that are too long to be rows


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> int:
    limit = 1000
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", limit)
    return limit


LONG = b"x" * 2500


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_line_that_is_too_long_is_one_row_each_and_the_next_line_is_read(
    short_rows: int, suffix: str, count: int
) -> None:
    if suffix == ".csv":
        content = b"id,text\n1,a\n" + (b"2," + LONG + b"\n") * count + b"3,c\n"
    else:
        long = b'{"text":"' + LONG + b'"}\n'
        content = b'{"text":"a"}\n' + long * count + b'{"text":"c"}\n'
    rows = read_all(content, suffix, keep="none")
    assert texts_of(rows) == ["a", *[None] * count, "c"]
    assert faults_of(rows) == [None, *["unparseable"] * count, None]


def test_a_line_that_is_too_long_does_not_move_the_offsets(short_rows: int) -> None:
    content = b"text\na\n" + LONG + b"\nb\nc\n"
    reader = reader_of(content)
    offsets = reader.contents(2).offsets
    rows = rows_of(list(reader_of(content).read(2, 4, offsets[2])))
    assert texts_of(rows) == ["b", "c"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_last_line_that_is_too_long_and_has_no_end_is_a_row(short_rows: int, suffix: str) -> None:
    content = (b"text\n" if suffix == ".csv" else b"") + LONG
    assert faults_of(read_all(content, suffix)) == ["unparseable"]


def test_a_long_line_within_quotes_ends_its_row_there(short_rows: int) -> None:
    content = b'id,text\n1,"a\n' + LONG + b"\n2,b\n3,c\n"
    rows = read_all(content)
    assert faults_of(rows) == ["unparseable", None, None]
    assert texts_of(rows) == [None, "b", "c"]


def test_a_field_of_many_lines_that_is_too_long_ends_its_row_there(short_rows: int) -> None:
    content = b'id,text\n1,a\n2,"' + b"some words\n" * 200 + b"3,c\n"
    rows = read_all(content)
    assert faults_of(rows)[:2] == [None, "unparseable"]
    assert texts_of(rows)[-1] == "c"


def test_nested_dictionaries_are_kept_across_row_groups() -> None:
    tags = pa.array([["a", "b"], ["a"]] * 50, pa.list_(pa.dictionary(pa.int32(), pa.string())))
    table = pa.table({"text": ["words"] * 100, "tags": tags})
    reader = reader_of(table_bytes(table, row_group_size=30), ".parquet", keep="all")
    kept = pa.Table.from_batches([batch.kept for batch in reader.read(0, 100)])
    assert kept.column("tags").to_pylist() == tags.to_pylist()
