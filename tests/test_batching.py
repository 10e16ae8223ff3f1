import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, strategies as st

from batchclf.batching import (
    pack_batches,
    padding_waste,
    plan_batches,
    split_evenly,
    spread,
    unique_rows,
)
from batchclf.errors import ConfigError

lengths_lists = st.lists(st.integers(0, 60), max_size=120)
budgets = st.integers(1, 200)


@given(lengths_lists, budgets)
def test_every_example_is_in_exactly_one_batch(lengths: list[int], max_tokens: int) -> None:
    batches = plan_batches(lengths, max_tokens)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))


@given(lengths_lists, budgets)
def test_no_batch_is_empty(lengths: list[int], max_tokens: int) -> None:
    assert all(len(batch) for batch in plan_batches(lengths, max_tokens))


@given(lengths_lists, budgets)
def test_the_budget_holds_except_for_single_examples_that_are_longer(
    lengths: list[int], max_tokens: int
) -> None:
    for batch in plan_batches(lengths, max_tokens):
        assert max(lengths[i] for i in batch) * len(batch) <= max_tokens or len(batch) == 1


@given(lengths_lists, budgets)
def test_the_longest_come_first_and_equals_keep_their_order(
    lengths: list[int], max_tokens: int
) -> None:
    order = [int(i) for batch in plan_batches(lengths, max_tokens) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


@given(lengths_lists, budgets)
def test_the_same_lengths_give_the_same_batches_as_list_and_as_array(
    lengths: list[int], max_tokens: int
) -> None:
    listed = plan_batches(lengths, max_tokens)
    arrayed = plan_batches(np.array(lengths, dtype=np.int32), max_tokens)
    assert [batch.tolist() for batch in listed] == [batch.tolist() for batch in arrayed]


@given(st.integers(1, 60), st.integers(1, 300), budgets)
def test_examples_of_one_length_fill_every_batch_but_the_last(
    length: int, count: int, max_tokens: int
) -> None:
    sizes = [len(batch) for batch in plan_batches([length] * count, max_tokens)]
    assert set(sizes[:-1]) <= {max(1, max_tokens // length)}


@given(lengths_lists, budgets, st.sampled_from([2, 8]))
def test_a_grain_keeps_the_partition_and_the_budget(
    lengths: list[int], max_tokens: int, grain: int
) -> None:
    batches = plan_batches(lengths, max_tokens, grain)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = -(-max(lengths[i] for i in batch) // grain) * grain
        assert longest * len(batch) <= max_tokens or len(batch) == 1


def test_a_grain_leaves_few_shapes_of_batches() -> None:
    lengths = np.random.default_rng(0).integers(1, 129, 20_000)
    shapes = {
        grain: {
            (-(-int(lengths[batch].max()) // grain), len(batch))
            for batch in plan_batches(lengths, 4096, grain)
        }
        for grain in (1, 8)
    }
    assert len(shapes[8]) * 2 < len(shapes[1])


def test_a_batch_ends_early_where_padding_would_cost_more_than_another_batch() -> None:
    batches = plan_batches([100] * 4 + [10] * 4, max_tokens=1000)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_batch_goes_on_where_another_one_would_cost_more_than_padding() -> None:
    batches = plan_batches([100] * 4 + [60] * 4, max_tokens=1000, batch_cost=500)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3, 4, 5, 6, 7]]


@given(lengths_lists, st.integers(1, 9))
def test_shares_are_a_partition_and_none_is_empty(lengths: list[int], count: int) -> None:
    shares = split_evenly(np.array(lengths, np.int64), count)
    assert sorted(int(i) for share in shares for i in share) == list(range(len(lengths)))
    assert all(len(share) for share in shares)


@given(lengths_lists, st.integers(1, 9))
def test_there_are_no_more_shares_than_asked_for(lengths: list[int], count: int) -> None:
    assert len(split_evenly(np.array(lengths, np.int64), count)) <= count


@given(lengths_lists.filter(any), st.integers(1, 9))
def test_no_share_is_larger_than_an_equal_one_by_more_than_an_example(
    lengths: list[int], count: int
) -> None:
    tokens = np.array(lengths, np.int64)
    shares = split_evenly(tokens, count)
    assert max(tokens[share].sum() for share in shares) <= sum(lengths) / count + max(lengths)


def test_the_longest_examples_are_in_the_first_share() -> None:
    shares = split_evenly(np.array([10, 40, 10, 30, 30]), 2)
    assert [share.tolist() for share in shares] == [[1, 3], [4, 0, 2]]


def test_a_budget_below_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        plan_batches([1], max_tokens=0)


def test_a_million_lengths_are_planned_in_well_under_a_second() -> None:
    lengths = news_lengths(1_000_000, seed=0)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        plan_batches(lengths, max_tokens=4096)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sigma", [0.5, 0.6, 0.8])
def test_a_window_of_64_batches_of_news_wastes_at_most_one_and_a_half_percent(
    sigma: float, seed: int
) -> None:
    lengths = news_lengths(2000, seed=seed, sigma=sigma)
    window = lengths[: np.searchsorted(np.cumsum(lengths), 64 * 4096)]
    batches = plan_batches(window, max_tokens=4096)
    assert padding_waste(window, batches) <= 0.015
    assert len(batches) <= 64 * 1.35  # a plan of single rows would waste nothing


@given(lengths_lists, budgets)
def test_padding_waste_is_padding_over_computed_tokens(lengths: list[int], max_tokens: int) -> None:
    batches = plan_batches(lengths, max_tokens)
    computed = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    expected = (computed - sum(lengths)) / computed if computed else 0
    assert padding_waste(lengths, batches) == pytest.approx(expected)


def test_the_waste_of_nothing_is_nothing() -> None:
    assert padding_waste([], []) == 0


id_rows = st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=40)


@given(id_rows)
def test_every_row_equals_the_first_row_of_its_kind(rows: list[list[int]]) -> None:
    first, inverse = unique_rows([np.array(row, dtype=np.int32) for row in rows])
    assert [rows[i] for i in first[inverse]] == rows


@given(id_rows)
def test_the_kinds_are_distinct_and_stand_in_the_order_of_their_first_rows(
    rows: list[list[int]],
) -> None:
    first, _ = unique_rows([np.array(row, dtype=np.int32) for row in rows])
    assert first.tolist() == [i for i, row in enumerate(rows) if row not in rows[:i]]


@given(id_rows)
def test_bytes_views_and_arrays_of_the_same_ids_are_the_same_rows(rows: list[list[int]]) -> None:
    arrays = [np.array(row, dtype=np.int32) for row in rows]
    expected = [part.tolist() for part in unique_rows(arrays)]
    for others in ([a.tobytes() for a in arrays], [memoryview(a) for a in arrays]):
        assert [part.tolist() for part in unique_rows(others)] == expected


def test_a_strided_row_counts_by_its_values() -> None:
    row = np.array([1, 9, 2, 9], dtype=np.int32)[::2]
    first, inverse = unique_rows([row, np.array([1, 2], dtype=np.int32)])
    assert (first.tolist(), inverse.tolist()) == ([0], [0, 0])


def news_lengths(count: int, *, seed: int, sigma: float = 0.6) -> npt.NDArray[np.int64]:
    """Tokens of articles: lognormal with mean 450, cut at 1024."""
    mu = np.log(450) - sigma**2 / 2
    drawn = np.random.default_rng(seed).lognormal(mu, sigma, count)
    return np.clip(drawn.astype(np.int64), 1, 1024)


@given(lengths_lists, budgets)
def test_end_to_end_each_batch_takes_as_many_as_fit_and_at_least_one(
    lengths: list[int], max_tokens: int
) -> None:
    counts = pack_batches(lengths, max_tokens)
    assert sum(counts) == len(lengths)
    start = 0
    for count in counts:
        assert count
        end = start + count
        assert count == 1 or sum(lengths[start:end]) <= max_tokens
        assert end == len(lengths) or sum(lengths[start : end + 1]) > max_tokens
        start = end


def test_end_to_end_a_budget_below_one_token_is_refused() -> None:
    with pytest.raises(ConfigError):
        pack_batches([1], 0)


@given(st.integers(0, 500), st.integers(1, 60))
def test_places_are_spread_over_the_whole(count: int, most: int) -> None:
    places = spread(count, most)
    assert len(set(places.tolist())) == len(places) == min(count, most)
    if len(places) > 1:
        steps = np.diff(places)
        assert (places[0], places[-1]) == (0, count - 1)
        assert steps.max() - steps.min() <= 1
