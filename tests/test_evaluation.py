"""Measures, against plain slow versions of their definitions."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as npst

from batchclf.evaluation import (
    MIN_SCORES,
    Measures,
    Mistake,
    confident_mistakes,
    measure,
    top_scores,
)

Given = tuple[Any, Any]


def logits_and_labels() -> st.SearchStrategy[Given]:
    shapes = st.tuples(st.integers(1, 50), st.integers(2, 6))

    def labelled(shape: tuple[int, int]) -> st.SearchStrategy[Given]:
        return st.tuples(
            npst.arrays(np.float64, shape, elements=st.floats(-20, 20)),
            npst.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)),
        )

    return shapes.flatmap(labelled)


def names(logits: Any) -> list[str]:
    return [f"label {index}" for index in range(logits.shape[1])]


def measured(given: Given, temperature: float = 1.0) -> Measures:
    return measure(*given, names(given[0]), temperature)


def pairs(given: Given) -> list[tuple[int, int]]:
    """True and predicted label of each example."""
    return list(zip(given[1].tolist(), given[0].argmax(axis=1).tolist(), strict=True))


@given(logits_and_labels())
def test_accuracy_is_the_share_of_right_predictions(given: Given) -> None:
    expected = sum(true == predicted for true, predicted in pairs(given)) / len(given[1])
    assert measured(given).accuracy == pytest.approx(expected)


@given(logits_and_labels())
def test_the_confusion_matrix_counts_true_labels_by_row(given: Given) -> None:
    found = measured(given).confusion
    for true, row in enumerate(found):
        for predicted, count in enumerate(row):
            assert count == pairs(given).count((true, predicted))


@given(logits_and_labels())
def test_each_label_has_its_precision_recall_and_f1(given: Given) -> None:
    for label, found in enumerate(measured(given).per_label):
        hits = sum(true == predicted == label for true, predicted in pairs(given))
        given_it = sum(predicted == label for _, predicted in pairs(given))
        have_it = sum(true == label for true, _ in pairs(given))
        precision, recall = hits / given_it if given_it else 0, hits / have_it if have_it else 0
        both = precision + recall
        assert found.precision == pytest.approx(precision)
        assert found.recall == pytest.approx(recall)
        assert found.f1 == pytest.approx(2 * precision * recall / both if both else 0)
        assert (found.support, found.num_predicted) == (have_it, given_it)


@given(logits_and_labels())
def test_macro_f1_is_the_mean_over_labels_that_occur(given: Given) -> None:
    """As `sklearn.metrics.f1_score(average="macro")` has it."""
    occurring = {label for pair in pairs(given) for label in pair}
    found = measured(given)
    expected = sum(found.per_label[label].f1 for label in occurring) / len(occurring)
    assert found.macro_f1 == pytest.approx(expected)


@given(logits_and_labels(), st.sampled_from([0.5, 1.0, 2.0]))
def test_coverage_says_what_a_min_score_keeps(given: Given, temperature: float) -> None:
    logits, labels = given
    scores = top_scores(logits / temperature)
    right = logits.argmax(axis=1) == labels
    for each in measured(given, temperature).risk_coverage:
        kept = [bool(good) for good, s in zip(right, scores, strict=True) if s >= each.min_score]
        assert each.num_kept == len(kept)
        assert each.share_kept == pytest.approx(len(kept) / len(labels))
        assert each.accuracy == (pytest.approx(sum(kept) / len(kept)) if kept else None)


@given(logits_and_labels())
def test_coverage_falls_as_the_min_score_rises(given: Given) -> None:
    found = measured(given)
    assert [each.min_score for each in found.risk_coverage] == list(MIN_SCORES)
    for curve in (found.risk_coverage, found.coverage_curve):
        kept = [each.num_kept for each in curve]
        assert kept == sorted(kept, reverse=True)
        assert kept[0] == len(given[1])


@given(logits_and_labels(), st.sampled_from([0.5, 2.0]))
def test_a_temperature_changes_no_label(given: Given, temperature: float) -> None:
    cold, warm = measured(given), measured(given, temperature)
    assert (cold.confusion, cold.accuracy) == (warm.confusion, warm.accuracy)
    assert (warm.ece_before, warm.log_loss_before) == (cold.ece, cold.log_loss)


@given(logits_and_labels())
def test_mistakes_come_with_the_surest_first(given: Given) -> None:
    found = confident_mistakes(*given, most=5)
    wrong = [row for row, (true, predicted) in enumerate(pairs(given)) if true != predicted]
    scores = top_scores(given[0])
    expected = sorted(wrong, key=lambda row: -scores[row])[:5]
    assert found == expected


@given(logits_and_labels())
def test_confusions_are_all_that_was_confused(given: Given) -> None:
    found = measured(given).confusions()
    num_wrong = sum(true != predicted for true, predicted in pairs(given))
    assert sum(count for *_, count in found) == num_wrong
    counts = [count for *_, count in found]
    assert counts == sorted(counts, reverse=True)


@given(logits_and_labels())
def test_everything_stands_in_json(given: Given) -> None:
    found = json.loads(json.dumps(measured(given, 2.0).as_dict(), allow_nan=False))
    assert found["ece_before_temperature"] == measured(given, 2.0).ece_before
    assert found["per_label"][0]["label"] == "label 0"


def test_the_text_of_a_mistake_is_cut_to_a_readable_length() -> None:
    mistake = Mistake("news.csv row 1", "many  words\n" * 10_000, "sport", "tech", 0.9)
    assert len(mistake.text) < 410
    assert mistake.text.startswith("many words many words")
    assert mistake.text.endswith(" …")
