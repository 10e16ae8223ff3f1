from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from batchclf.predictions import Predictions, join_predictions, restore, softmax, to_record_batch
from batchclf.schema import output_schema

LABELS = ("a", "b", "c")


def restored(num_tokens: list[int], failed: list[bool], min_score: float = 0.0) -> Predictions:
    """Predictions of rows that have these tokens; those without one have an error."""
    readable = sum(n > 0 for n in num_tokens)
    logits = np.random.default_rng(0).normal(size=(readable, len(LABELS))).astype(np.float32)
    return restore(
        softmax(logits),
        np.array(failed[:readable], np.bool_),
        num_tokens=np.array(num_tokens, np.int32),
        truncated=np.array([n > 2 for n in num_tokens], np.bool_),
        errors={row: "empty_text: no text" for row, n in enumerate(num_tokens) if n == 0},
        min_score=min_score,
    )


rows = st.lists(st.integers(0, 4), min_size=1, max_size=12)
flags = st.lists(st.booleans(), min_size=12, max_size=12)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 5), st.integers(1, 6)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
def test_probabilities_sum_to_one_and_keep_the_order_of_the_logits(
    logits: npt.NDArray[np.float32],
) -> None:
    probs = softmax(logits)
    assert probs.dtype == np.float32
    assert probs.sum(axis=1) == pytest.approx(1)
    order = np.argsort(logits, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(probs, order, axis=1), axis=1) >= 0).all()


@given(rows, flags)
def test_every_row_has_a_label_or_an_error(num_tokens: list[int], failed: list[bool]) -> None:
    predictions = restored(num_tokens, failed)
    for row, label in enumerate(predictions.label):
        assert (label < 0) == (row in predictions.errors)
        assert (predictions.probs[row].sum() == 0) == (label < 0)


@given(rows, flags, st.floats(0, 1))
def test_a_row_abstains_below_the_least_score(
    num_tokens: list[int], failed: list[bool], min_score: float
) -> None:
    predictions = restored(num_tokens, failed, min_score)
    best = predictions.probs.max(axis=1)
    assert (predictions.abstained == ((best < min_score) & (predictions.label >= 0))).all()


@given(rows, flags, st.lists(st.integers(0, 12), max_size=4))
def test_cutting_and_joining_change_nothing(
    num_tokens: list[int], failed: list[bool], cuts: list[int]
) -> None:
    whole = restored(num_tokens, failed)
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    parts = [whole.rows(start, stop) for start, stop in pairwise(places)]
    joined = join_predictions(parts)
    assert joined.errors == whole.errors
    for name in ("label", "probs", "abstained", "num_tokens", "truncated"):
        assert (getattr(joined, name) == getattr(whole, name)).all()


@given(rows, flags, st.booleans())
def test_rows_become_the_declared_columns(
    num_tokens: list[int], failed: list[bool], probs: bool
) -> None:
    predictions = restored(num_tokens, failed)
    kept = pa.record_batch({"id": [str(row) for row in range(len(predictions))]})
    schema = output_schema(kept.schema, LABELS, probs=probs)
    batch = to_record_batch(7, kept, predictions, pa.array(LABELS), schema)
    batch.validate(full=True)
    assert batch.schema == schema
    assert batch["row"].to_pylist() == [7 + row for row in range(len(predictions))]
    for row, content in enumerate(batch.to_pylist()):
        assert (content["label"] is None) == (row in predictions.errors)
        assert content["error"] == predictions.errors.get(row)
