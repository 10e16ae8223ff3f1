import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest
from e2e import archives
from hypothesis import given, strategies as st

from batchclf.checkpoint import load
from batchclf.compute import choose_compute
from batchclf.config import CutSettings, ModelSettings, ReadSettings, Share
from batchclf.engine import Engine, build_model
from batchclf.errors import ConfigError, Interrupted
from batchclf.estimates import choose_blocks, make_windows
from batchclf.forecast import Forecast, Settings, make_forecast
from batchclf.planning import look_into
from batchclf.sample import OFFSET_ROWS, Rows, SampleReader
from batchclf.shards import plan_shards
from batchclf.source import open_reader
from batchclf.speed import Demand, Speed, _as_read, computed_tokens
from batchclf.store import open_source
from batchclf.text import TextEncoder

NEVER = threading.Event()
READ = ReadSettings()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reads 64 tokens."""
    return models.make_hf_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3,600 rows in every format; every 50th has no text."""
    folder = tmp_path_factory.mktemp("large")
    rows = archives.articles(3600)
    for row in rows[::50]:
        row["text"] = ""
    archives.write(folder / "a.parquet", rows[:600], row_group_rows=200)
    archives.write(folder / "b.csv", rows[600:1900])
    archives.write(folder / "c.csv.gz", rows[1900:2200])
    archives.write(folder / "d.jsonl", rows[2200:3500])
    archives.write(folder / "e.jsonl.gz", rows[3500:])
    return folder


def settings(model: Path, *inputs: Path, **changes: object) -> Settings:
    values = {
        "inputs": tuple(map(str, inputs)),
        "model": ModelSettings(str(model), dtype="float32", device="cpu"),
        "read": READ,
        "cut": CutSettings(rows_per_shard=1000),
        "share": Share(),
        "sample_rows": 10_000,
        "tokens_per_second": 1000.0,
    }
    return Settings(**(values | changes))  # type: ignore[arg-type]


def plan(model: Path, *inputs: Path, **changes: object) -> Forecast:
    return make_forecast(settings(model, *inputs, **changes), NEVER)


def read_sample(model: Path, folder: Path, sample_rows: int) -> tuple[Rows, np.ndarray]:
    """The sampled rows, and where they should be from."""
    checkpoint = load(str(model))
    looked = look_into([str(folder)], READ, OFFSET_ROWS, None)
    shards = plan_shards(looked.readable, CutSettings(rows_per_shard=1000))
    blocks = choose_blocks(sum(shard.num_rows for shard in shards), sample_rows)
    encoder = TextEncoder(checkpoint.tokenizer, 16)
    whole = TextEncoder(checkpoint.tokenizer, 1000)
    sample = SampleReader(READ, encoder, whole, NEVER, None).read(
        shards, dict(looked.readable), blocks
    )
    assert not sample.damaged
    assert sum(batch.num_rows for batch in sample.batches) == len(sample.rows.places)
    chosen = itertools.chain.from_iterable(map(range, blocks.starts, blocks.stops))
    return sample.rows, np.fromiter(chosen, np.int64)


def test_a_sample_holds_the_chosen_rows_of_every_format(model: Path, large: Path) -> None:
    everything, _ = read_sample(model, large, 10_000)
    assert everything.places.tolist() == list(range(3600))
    for sample_rows in (50, 1000, 3599):
        rows, chosen = read_sample(model, large, sample_rows)
        assert rows.places.tolist() == chosen.tolist()
        assert rows.lengths.tolist() == everything.lengths[chosen].tolist()
        assert rows.num_tokens.tolist() == np.minimum(everything.lengths[chosen], 16).tolist()
        assert rows.digests == [everything.digests[place] for place in chosen]
        assert rows.codes == [everything.codes[place] for place in chosen]


def test_a_plan_from_every_row_is_exact(model: Path, large: Path) -> None:
    found = plan(model, large)
    assert found.is_whole
    assert (found.num_rows, found.num_sampled, found.num_planned) == (3600, 3600, 7)
    assert found.error_rows["empty_text"].value == pytest.approx(72)
    texts = [row["text"] for row in archives.articles(3600)]
    tokenizer = load(str(model)).tokenizer
    lengths = np.array([len(each.ids) for each in tokenizer.encode_batch(texts)])
    lengths[::50] = 0
    assert found.text_tokens.value == pytest.approx(lengths.sum() / 3528)
    assert found.total_tokens.value == pytest.approx(np.minimum(lengths, 64).sum())
    (cut,) = found.truncation
    assert cut.texts.low == cut.texts.high == pytest.approx((lengths > 64).sum() / 3528)
    assert cut.lost.value == pytest.approx(np.maximum(lengths - 64, 0).sum() / lengths.sum())
    assert found.time is not None
    assert found.time.run_s.value == pytest.approx(found.total_tokens.value / 1000)
    assert found.time.start_s is None


