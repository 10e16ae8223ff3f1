"""Shards in, committed outputs out, without a command around it."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import make_hf_checkpoint

from batchclf.classifier import Classifier
from batchclf.config import CutSettings, ModelSettings, PredictSettings, ReadSettings
from batchclf.engine import Engine
from batchclf.errors import Interrupted
from batchclf.labelling import Labelling
from batchclf.shards import Shard
from batchclf.source import RowBatch
from batchclf.source.base import record_batch
from batchclf.store import Source
from batchclf.worker import Arrived, Outcome, run_shards

NO_COLUMNS = pa.schema([])
SOURCE = Source("file:///in/news.csv", "sha256:0", 9)
BATCH_TOKENS = 64
START_S = 10.0


@pytest.fixture
def labelling(tmp_path: Path) -> Labelling:
    model = make_hf_checkpoint(tmp_path / "model", hidden=16, layers=1)
    found = Labelling(
        ModelSettings(str(model), dtype="float32", device="cpu", max_batch_tokens=BATCH_TOKENS),
        ReadSettings(keep="none"),
        PredictSettings(),
        CutSettings(),
        str(tmp_path / "out"),
        None,
    )
    found.folder.prepare()
    return found


def text(row: int) -> str:
    return f"article {row}" * (row % 5 + 1)


def rows(first: int, last: int, faults: Sequence[int] = ()) -> RowBatch:
    texts = pa.array([text(row) for row in range(first, last)])
    nothing = record_batch([], NO_COLUMNS, last - first)
    return RowBatch(first, (texts,), nothing, {row - first: "broken: no text" for row in faults})


def label(
    labelling: Labelling,
    *shards: Iterable[RowBatch],
    on_batch: Callable[[int, int], None] = lambda *_: None,
    interrupt: threading.Event | None = None,
    rows_each: int = 310,
) -> Iterator[Outcome]:
    """Label shards by one stream."""
    arrived = [
        Arrived(Shard(SOURCE, first, first + rows_each), NO_COLUMNS, batches)
        for first, batches in zip(range(0, rows_each * len(shards), rows_each), shards, strict=True)
    ]
    tools = labelling.tools()
    engine = Engine(tools.engine._model, labelling.compute, BATCH_TOKENS, num_streams=1)
    tools = replace(tools, engine=engine)
    return run_shards(arrived, tools, interrupt or threading.Event(), on_batch, lambda _: None)


def test_the_first_rows_are_labelled_while_those_that_would_share_their_window_are_read(
    labelling: Labelling,
) -> None:
    begun = threading.Event()

    def batches() -> Iterator[RowBatch]:
        yield rows(0, 100)
        assert begun.wait(START_S)
        yield rows(100, 310)

    (outcome,) = label(labelling, batches(), on_batch=lambda *_: begun.set())
    assert outcome.receipt is not None


def test_every_row_has_its_own_prediction_however_few_are_tokenised_at_first(
    labelling: Labelling, tmp_path: Path
) -> None:
    list(label(labelling, [rows(0, 310, faults=[3, 200])]))
    (written,) = (tmp_path / "out").rglob("*.parquet")
    found = pq.read_table(written).drop_columns("row")
    settings = ModelSettings(str(tmp_path / "model"), dtype="float32", device="cpu")
    with Classifier(settings) as classifier:
        wanted = classifier.classify([text(row) for row in range(310)])
    assert [row for row, error in enumerate(found["error"].to_pylist()) if error] == [3, 200]
    fine = pa.array([row not in (3, 200) for row in range(310)])
    for name in ("label", "n_tokens"):
        assert found[name].filter(fine).equals(wanted[name].filter(fine))
    np.testing.assert_allclose(found["score"].filter(fine), wanted["score"].filter(fine), atol=1e-5)


def test_told_to_stop_no_more_shards_are_committed_though_their_rows_are_computed(
    labelling: Labelling,
) -> None:
    interrupt = threading.Event()
    shards = ([rows(number, number + 1)] for number in range(2))
    outcomes = label(labelling, *shards, interrupt=interrupt, rows_each=1)
    assert next(outcomes).is_new
    interrupt.set()
    with pytest.raises(Interrupted):
        next(outcomes)
