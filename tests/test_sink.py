import resource
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from batchclf import __version__
from batchclf.errors import BatchclfError, InputError, OutOfSpaceError, OutputError
from batchclf.predictions import Predictions
from batchclf.shards import Shard
from batchclf.sink import Counts, Footer, Receipt, ShardWriter, Sink
from batchclf.store import Folder, Scratch, Source, open_folder
from batchclf.store.local import LocalFolder

LABELS = ("business", "sport", "tech")
KEPT = pa.schema([("id", pa.string())])
SHARD = Shard(Source("file:///in/news.csv", "sha256:0", 9), 100, 110)
CONTRACT = {
    "row": pa.int64(),
    "label": pa.string(),
    "score": pa.float32(),
    "probs": pa.struct([pa.field(label, pa.float32()) for label in LABELS]),
    "n_tokens": pa.int32(),
    "truncated": pa.bool_(),
    "error": pa.string(),
}


@pytest.fixture
def sink(tmp_path: Path) -> Sink:
    folder = open_folder(str(tmp_path))
    folder.prepare()
    return Sink(folder, "0f", LABELS, probs=True)


def kept_rows(first_row: int, num_rows: int) -> pa.RecordBatch:
    ids = [f"id {row}" for row in range(first_row, first_row + num_rows)]
    return pa.record_batch([pa.array(ids, pa.string())], schema=KEPT)


def predictions(
    labels: Sequence[int],
    *,
    abstained: Sequence[int] = (),
    errors: Mapping[int, str] | None = None,
    probs: npt.NDArray[np.float32] | None = None,
) -> Predictions:
    """Predictions of a model that is sure by 0.5; a label of -1 is a row that failed."""
    label = np.array(labels, np.int64)
    if probs is None:
        probs = np.full((len(label), len(LABELS)), 0.25, np.float32)
        probs[np.arange(len(label)), label] = 0.5
        probs[label < 0] = 0
    return Predictions(
        label=label,
        probs=probs,
        abstained=np.isin(np.arange(len(label)), abstained),
        num_tokens=np.where(label < 0, 0, 7).astype(np.int32),
        truncated=label == 1,
        errors=errors or {},
    )


def write_rows(writer: ShardWriter, given: Predictions, first_row: int = SHARD.start) -> None:
    writer.write(first_row, kept_rows(first_row, len(given.label)), given)


def commit(sink: Sink, given: Predictions, shard: Shard = SHARD) -> Receipt:
    with sink.writer(shard, KEPT) as writer:
        write_rows(writer, given)
        return sink.commit(writer)


def table_of(sink: Sink, shard: Shard = SHARD) -> pa.Table:
    return pq.read_table(Path(sink.folder.uri, sink.name(shard)), partitioning=None)


def files_under(path: str) -> set[str]:
    return {str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file()}


# Columns

TEN = predictions([0, 1, 2, 0, 1, 2, -1, -1, 0, 1], abstained=[3], errors={6: "null_text: null"})


def test_rows_stand_in_their_order_with_all_that_was_found(sink: Sink) -> None:
    commit(sink, TEN)
    rows = table_of(sink).to_pylist()
    assert [row["row"] for row in rows] == list(range(100, 110))
    assert [row["id"] for row in rows] == [f"id {row}" for row in range(100, 110)]
    assert rows[1] == {
        "id": "id 101",
        "row": 101,
        "label": "sport",
        "score": 0.5,
        "probs": {"business": 0.25, "sport": 0.5, "tech": 0.25},
        "n_tokens": 7,
        "truncated": True,
        "error": None,
    }


def test_a_row_that_failed_has_its_error_and_nothing_else(sink: Sink) -> None:
    commit(sink, TEN)
    row = table_of(sink).to_pylist()[6]
    assert row == {
        "id": "id 106",
        "row": 106,
        "label": None,
        "score": None,
        "probs": None,
        "n_tokens": 0,
        "truncated": False,
        "error": "null_text: null",
    }


def test_a_row_that_abstained_has_no_label_but_its_score_and_probs(sink: Sink) -> None:
    commit(sink, TEN)
    row = table_of(sink).to_pylist()[3]
    assert (row["label"], row["score"], row["error"]) == (None, 0.5, None)
    assert row["probs"] == {"business": 0.5, "sport": 0.25, "tech": 0.25}