def test_a_plan_from_a_sample_holds_the_truth_in_its_intervals(model: Path, large: Path) -> None:
    truth = plan(model, large)
    found = plan(model, large, sample_rows=1500)
    assert found.num_sampled <= 1500
    assert not found.is_whole
    # twice as wide, so that it is no matter of luck
    for exact, estimate in (
        (truth.total_tokens, found.total_tokens),
        (truth.text_tokens, found.text_tokens),
        (truth.error_rows["empty_text"], found.error_rows["empty_text"]),
        (truth.truncation[0].texts, found.truncation[0].texts),
        (truth.truncation[0].lost, found.truncation[0].lost),
    ):
        assert estimate.low < estimate.high
        assert estimate.value - 2 * (estimate.value - estimate.low) <= exact.value
        assert exact.value <= estimate.value + 2 * (estimate.high - estimate.value)


def test_workers_share_the_work_and_all_are_paid(model: Path, large: Path) -> None:
    alone = plan(model, large, price_per_hour=2.0).time
    four = plan(model, large, price_per_hour=2.0, num_workers=4).time
    many = plan(model, large, num_workers=100).time
    assert alone
    assert four
    assert many
    assert alone.cost
    assert four.cost
    assert (alone.num_workers, four.num_workers, many.num_workers) == (1, 4, 7)
    assert (alone.num_shards, four.num_shards, many.num_shards) == (7, 2, 1)
    assert four.run_s.value < alone.run_s.value
    assert four.cost.value == pytest.approx(alone.cost.value)
    assert alone.cost.value == pytest.approx(2.0 * alone.run_s.value / 3600)
    assert many.cost is None


def test_shares_and_limits_plan_what_they_would_label(model: Path, large: Path) -> None:
    shares = [plan(model, large, share=Share(index, 3)) for index in range(3)]
    assert sum(found.num_rows for found in shares) == 3600
    assert [found.num_mine for found in shares] == [2, 2, 3]
    assert plan(model, large, cut=CutSettings(limit=77)).num_rows == 77


def test_workers_of_a_share_are_refused(model: Path, large: Path) -> None:
    with pytest.raises(ConfigError, match="--workers"):
        settings(model, large, num_workers=2, share=Share(0, 2))


def test_repeats_are_counted_by_what_the_model_sees(model: Path, tmp_path: Path) -> None:
    rows = archives.articles(40)
    for row in rows[:10]:
        row["text"] = " ".join(models.CORPUS)
    rows[9]["text"] += " and on, beyond what is read"
    found = plan(model, archives.write(tmp_path / "in.csv", rows))
    assert found.repeats == pytest.approx(9 / 40)


@pytest.mark.parametrize("texts", [[], ["", None, " "]], ids=["no rows", "no text in any row"])
def test_nothing_to_compute_takes_no_time(
    model: Path, tmp_path: Path, texts: Sequence[str | None]
) -> None:
    rows = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    path = archives.write(tmp_path / "in.parquet", rows)
    found = plan(model, path, tokens_per_second=None)
    assert found.num_rows == len(texts)
    assert found.time is None
    assert sum(rows.value for rows in found.error_rows.values()) == pytest.approx(len(texts))
    assert found.as_dict()["lengths"] == []


def test_a_page_that_is_damaged_leaves_a_plan_of_the_rest(model: Path, tmp_path: Path) -> None:
    """Its footer is whole, so that only reading shows it."""
    rows = archives.articles(60)
    archives.write(tmp_path / "a.csv", rows[:30])
    damaged = archives.write(tmp_path / "b.parquet", rows[30:])
    content = bytearray(damaged.read_bytes())
    content[100:900] = bytes(800)
    damaged.write_bytes(content)
    found = plan(model, tmp_path)
    assert (found.num_rows, found.num_sampled) == (60, 30)
    assert ["b.parquet" in str(error) for error in found.unreadable] == [True]
    assert not found.is_whole
    assert found.time is not None


def test_an_interrupted_plan_stops(model: Path, large: Path) -> None:
    interrupt = threading.Event()
    interrupt.set()
    with pytest.raises(Interrupted):
        make_forecast(settings(model, large), interrupt)


