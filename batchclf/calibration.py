"""Whether a probability means what it says: temperature scaling and calibration error.

Source: Guo and others, "On Calibration of Modern Neural Networks" (2017).

Shape suffixes: N examples, C labels.
"""
# ruff: noqa: N803, N806 - names of arrays end in their shape, in capitals

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_BINS = 15  # as in the paper
_TEMPERATURES = (0.05, 20.0)
_TEMPERATURE_STEPS = 60  # each leaves 0.62 of the interval: 1e-12 of it in the end

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Bin:
    """Examples whose score lies above `lower` and at or below `upper`.

    Attributes:
        mean_score: of them, None where there are none.
        accuracy: the share of them that is right, None where there are none.
    """

    lower: float
    upper: float
    count: int
    mean_score: float | None
    accuracy: float | None


def log_softmax(logits_NC: Floats) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities [N, C] of logits."""
    shifted_NC = logits_NC.astype(np.float64)
    shifted_NC -= shifted_NC.max(axis=1, keepdims=True, initial=-np.inf)
    log_probs_NC: npt.NDArray[np.float64] = shifted_NC - np.log(
        np.exp(shifted_NC).sum(axis=1, keepdims=True)
    )
    return log_probs_NC


def log_loss(logits_NC: Floats, labels_N: Ints) -> float:
    """The mean over examples of minus the log-probability (natural) of the true label."""
    return 0.0 - float(log_softmax(logits_NC)[np.arange(len(labels_N)), labels_N].mean())


def fit_temperature(logits_NC: Floats, labels_N: Ints) -> float:
    """What to divide logits by so that the true labels are as likely as can be, 0.05 to 20.

    Golden-section search on the logarithm; the loss has one minimum in it. Where every example is
    labelled right there is none, for the surer the better, and the logits stay as they are: 1.

    Args:
        logits_NC: at least one example.
        labels_N: positions of the true labels.
    """

    def loss(log_temperature: float) -> float:
        return log_loss(logits_NC.astype(np.float64) / math.exp(log_temperature), labels_N)

    if (logits_NC.argmax(axis=1) == labels_N).all():
        return 1.0
    golden = (math.sqrt(5) - 1) / 2
    low, high = (math.log(bound) for bound in _TEMPERATURES)
    for _ in range(_TEMPERATURE_STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def reliability_bins(
    scores_N: Floats, correct_N: npt.NDArray[np.bool_], num_bins: int = NUM_BINS
) -> tuple[Bin, ...]:
    """Examples by score, in bins of equal width from 0 to 1; a score of 0 is in the first.

    Args:
        scores_N: probability of the label that was chosen.
        correct_N: whether that label is the true one.
        num_bins: how many.
    """
    edges = np.arange(num_bins + 1) / num_bins
    places_N = np.clip(np.searchsorted(edges, scores_N, side="left") - 1, 0, num_bins - 1)
    counts = np.bincount(places_N, minlength=num_bins)
    score_sums = np.bincount(places_N, weights=scores_N, minlength=num_bins)
    right_sums = np.bincount(places_N, weights=correct_N, minlength=num_bins)
    return tuple(
        Bin(
            lower=float(edges[place]),
            upper=float(edges[place + 1]),
            count=(count := int(counts[place])),
            mean_score=float(score_sums[place] / count) if count else None,
            accuracy=float(right_sums[place] / count) if count else None,
        )
        for place in range(num_bins)
    )


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """The mean over examples of how far their bin's mean score lies from its accuracy, 0 to 1."""
    total = sum(each.count for each in bins)
    gaps = (
        each.count * abs(each.mean_score - each.accuracy)
        for each in bins
        if each.mean_score is not None and each.accuracy is not None
    )
    return sum(gaps) / max(total, 1)