OUTCOMES = {
    "no rows": predictions([]),
    "all failed": predictions([-1] * 10, errors=dict.fromkeys(range(10), "empty_text: empty")),
    "all abstained": predictions([0] * 10, abstained=range(10)),
    "all labelled": predictions([0] * 10),
    "of all kinds": TEN,
}


@pytest.mark.parametrize("given", OUTCOMES.values(), ids=OUTCOMES)
def test_the_types_are_those_of_the_contract_whatever_became_of_the_rows(
    sink: Sink, given: Predictions
) -> None:
    shard = replace(SHARD, stop=SHARD.start + len(given.label))
    commit(sink, given, shard)
    schema = table_of(sink, shard).schema
    assert dict(zip(schema.names, schema.types, strict=True)) == {"id": pa.string(), **CONTRACT}


def test_a_shard_into_which_nothing_was_written_has_the_types_of_the_contract(sink: Sink) -> None:
    empty = replace(SHARD, stop=SHARD.start)
    with sink.writer(empty, KEPT) as writer:
        sink.commit(writer)
    assert table_of(sink, empty).schema.types == [pa.string(), *CONTRACT.values()]


@pytest.mark.parametrize("given", [predictions([]), TEN], ids=["empty", "of all kinds"])
def test_without_probs_the_other_columns_are_the_same(sink: Sink, given: Predictions) -> None:
    shard = replace(SHARD, stop=SHARD.start + len(given.label))
    commit(sink, given, shard)
    without = Sink(sink.folder, "1f", LABELS, probs=False)
    commit(without, given, shard)
    expected = table_of(sink, shard).drop_columns("probs")
    assert table_of(without, shard).equals(expected)


def test_nothing_kept_is_nothing_but_predictions(sink: Sink) -> None:
    empty = pa.StructArray.from_buffers(pa.struct([]), 10, [None])
    with sink.writer(SHARD, pa.schema([])) as writer:
        writer.write(SHARD.start, pa.RecordBatch.from_struct_array(empty), TEN)
        sink.commit(writer)
    assert table_of(sink).schema.names == list(CONTRACT)


def test_a_dictionary_column_keeps_its_type_when_its_values_grow(sink: Sink) -> None:
    kept = pa.schema([("tag", pa.dictionary(pa.int32(), pa.string()))])
    with sink.writer(SHARD, kept) as writer:
        for first in (100, 105):
            tags = pa.array([f"tag {row}" for row in range(first, first + 5)]).dictionary_encode()
            batch = pa.record_batch([tags], schema=kept)
            writer.write(first, batch, predictions([0] * 5))
        sink.commit(writer)
    tags = table_of(sink).column("tag")
    assert tags.type == pa.dictionary(pa.int32(), pa.string())
    assert tags.to_pylist() == [f"tag {row}" for row in range(100, 110)]


logits = st.lists(st.tuples(*[st.floats(-30, 30, width=32)] * len(LABELS)), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None)
@given(logits)
def test_probs_are_written_as_they_are_and_the_score_is_the_best_of_them(
    tmp_path_factory: pytest.TempPathFactory, logits: list[tuple[float, ...]]
) -> None:
    exponentials = np.exp(np.array(logits, np.float64))
    probs = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
    labels = probs.argmax(axis=1)
    sink = Sink(open_folder(str(tmp_path_factory.mktemp("out"))), "0f", LABELS, probs=True)
    shard = replace(SHARD, stop=SHARD.start + len(logits))
    commit(sink, predictions(labels.tolist(), probs=probs), shard)
    table = table_of(sink, shard)
    written = np.array([list(row.values()) for row in table.column("probs").to_pylist()])
    assert np.abs(written.sum(axis=1) - 1).max() < 1e-6
    assert (written == probs).all()
    assert table.column("score").to_pylist() == probs.max(axis=1).tolist()
    assert table.column("label").to_pylist() == [LABELS[label] for label in labels]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 2), max_size=9), max_size=9))
def test_counts_and_rows_are_the_same_however_the_rows_are_gathered(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]]
) -> None:
    labels = [label for batch in batches for label in batch]
    shard = replace(SHARD, stop=SHARD.start + len(labels))
    sinks = [
        Sink(open_folder(str(tmp_path_factory.mktemp("out"))), "0f", LABELS, probs=True)
        for _ in range(2)
    ]
    whole = commit(sinks[0], predictions(labels), shard)
    with sinks[1].writer(shard, KEPT) as writer:
        first_row = shard.start
        for batch in batches:
            write_rows(writer, predictions(batch), first_row)
            first_row += len(batch)
        receipt = sinks[1].commit(writer)
    assert replace(receipt, attempt=whole.attempt) == whole
    assert table_of(sinks[1], shard).equals(table_of(sinks[0], shard))


