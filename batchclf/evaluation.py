"""How good predictions are, as plain numbers. Pure.

Shape suffixes: N examples, C labels.
"""
# ruff: noqa: N803, N806 - names of arrays end in their shape, in capitals

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchclf.calibration import (
    Bin,
    Floats,
    Ints,
    expected_calibration_error,
    log_loss,
    log_softmax,
    reliability_bins,
)

MIN_SCORES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
MOST_MISTAKES = 20
_CURVE_POINTS = 100
_MOST_TEXT = 400  # characters of an article that are shown
# Control characters, and those that turn the direction of all that follows.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class LabelMeasures:
    """How one label fares; a ratio with nothing below its line is 0.

    Attributes:
        precision: of the examples that were given this label, the share that has it.
        recall: of the examples that have it, the share that was given it.
        f1: the harmonic mean of the two.
        support: examples that have it.
        num_predicted: examples that were given it.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    num_predicted: int


@dataclass(frozen=True)
class Coverage:
    """What `--min-score` leaves: the examples with at least this score.

    Attributes:
        accuracy: of those that are kept, None where none are.
    """

    min_score: float
    num_kept: int
    share_kept: float
    accuracy: float | None


@dataclass(frozen=True)
class Agreement:
    """How far predictions agree with true labels, as far as labels and scores tell.

    Attributes:
        macro_f1: the mean of F1 over labels that are present or predicted, as scikit-learn has it.
        ece: expected calibration error, 0 to 1.
        per_label: in the order of the labels.
        confusion: counts, a row for each true label and a column for each predicted one.
        risk_coverage: at round values of `--min-score`.
        coverage_curve: the same at many scores, for drawing.
    """

    labels: tuple[str, ...]
    num_examples: int
    accuracy: float
    macro_f1: float
    ece: float
    per_label: tuple[LabelMeasures, ...]
    confusion: tuple[tuple[int, ...], ...]
    reliability: tuple[Bin, ...]
    risk_coverage: tuple[Coverage, ...]
    coverage_curve: tuple[Coverage, ...]

    def confusions(self) -> list[tuple[str, str, int]]:
        """True label, predicted label and count of all that was confused, most frequent first."""
        found = [
            (true, predicted, count)
            for true, row in zip(self.labels, self.confusion, strict=True)
            for predicted, count in zip(self.labels, row, strict=True)
            if count and true != predicted
        ]
        return sorted(found, key=lambda each: -each[2])


@dataclass(frozen=True)
class Measures(Agreement):
    """What `measure` found; "before" is as if the temperature were 1.

    Attributes:
        log_loss: minus the mean log-probability (natural) of the true labels.
    """

    temperature: float
    log_loss: float
    log_loss_before: float
    ece_before: float
    reliability_before: tuple[Bin, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON takes it."""
        names = {
            "log_loss_before": "log_loss_before_temperature",
            "ece_before": "ece_before_temperature",
            "reliability_before": "reliability_before_temperature",
        }
        return {names.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Mistake:
    """An example that was given a wrong label, and how sure the model was of it.

    Attributes:
        place: where it stands: `news.csv row 12`.
        text: as much of it as a person will read.
    """

    place: str
    text: str
    label: str
    predicted: str
    score: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", shorten(self.text, _MOST_TEXT))


def measure(
    logits_NC: Floats, labels_N: Ints, label_names: Sequence[str], temperature: float = 1.0
) -> Measures:
    """Compare logits with the true labels.

    Args:
        logits_NC: as the model gives them, not yet divided by the temperature; N at least 1.
        labels_N: positions of the true labels.
        label_names: in the order of the logits.
        temperature: that of the model.
    """
    num_labels = logits_NC.shape[1]
    predicted_N = logits_NC.argmax(axis=1)
    correct_N = predicted_N == labels_N
    confusion_CC = np.bincount(
        np.asarray(labels_N, np.int64) * num_labels + predicted_N, minlength=num_labels**2
    ).reshape(num_labels, num_labels)
    scaled_NC = logits_NC.astype(np.float64) / temperature
    scores_N = top_scores(scaled_NC)
    reliability_before = reliability_bins(top_scores(logits_NC), correct_N)
    quantiles = np.quantile(scores_N, np.linspace(0, 1, _CURVE_POINTS), method="lower")
    agreement = agree(
        confusion_CC,
        label_names,
        reliability=reliability_bins(scores_N, correct_N),
        risk_coverage=_coverage(scores_N, correct_N, MIN_SCORES),
        coverage_curve=_coverage(scores_N, correct_N, np.unique(quantiles).tolist()),
    )
    return Measures(
        **vars(agreement),
        temperature=temperature,
        log_loss=log_loss(scaled_NC, labels_N),
        log_loss_before=log_loss(logits_NC, labels_N),
        ece_before=expected_calibration_error(reliability_before),
        reliability_before=reliability_before,
    )


def agree(
    confusion_CC: npt.NDArray[np.int64],
    label_names: Sequence[str],
    *,
    reliability: Sequence[Bin],
    risk_coverage: Iterable[Coverage],
    coverage_curve: Iterable[Coverage],
) -> Agreement:
    """What follows from a confusion matrix and what was counted by score.

    Args:
        confusion_CC: examples by true label (rows) and predicted label, at least one.
        label_names: in the order of both.
        reliability: as from `reliability_bins`.
        risk_coverage: at round values of `--min-score`.
        coverage_curve: at many scores.
    """
    num_examples = int(confusion_CC.sum())
    per_label = tuple(_per_label(confusion_CC, label_names))
    used = [each.f1 for each in per_label if each.support or each.num_predicted]
    return Agreement(
        labels=tuple(label_names),
        num_examples=num_examples,
        accuracy=int(confusion_CC.trace()) / num_examples,
        macro_f1=sum(used) / len(used),
        ece=expected_calibration_error(reliability),
        per_label=per_label,
        confusion=tuple(tuple(row) for row in confusion_CC.tolist()),
        reliability=tuple(reliability),
        risk_coverage=tuple(risk_coverage),
        coverage_curve=tuple(coverage_curve),
    )


def top_scores(logits_NC: Floats) -> npt.NDArray[np.float64]:
    """The probability [N] of the likeliest label."""
    scores_N: npt.NDArray[np.float64] = np.exp(log_softmax(logits_NC).max(axis=1))
    return scores_N


def confident_mistakes(logits_NC: Floats, labels_N: Ints, most: int = MOST_MISTAKES) -> list[int]:
    """Positions of the wrong predictions with the highest scores, the highest first.

    Among equal scores the first example comes first. One temperature for all does not change the
    order of two labels, but does that of more: divide the logits by it.
    """
    wrong = np.flatnonzero(logits_NC.argmax(axis=1) != labels_N)
    order = np.argsort(-top_scores(logits_NC[wrong]), kind="stable")
    return [int(row) for row in wrong[order[:most]]]


def shorten(text: str, most: int) -> str:
    """A text on one line, cut after `most` characters, with an ellipsis where it goes on.

    Control characters, which XML cannot hold or which would turn the line around, become U+FFFD.
    """
    line = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", " ".join(text[: 8 * most].split()))
    goes_on = len(line) > most or len(text) > 8 * most
    return line[:most].rstrip() + " …" if goes_on else line


def _per_label(
    confusion_CC: npt.NDArray[np.int64], label_names: Sequence[str]
) -> Iterator[LabelMeasures]:
    hits_C = confusion_CC.diagonal().tolist()
    supports_C = confusion_CC.sum(axis=1).tolist()
    predicted_C = confusion_CC.sum(axis=0).tolist()
    for label, hits, support, num_predicted in zip(
        label_names, hits_C, supports_C, predicted_C, strict=True
    ):
        yield LabelMeasures(
            label=label,
            precision=hits / max(num_predicted, 1),
            recall=hits / max(support, 1),
            f1=2 * hits / max(support + num_predicted, 1),
            support=support,
            num_predicted=num_predicted,
        )


def _coverage(
    scores_N: Floats, correct_N: npt.NDArray[np.bool_], min_scores: Iterable[float]
) -> Iterator[Coverage]:
    order = np.argsort(-scores_N, kind="stable")
    descending_N = scores_N[order]
    num_right = np.concatenate(([0], np.cumsum(correct_N[order])))
    for min_score in min_scores:
        kept = int(np.searchsorted(-descending_N, -min_score, side="right"))
        yield Coverage(
            min_score=float(min_score),
            num_kept=kept,
            share_kept=kept / len(scores_N),
            accuracy=float(num_right[kept] / kept) if kept else None,
        )