def test_padding_is_counted_as_the_engine_computes_it(model: Path) -> None:
    checkpoint = load(str(model))
    compute = choose_compute("cpu", "float32")
    engine = Engine(build_model(checkpoint, compute), compute, max_batch_tokens=256)
    texts = [row["text"] for row in archives.articles(300)]
    encoded = TextEncoder(checkpoint.tokenizer, 64).encode(texts)
    lengths = encoded.num_tokens.astype(np.int64)
    windows = make_windows(lengths, encoded.row_bytes(), 10**9, len(lengths))
    expected = engine.predict(encoded.ids, encoded.offsets, lambda _rows, _tokens: None)
    found = computed_tokens(windows, engine)
    assert found == expected.num_padded_tokens


@given(*[st.floats(1e-6, 1) for _ in range(5)], st.integers(1, 64))
def test_more_rows_never_take_less_time(
    read: float, tokenise: float, predict: float, write: float, cpu: float, num_cores: int
) -> None:
    demand = Demand(read, tokenise, predict, write, cpu)
    speed = Speed(demand, (1, 1), 10, 3, num_cores, warm_up_s=1.0, shard_s=0.01)
    times = [speed.seconds(rows, 1, first_rows=1000) for rows in (0, 1, 999, 1000, 1001, 10**6)]
    assert times == sorted(times)
    slowest = max(read, tokenise, predict, write)
    assert speed.steady_s >= slowest
    assert times[-1] >= slowest * 10**6


def test_stages_of_a_short_run_follow_one_another_and_those_of_a_long_one_overlap() -> None:
    demand = Demand(read=0.001, tokenise=0.002, predict=0.004, write=0.001, cpu=0.006)
    speed = Speed(demand, (1, 1), 10, 3, num_cores=2, warm_up_s=0.5, shard_s=0.1)
    assert speed.seconds(100, 1, first_rows=1000) == pytest.approx(0.5 + 0.1 + 100 * 0.007)
    expected = 0.5 + 1.0 + 1000 * 0.007 + 100_000 * 0.004
    assert speed.seconds(101_000, 10, first_rows=1000) == pytest.approx(expected)


def test_a_long_run_goes_at_the_pace_that_was_measured_where_one_was() -> None:
    demand = Demand(read=0.001, tokenise=0.002, predict=0.004, write=0.001, cpu=0.010)
    speed = Speed(demand, (1, 1), 10, 3, 2, warm_up_s=0.5, shard_s=0.1, overlapped_s=0.003)
    expected = 0.5 + 1.0 + 1000 * 0.007 + 100_000 * 0.0035
    assert speed.seconds(101_000, 10, first_rows=1000) == pytest.approx(expected)


def test_sampled_rows_are_measured_in_batches_as_large_as_those_of_a_reader(large: Path) -> None:
    looked = look_into([str(large / "b.csv")], READ, 1, None)
    with open_source(looked.sources[0]) as file:
        batches = list(open_reader(file, looked.sources[0], READ).read(0, 1300))
    parts = [
        batch.copy(first, min(first + 32, batch.num_rows))
        for batch in batches
        for first in range(0, batch.num_rows, 32)
    ]
    parts[3] = replace(parts[3], faults={5: "unparseable: a test"})
    (rows,) = _as_read(parts)
    assert [batch.num_rows for batch in rows] == [1024, 276]
    assert rows[0].faults == {3 * 32 + 5: "unparseable: a test"}
    for found, read in zip(rows, batches, strict=True):
        assert found.kept.equals(read.kept)
        assert found.text[0].equals(read.text[0])


def test_a_copy_of_rows_is_those_rows(large: Path) -> None:
    looked = look_into([str(large / "a.parquet")], ReadSettings(keep="all"), 1, None)
    source = looked.sources[0]
    with open_source(source) as file:
        (batch,) = open_reader(file, source, ReadSettings(keep="all")).read(0, 100)
    part = batch.copy(10, 30)
    assert part.first_row == 10
    assert part.kept.equals(batch.kept.slice(10, 20))
    assert part.text[0].equals(batch.text[0].slice(10, 20))
    assert part.texts(READ.text_columns).errors == {}


def test_a_measured_plan_says_what_it_measured(model: Path, large: Path) -> None:
    found = plan(model, large, cut=CutSettings(limit=200), tokens_per_second=None)
    assert found.speed is not None
    assert found.time is not None
    assert found.time.is_measured
    assert found.speed.num_passes >= 2
    assert min(vars(found.speed.demand).values()) > 0
    assert found.speed.scatter[0] <= 1 <= found.speed.scatter[1]
    assert found.time.run_s.low <= found.time.run_s.value <= found.time.run_s.high
    assert found.time.start_s