def test_many_rows_are_a_few_row_groups(sink: Sink) -> None:
    shard = replace(SHARD, stop=SHARD.start + 100_000)
    with sink.writer(shard, KEPT) as writer:
        for first_row in range(shard.start, shard.stop, 1000):
            write_rows(writer, predictions([0] * 1000), first_row)
        sink.commit(writer)
    metadata = pq.read_metadata(Path(sink.folder.uri, sink.name(shard)))
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(groups) == 100_000
    assert min(groups[:-1]) > 30_000


def test_rows_that_are_large_do_not_wait_for_each_other(sink: Sink) -> None:
    large = pa.record_batch([pa.array(["x" * (9 << 20)])], schema=KEPT)
    shard = replace(SHARD, stop=SHARD.start + 20)
    with sink.writer(shard, KEPT) as writer:
        for row in range(shard.start, shard.stop):
            writer.write(row, large, predictions([0]))
        sink.commit(writer)
    metadata = pq.read_metadata(Path(sink.folder.uri, sink.name(shard)))
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == [8, 8, 4]


# Counts and receipts


def test_a_receipt_counts_what_became_of_the_rows(sink: Sink) -> None:
    receipt = commit(sink, TEN)
    assert receipt.counts == Counts(
        num_rows=10,
        num_labelled=7,
        num_abstained=1,
        num_failed=2,
        num_truncated=3,
        num_tokens=56,
    )
    assert receipt.labels == {"business": 2, "sport": 3, "tech": 2}
    assert receipt.created


def test_counts_of_shards_add_up() -> None:
    assert Counts(1, 2, 3, 4, 5, 6) + Counts(10, 20, 30, 40, 50, 60) == Counts(
        11, 22, 33, 44, 55, 66
    )


def test_the_first_error_is_told_with_its_row(sink: Sink) -> None:
    with sink.writer(SHARD, KEPT) as writer:
        write_rows(writer, predictions([0, 1]))
        assert writer.first_error is None
        errors = {2: "null_text: null", 1: "empty_text: empty"}
        write_rows(writer, predictions([0, -1, -1], errors=errors), 102)
        write_rows(writer, predictions([-1], errors={0: "not_text: number"}), 105)
        assert writer.first_error == "row 103: empty_text: empty"


# The footer


def footer_of(sink: Sink, shard: Shard = SHARD) -> Footer:
    file = sink.folder.open(sink.name(shard))
    assert file is not None
    with file:
        return Footer.read(file, "it")


def test_the_footer_says_of_what_and_by_what_it_was_made(sink: Sink) -> None:
    receipt = commit(sink, TEN)
    footer = footer_of(sink)
    assert footer == Footer(
        source="file:///in/news.csv",
        source_version="sha256:0",
        start=100,
        stop=110,
        fingerprint="0f",
        version=__version__,
        nonce=footer.nonce,
        finished_at=footer.finished_at,
        counts=receipt.counts,
    )
    assert footer.is_of(SHARD, "0f")


def test_the_footer_is_plain_metadata_under_one_prefix(sink: Sink) -> None:
    commit(sink, TEN)
    metadata = pq.read_metadata(Path(sink.folder.uri, sink.name(SHARD))).metadata
    assert metadata[b"batchclf.source"] == b"file:///in/news.csv"
    assert metadata[b"batchclf.start"] == b"100"
    assert metadata[b"batchclf.num_failed"] == b"2"
    assert {key for key in metadata if not key.startswith(b"batchclf.")} <= {b"ARROW:schema"}


@pytest.mark.parametrize(
    "other",
    [
        replace(SHARD, source=replace(SHARD.source, uri="file:///in/other.csv")),
        replace(SHARD, source=replace(SHARD.source, version="sha256:1")),
        replace(SHARD, start=99),
        replace(SHARD, stop=111),
    ],
    ids=["source", "version", "start", "stop"],
)
def test_a_footer_is_of_its_own_shard_alone(sink: Sink, other: Shard) -> None:
    commit(sink, TEN)
    assert not footer_of(sink).is_of(other, "0f")


