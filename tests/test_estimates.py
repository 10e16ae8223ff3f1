import numpy as np
import pytest
from hypothesis import given, strategies as st

from batchclf.estimates import (
    Estimate,
    Population,
    choose_blocks,
    histogram,
    make_windows,
)

row_counts = st.integers(0, 5000)
sample_sizes = st.integers(2, 3000)


def population(num_rows: int, sample_rows: int) -> tuple[Population, np.ndarray]:
    """Chosen rows, and their positions."""
    blocks = choose_blocks(num_rows, sample_rows)
    sizes = blocks.stops - blocks.starts
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    places = [np.arange(a, b) for a, b in zip(blocks.starts, blocks.stops, strict=True)]
    return Population(blocks, block_of), np.concatenate([*places, np.array([], np.int64)])


@given(row_counts, sample_sizes)
def test_blocks_are_rows_of_the_job_each_once_and_no_more_than_asked_for(
    num_rows: int, sample_rows: int
) -> None:
    blocks = choose_blocks(num_rows, sample_rows)
    assert (blocks.starts < blocks.stops).all()
    assert (blocks.stops[:-1] <= blocks.starts[1:]).all()
    assert blocks.num_sampled <= min(num_rows, sample_rows)
    if num_rows:
        assert blocks.starts[0] >= 0
        assert blocks.stops[-1] <= num_rows
        assert blocks.num_sampled
    assert blocks.is_whole == (num_rows <= sample_rows)


@given(row_counts, sample_sizes)
def test_every_row_of_the_job_is_stood_for_once(num_rows: int, sample_rows: int) -> None:
    blocks = choose_blocks(num_rows, sample_rows)
    stood_for = blocks.weights * (blocks.stops - blocks.starts)
    assert stood_for.sum() == pytest.approx(num_rows)
    assert (blocks.weights >= 1).all()


@given(st.integers(3000, 10**9), st.integers(256, 10_000))
def test_blocks_are_spread_over_the_whole_job(num_rows: int, sample_rows: int) -> None:
    blocks = choose_blocks(num_rows, sample_rows)
    quarters = blocks.starts * 4 // num_rows
    counts = np.bincount(quarters, minlength=4)
    assert counts.min() >= len(blocks.starts) // 4 - 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(300, 900))
def test_an_estimate_from_every_row_is_exact(values: list[float], sample_rows: int) -> None:
    everything, _ = population(len(values), sample_rows)
    mean = everything.mean(values)
    assert mean.low == mean.high == mean.value == pytest.approx(np.mean(values))
    above = np.array(values) > np.median(values)
    share = everything.share(above)
    assert share.low == share.high == share.value == pytest.approx(above.mean())


@given(st.integers(400, 4000), st.integers(20, 399), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_an_interval_holds_its_estimate_and_a_share_stays_a_share(
    num_rows: int, sample_rows: int, rate: float, seed: int
) -> None:
    sampled, places = population(num_rows, sample_rows)
    hits = np.random.default_rng(seed).random(num_rows)[places] < rate
    share = sampled.share(hits)
    assert 0 <= share.low <= share.value <= share.high <= 1
    assert share.low < share.high
    mean = sampled.mean(hits * 7.0)
    assert 0 <= mean.low <= mean.value <= mean.high


def covered(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize("sample_rows", [200, 4000])
@pytest.mark.parametrize("run_rows", [1, 50, 1000], ids=lambda rows: f"runs of {rows} alike")
def test_intervals_cover_the_truth_about_as_often_as_they_say(
    sample_rows: int, run_rows: int
) -> None:
    """Neighbours are alike, as in an archive by day and desk; 95% of 200 would be 190."""
    num_rows, trials = 40_000, 200
    sampled, places = population(num_rows, sample_rows)
    hits = {"mean": 0, "share": 0, "ratio": 0}
    for seed in range(trials):
        random = np.random.default_rng(seed)
        runs = random.lognormal(6, 0.5, -(-num_rows // run_rows)).repeat(run_rows)[:num_rows]
        lengths = runs * random.lognormal(0, 0.3, num_rows)
        rest = np.maximum(lengths - 512, 0)
        hits["mean"] += covered(sampled.mean(lengths[places]), lengths.mean())
        is_long = lengths > 600
        hits["share"] += covered(sampled.share(is_long[places]), is_long.mean())
        lost = sampled.share(rest[places], lengths[places])
        hits["ratio"] += covered(lost, rest.sum() / lengths.sum())
    assert min(hits.values()) >= 0.88 * trials, hits


def test_what_no_sampled_row_shows_may_still_be_there() -> None:
    sampled, places = population(100_000, 10_000)
    nothing = sampled.share(np.zeros(len(places)))
    assert nothing.value == nothing.low == 0
    assert 0.001 < nothing.high < 0.05


def test_blocks_that_could_not_be_read_leave_an_estimate_of_the_others() -> None:
    whole, _ = population(320, 320)
    half = Population(whole.blocks, whole.block_of[whole.block_of % 2 == 0])
    share = half.share(np.ones(len(half.block_of)))
    assert share.value == 1
    assert share.low < 1


@given(st.lists(st.integers(1, 70_000), min_size=1, max_size=200), st.data())
def test_a_histogram_counts_every_text_once(lengths: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.5, 100), min_size=len(lengths), max_size=len(lengths)))
    found = histogram(np.array(lengths), np.array(weights))
    assert sum(found.shares) == pytest.approx(1)
    assert len(found.shares) <= 15
    for (first, last), share in zip(found.bounds(), found.shares, strict=True):
        inside = [first <= length and (last is None or length <= last) for length in lengths]
        assert share == pytest.approx(np.array(weights) @ inside / sum(weights))
    longest = [
        share for share, (_, last) in zip(found.shares, found.bounds(), strict=True) if not last
    ]
    assert sum(longest) <= 0.02 + 1e-9
    assert histogram(np.array([], np.int64), np.array([])).shares == ()


def test_a_few_very_long_texts_leave_a_histogram_of_the_others() -> None:
    chance = np.random.default_rng(0)
    ordinary = chance.integers(100, 400, 950)
    lengths = np.concatenate([ordinary, np.full(50, 60_000)])
    found = histogram(lengths, np.ones(len(lengths)))
    bars = [
        share
        for share, (first, last) in zip(found.shares, found.bounds(), strict=True)
        if last and last > 100 and first < 400
    ]
    assert len(bars) >= 3
    assert max(bars) < 0.6


def test_bins_are_finer_where_there_is_room() -> None:
    found = histogram(np.arange(130, 250), np.ones(120))
    assert found.ends == (160, 192, 224, 256)


@given(st.lists(st.integers(1, 60), max_size=200), st.integers(1, 500), st.integers(0, 3))
def test_windows_hold_every_distinct_text(
    lengths: list[int], window_tokens: int, larger: int
) -> None:
    kinds = [str(length).encode() for length in lengths]
    num_texts = len(lengths) * (1 + larger)
    found = make_windows(np.array(lengths, np.int64), kinds, window_tokens, num_texts)
    assert found.num_texts % max(len(lengths), 1) == 0
    assert found.num_texts <= num_texts
    assert {length for window in found.lengths for length in window.tolist()} == set(lengths)
    if found.num_texts == len(lengths):
        for window in found.lengths:
            assert len(set(window.tolist())) == len(window)
    else:
        assert sum(lengths) * 2 <= window_tokens
