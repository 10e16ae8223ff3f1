"""Temperature and calibration error, against plain slow versions of the formulas."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra import numpy as npst

from batchclf.calibration import (
    NUM_BINS,
    expected_calibration_error,
    fit_temperature,
    log_loss,
    log_softmax,
    reliability_bins,
)


def logits_and_labels(most: int = 40) -> Any:
    shapes = st.tuples(st.integers(1, most), st.integers(2, 6))

    def labelled(shape: tuple[int, int]) -> Any:
        return st.tuples(
            npst.arrays(np.float64, shape, elements=st.floats(-30, 30)),
            npst.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)),
        )

    return shapes.flatmap(labelled)


def slow_log_loss(logits: Any, labels: Any, temperature: float = 1.0) -> float:
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        scaled = [value / temperature for value in row]
        top = max(scaled)
        total += top + math.log(sum(math.exp(value - top) for value in scaled)) - scaled[label]
    return total / len(logits)


def slow_calibration_error(scores: list[float], correct: list[bool], num_bins: int) -> float:
    """Equation 3 of Guo and others."""
    error = 0.0
    for place in range(num_bins):
        low, high = place / num_bins, (place + 1) / num_bins
        inside = [
            (score, right)
            for score, right in zip(scores, correct, strict=True)
            if low < score <= high or (place == 0 and score == 0)
        ]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            mean = sum(score for score, _ in inside) / len(inside)
            error += len(inside) / len(scores) * abs(accuracy - mean)
    return error


@given(logits_and_labels())
def test_log_loss_is_the_mean_of_minus_the_log_probability_of_the_true_label(given: Any) -> None:
    assert log_loss(*given) == pytest.approx(slow_log_loss(*given), abs=1e-9)


@given(logits_and_labels())
def test_probabilities_sum_to_one(given: Any) -> None:
    assert np.exp(log_softmax(given[0])).sum(axis=1) == pytest.approx(1)


def test_large_logits_do_not_overflow() -> None:
    assert log_softmax(np.array([[1e30, 0.0]])).tolist() == [[0.0, -1e30]]


@given(
    st.lists(
        st.tuples(st.floats(0, 1) | st.integers(0, NUM_BINS).map(lambda n: n / NUM_BINS)).flatmap(
            lambda score: st.tuples(st.just(score[0]), st.booleans())
        ),
        min_size=1,
        max_size=60,
    )
)
def test_calibration_error_is_that_of_the_paper(pairs: list[tuple[float, bool]]) -> None:
    scores, correct = [score for score, _ in pairs], [right for _, right in pairs]
    bins = reliability_bins(np.array(scores), np.array(correct))
    expected = slow_calibration_error(scores, correct, NUM_BINS)
    assert expected_calibration_error(bins) == pytest.approx(expected, abs=1e-9)


@given(npst.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1)), st.integers(1, 20))
def test_every_example_is_in_the_bin_of_its_score(scores: Any, num_bins: int) -> None:
    bins = reliability_bins(scores, np.ones(len(scores), np.bool_), num_bins)
    assert sum(each.count for each in bins) == len(scores)
    for each in bins:
        if each.mean_score is not None:
            assert each.lower - 1e-9 <= each.mean_score <= each.upper + 1e-9


@settings(max_examples=50)
@given(logits_and_labels(most=15))
def test_no_other_temperature_fits_better(given: Any) -> None:
    assume((given[0].argmax(axis=1) != given[1]).any())
    best = slow_log_loss(*given, temperature=fit_temperature(*given))
    for temperature in (0.05, 0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0, 20.0):
        assert best <= slow_log_loss(*given, temperature=temperature) + 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_at_is_found_again(temperature: float) -> None:
    chance = np.random.default_rng(0)
    logits = chance.normal(scale=2, size=(20_000, 4))
    noise = chance.gumbel(size=logits.shape)
    labels = (logits / temperature + noise).argmax(axis=1)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(temperature, rel=0.1)


def test_where_all_is_right_the_logits_stay_as_they_are() -> None:
    logits = np.array([[2.0, 1.0], [0.5, 0.9]])
    assert fit_temperature(logits, np.array([0, 1])) == 1.0


def test_a_loss_of_nothing_has_no_sign() -> None:
    assert str(log_loss(np.array([[1e6, 0.0]]), np.array([0]))) == "0.0"


def test_temperature_scaling_makes_overconfident_scores_honest() -> None:
    chance = np.random.default_rng(1)
    honest = chance.normal(scale=2, size=(5000, 3))
    labels = (honest + chance.gumbel(size=honest.shape)).argmax(axis=1)
    logits = 4 * honest

    def error(temperature: float) -> float:
        scores = np.exp(log_softmax(logits / temperature).max(axis=1))
        return expected_calibration_error(reliability_bins(scores, logits.argmax(axis=1) == labels))

    assert error(1.0) > 0.15
    assert error(fit_temperature(logits, labels)) < 0.02