def test_a_footer_is_of_its_own_fingerprint_alone(sink: Sink) -> None:
    commit(sink, TEN)
    assert not footer_of(sink).is_of(SHARD, "1f")


def test_every_attempt_has_a_nonce_of_its_own(sink: Sink) -> None:
    nonces = set()
    for _ in range(3):
        with sink.writer(SHARD, KEPT) as writer:
            write_rows(writer, TEN)
            nonces.add(writer.finish("0f").nonce)
    assert len(nonces) == 3


def test_two_attempts_differ_in_nothing_that_is_a_row(sink: Sink) -> None:
    commit(sink, TEN)
    first = table_of(sink)
    sink.folder.delete(sink.name(SHARD))
    commit(sink, TEN)
    assert table_of(sink).equals(first)


# Rows in and rows out


@pytest.mark.parametrize("num_rows", [0, 9, 11])
def test_a_shard_with_other_rows_than_it_should_have_is_not_published(
    sink: Sink, num_rows: int
) -> None:
    with pytest.raises(OutputError, match=f"holds {num_rows} rows, .* rows 100 to 110"):
        commit(sink, predictions([0] * num_rows))
    assert files_under(sink.folder.uri) == set()


# Pages


def test_no_flipped_byte_before_the_footer_changes_a_row(sink: Sink) -> None:
    commit(sink, TEN)
    content = Path(sink.folder.uri, sink.name(SHARD)).read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    whole = table_of(sink)
    reasons = set()
    for place in range(0, footer, 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file = pa.BufferReader(bytes(damaged))
        try:
            assert pq.ParquetFile(file, page_checksum_verification=True).read().equals(whole)
        except (OSError, pa.ArrowInvalid) as error:
            reasons.add("CRC" if "CRC" in str(error) else "another")
    assert "CRC" in reasons


def test_pages_are_zstd_with_statistics(sink: Sink) -> None:
    commit(sink, TEN)
    group = pq.read_metadata(Path(sink.folder.uri, sink.name(SHARD))).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    assert all(column.is_stats_set for column in columns)
    assert (columns[1].statistics.min, columns[1].statistics.max) == (100, 109)


# Commits


def test_a_committed_shard_is_one_visible_file_of_its_name(sink: Sink) -> None:
    receipt = commit(sink, TEN)
    assert receipt.name == f"fp=0f/{SHARD.name}"
    assert files_under(sink.folder.uri) == {receipt.name}
    assert ds.dataset(sink.folder.uri, format="parquet").count_rows() == 10


def test_nothing_is_committed_before_the_commit(sink: Sink) -> None:
    assert sink.committed(SHARD) is None
    with sink.writer(SHARD, KEPT) as writer:
        write_rows(writer, TEN)
        assert sink.committed(SHARD) is None


def test_a_committed_shard_is_found_with_its_counts(sink: Sink) -> None:
    receipt = commit(sink, TEN)
    assert sink.committed(SHARD) == Receipt(
        receipt.name, receipt.counts, created=False, attempt=receipt.attempt
    )


def test_a_second_commit_finds_the_first_and_changes_nothing(sink: Sink) -> None:
    first = commit(sink, TEN)
    content = Path(sink.folder.uri, first.name).read_bytes()
    second = commit(sink, predictions([0] * 10))
    assert (second.created, second.counts) == (False, first.counts)
    assert Path(sink.folder.uri, first.name).read_bytes() == content


def test_of_workers_that_commit_one_shard_at_once_one_created_it(sink: Sink) -> None:
    together = threading.Barrier(8)

    def work(_: int) -> Receipt:
        with sink.writer(SHARD, KEPT) as writer:
            write_rows(writer, TEN)
            together.wait()
            return sink.commit(writer)

    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(work, range(8)))
    assert [receipt.created for receipt in receipts].count(True) == 1
    assert {receipt.counts.num_rows for receipt in receipts} == {10}
    assert files_under(sink.folder.uri) == {sink.name(SHARD)}


class LosesReplies(LocalFolder):
    """Publishes, and then says that something was there already."""

    def publish(self, scratch: Scratch) -> bool:
        super().publish(scratch)
        return False


def test_after_a_lost_reply_our_own_nonce_says_that_we_created_it(tmp_path: Path) -> None:
    sink = Sink(LosesReplies(str(tmp_path)), "0f", LABELS, probs=True)
    receipt = commit(sink, TEN)
    assert receipt.created
    assert receipt.labels == {"business": 2, "sport": 3, "tech": 2}


