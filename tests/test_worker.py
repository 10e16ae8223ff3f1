"""Shards in, committed outputs out, without a command around it."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import make_hf_checkpoint

from batchclf.config import CutSettings, ModelSettings, PredictSettings, ReadSettings
from batchclf.labelling import Labelling
from batchclf.shards import Shard
from batchclf.source import RowBatch
from batchclf.store import Source
from batchclf.worker import Arrived, Outcome, run_shards

NO_COLUMNS = pa.schema([])
BATCH_TOKENS = 64
START_S = 10.0


@pytest.fixture
def labelling(tmp_path: Path) -> Labelling:
    model = make_hf_checkpoint(tmp_path / "model", hidden=16, layers=1)
    found = Labelling(
        ModelSettings(str(model), dtype="float32", max_batch_tokens=BATCH_TOKENS),
        ReadSettings(keep="none"),
        PredictSettings(),
        CutSettings(),
        str(tmp_path / "out"),
        None,
    )
    found.folder.prepare()
    return found


def rows(first: int, last: int) -> RowBatch:
    texts = pa.array([f"article {row}" for row in range(first, last)])
    nothing = pa.RecordBatch.from_struct_array(
        pa.StructArray.from_buffers(pa.struct([]), last - first, [None])
    )
    return RowBatch(first, (texts,), nothing, {})


def label(
    labelling: Labelling,
    batches: Iterator[RowBatch],
    num_rows: int,
    on_batch: Callable[[int, int], None] = lambda *_: None,
) -> list[Outcome]:
    shard = Shard(Source("file:///in/news.csv", "sha256:0", 9), 0, num_rows)
    arrived = Arrived(shard, NO_COLUMNS, batches)
    tools = labelling.tools()
    return list(run_shards([arrived], tools, threading.Event(), on_batch, lambda _: None))


def test_the_first_rows_are_labelled_while_those_that_would_share_their_window_are_read(
    labelling: Labelling,
) -> None:
    begun = threading.Event()

    def batches() -> Iterator[RowBatch]:
        yield rows(0, 300)
        assert begun.wait(START_S)
        yield rows(300, 310)

    (outcome,) = label(labelling, batches(), 310, lambda *_: begun.set())
    assert outcome.receipt is not None


def test_rows_stand_in_their_order_however_few_are_tokenised_at_first(
    labelling: Labelling, tmp_path: Path
) -> None:
    label(labelling, iter([rows(0, 300)]), 300)
    (written,) = (tmp_path / "out").rglob("*.parquet")
    assert pq.read_table(written)["row"].to_pylist() == list(range(300))
