"""What `verify` says of outputs that hold articles from a queue: they have no input and no plan."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from batchclf.predictions import Predictions
from batchclf.shards import Shard
from batchclf.sink import Sink
from batchclf.store import Source, open_folder
from batchclf.verify import Verdict, verify

LABELS = ("business", "sport")
OF_ARTICLES = pa.schema(
    [("id", pa.string()), ("message_id", pa.string()), ("receive_count", pa.int32())]
)


@pytest.fixture
def sink(tmp_path: Path) -> Sink:
    folder = open_folder(str(tmp_path))
    folder.prepare()
    return Sink(folder, "0f", LABELS, probs=True)


def predictions(num_rows: int) -> Predictions:
    return Predictions(
        label=np.zeros(num_rows, np.int64),
        probs=np.full((num_rows, len(LABELS)), 0.5, np.float32),
        abstained=np.zeros(num_rows, np.bool_),
        num_tokens=np.full(num_rows, 7, np.int32),
        truncated=np.zeros(num_rows, np.bool_),
        errors={},
    )


def commit(sink: Sink, source: Source, kept: pa.RecordBatch) -> None:
    with sink.writer(Shard(source, 0, kept.num_rows), kept.schema) as writer:
        writer.write(0, kept, predictions(kept.num_rows))
        sink.commit(writer)


def commit_articles(sink: Sink, message_ids: Sequence[str], queue: str = "news") -> None:
    """One set of articles, as a worker writes it."""
    num_rows = len(message_ids)
    columns = [[f"id {row}" for row in range(num_rows)], message_ids, [1] * num_rows]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, OF_ARTICLES, strict=True)]
    source = Source(f"sqs://{queue}", f"sha256:{'+'.join(message_ids)}", 0)
    commit(sink, source, pa.record_batch(arrays, schema=OF_ARTICLES))


def commit_shard(sink: Sink, name: str = "a.csv") -> None:
    kept = pa.record_batch({"id": pa.array(["id 0"])})
    commit(sink, Source(f"s3://news/{name}", '"e"', 0), kept)


def verdict_of(sink: Sink) -> Verdict:
    return verify(sink.folder.uri)


def test_articles_alone_are_complete_without_a_plan(sink: Sink) -> None:
    commit_articles(sink, ["m1", "m2"])
    commit_articles(sink, ["m3"])
    found = verdict_of(sink)
    assert (found.problems, found.num_shards, found.counts.num_rows) == ([], 2, 3)
    assert found.notes == ["2 outputs are of articles from a queue, which no plan counts"]


def test_repeats_are_counted_by_message_and_noted(sink: Sink) -> None:
    commit_articles(sink, ["m1", "m2", "m3"])
    commit_articles(sink, ["m2", "m4"])
    commit_articles(sink, ["m2", "m1", "m5"])
    found = verdict_of(sink)
    assert (found.problems, found.num_repeats) == ([], 3)
    assert "3 rows are of messages that were delivered again" in found.notes[0]
    assert "keep the first row of each message_id" in found.notes[0]


def test_articles_that_came_once_have_no_repeats(sink: Sink) -> None:
    commit_articles(sink, ["m1", "m2"])
    assert verdict_of(sink).num_repeats == 0


def test_shards_without_a_plan_stay_a_problem_beside_articles(sink: Sink) -> None:
    commit_articles(sink, ["m1"])
    commit_shard(sink)
    (problem,) = verdict_of(sink).problems
    assert "no _SUCCESS.json" in problem


def test_a_column_of_that_name_in_a_file_counts_no_repeats(sink: Sink) -> None:
    kept = pa.record_batch({"message_id": pa.array(["m1", "m1"])})
    commit(sink, Source("s3://news/a.csv", '"e"', 0), kept)
    assert verdict_of(sink).num_repeats == 0


def test_a_damaged_set_of_articles_is_a_problem(sink: Sink) -> None:
    commit_articles(sink, ["m1"])
    commit_articles(sink, ["m2"])
    damaged = next(Path(sink.folder.uri).rglob("*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:-50])
    (problem,) = verdict_of(sink).problems
    assert damaged.name in problem