def test_a_store_that_refuses_and_holds_nothing_is_an_error(tmp_path: Path) -> None:
    class Refuses(LocalFolder):
        def publish(self, scratch: Scratch) -> bool:  # noqa: ARG002
            return False

    with pytest.raises(OutputError, match="refused to create it, but holds nothing"):
        commit(Sink(Refuses(str(tmp_path)), "0f", LABELS, probs=True), TEN)


def foreign_parquet(folder: Folder, name: str) -> None:
    pq.write_table(pa.table({"a": [1]}), Path(folder.uri, name))


def no_parquet(folder: Folder, name: str) -> None:
    Path(folder.uri, name).write_bytes(b"PAR1 and then somebody tripped over the cable")


def empty_file(folder: Folder, name: str) -> None:
    Path(folder.uri, name).write_bytes(b"")


def half_an_output(folder: Folder, name: str) -> None:
    path = Path(folder.uri, name)
    commit(Sink(folder, "0f", LABELS, probs=True), TEN)
    path.write_bytes(path.read_bytes()[:-100])


def output_of_another_shard(folder: Folder, name: str) -> None:
    other = replace(SHARD, start=SHARD.start + 1, stop=SHARD.stop + 1)
    sink = Sink(folder, "0f", LABELS, probs=True)
    commit(sink, TEN, other)
    Path(folder.uri, sink.name(other)).rename(Path(folder.uri, name))


def output_of_another_model(folder: Folder, name: str) -> None:
    sink = Sink(folder, "1f", LABELS, probs=True)
    commit(sink, TEN)
    Path(folder.uri, sink.name(SHARD)).rename(Path(folder.uri, name))


FOREIGN = {
    foreign_parquet: "not written by batchclf",
    no_parquet: "not a whole Parquet file",
    empty_file: "not a whole Parquet file",
    half_an_output: "not a whole Parquet file",
    output_of_another_shard: "holds other rows than .* move it away",
    output_of_another_model: "holds other rows than .* move it away",
}


@pytest.mark.parametrize(("put", "reason"), FOREIGN.items())
def test_something_else_under_the_name_of_a_shard_stops_its_commit_and_stays(
    sink: Sink, put: object, reason: str
) -> None:
    name = sink.name(SHARD)
    path = Path(sink.folder.uri, name)
    path.parent.mkdir()
    assert callable(put)
    put(sink.folder, name)
    content = path.read_bytes()
    with pytest.raises(OutputError, match=f"{name}: {reason}"):
        sink.committed(SHARD)
    with pytest.raises(OutputError, match=f"{name}: {reason}"):
        commit(sink, TEN)
    assert path.read_bytes() == content


# Writers that do not come to their end


@pytest.mark.parametrize("num_rows", [0, 10, 40_000])
def test_a_writer_that_is_left_without_a_commit_leaves_nothing(sink: Sink, num_rows: int) -> None:
    with sink.writer(SHARD, KEPT) as writer:
        write_rows(writer, predictions([0] * num_rows))
    assert files_under(sink.folder.uri) == set()


@pytest.mark.parametrize("error", [InputError("of the reader"), KeyboardInterrupt()])
def test_a_writer_that_is_left_by_an_error_leaves_nothing_and_raises_it(
    sink: Sink, error: BaseException
) -> None:
    def fail() -> None:
        with sink.writer(SHARD, KEPT) as writer:
            write_rows(writer, TEN)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert files_under(sink.folder.uri) == set()


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """EFBIG beyond it, which writers meet as they meet a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_rows", [10, 100_000], ids=["at the footer", "at a row group"])
def test_a_full_disk_is_a_reason_to_try_again_that_leaves_nothing(
    sink: Sink, num_rows: int
) -> None:
    shard = replace(SHARD, stop=SHARD.start + num_rows)
    with file_size_limit(1000), pytest.raises(OutOfSpaceError):
        commit(sink, predictions([0] * num_rows), shard)
    assert files_under(sink.folder.uri) == set()


def test_after_a_full_disk_the_same_shard_can_be_committed(sink: Sink) -> None:
    with file_size_limit(1000), pytest.raises(BatchclfError):
        commit(sink, TEN)
    assert commit(sink, TEN).created
