"""Batches that are launched ahead of each other; on a CPU, where each is done at once."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_engine import CPU, MODEL, PAD, alone, ignore, joined, texts_lists
from test_varlen import ReferenceVarlen
from torch import Tensor

from batchclf.engine import Engine
from batchclf.lane import COMPILED, Lane
from batchclf.varlen import Batch, VarlenClassifier

WAYS = ["padded", "reference"]


class SmallMemory:
    """A way to compute on a device that has room for so many tokens."""

    is_compiled = False

    def __init__(self, way: VarlenClassifier, most_tokens: int) -> None:
        self.attention = way.attention
        self.most_tokens = most_tokens
        self.num_tokens: list[int] = []
        self._way = way

    def __call__(self, batch: Batch) -> Tensor:
        if len(batch.ids_M) > self.most_tokens:
            raise torch.OutOfMemoryError
        self.num_tokens.append(len(batch.ids_M))
        return self._way(batch)


def lane_of(way: str, most_tokens: int | None = None, backend: Any = "eager") -> Lane:
    lane = Lane(MODEL, backend)
    lane._attentions["reference"] = ReferenceVarlen()
    lane.use(way)
    if most_tokens is not None:
        lane._classifier = SmallMemory(lane._classifier, most_tokens)  # type: ignore[assignment]
    return lane


@pytest.mark.parametrize("way", WAYS)
@given(texts=texts_lists, budget=st.integers(1, 200))
@settings(max_examples=30)
def test_logits_stand_in_the_order_of_the_examples_whatever_the_budget(
    way: str, texts: list[list[int]], budget: int
) -> None:
    told: list[tuple[int, int]] = []
    engine = Engine(MODEL, CPU, budget, lane=lane_of(way))
    found = engine.predict(*joined(texts), lambda *counts: told.append(counts))
    np.testing.assert_allclose(found.logits_NC, alone(MODEL, texts), atol=1e-5)
    assert not found.failed_N.any()
    assert np.sum(told, axis=0).tolist() == [len(texts), sum(map(len, texts))]


@pytest.mark.parametrize("way", WAYS)
@given(texts=texts_lists, room=st.integers(1, 60))
@settings(max_examples=30)
def test_what_does_not_fit_is_halved_down_to_a_row_which_is_marked(
    way: str, texts: list[list[int]], room: int
) -> None:
    found = Engine(MODEL, CPU, 200, lane=lane_of(way, room)).predict(*joined(texts), ignore)
    fits = np.array([len(text) <= room for text in texts])
    assert (found.failed_N == ~fits).all()
    np.testing.assert_allclose(found.logits_NC[fits], alone(MODEL, texts)[fits], atol=1e-5)
    assert not found.logits_NC[~fits].any()


@pytest.mark.parametrize("way", WAYS)
def test_the_budget_that_fits_is_remembered(way: str) -> None:
    engine = Engine(MODEL, CPU, 128, lane=lane_of(way, 40))
    engine.predict(*joined([[row + 1] * 8 for row in range(16)]), ignore)
    assert engine.max_batch_tokens <= 64


def test_end_to_end_texts_are_not_padded_and_repeats_are_computed_once() -> None:
    lane = lane_of("reference", 1000)
    texts = [[1, 2, 3], [4], [1, 2, 3], [5, PAD]]
    found = Engine(MODEL, CPU, 100, lane=lane).predict(*joined(texts), ignore)
    assert (found.num_distinct, found.num_padded_tokens) == (3, 3 + 1 + 1)
    np.testing.assert_array_equal(found.logits_NC[0], found.logits_NC[2])


def test_no_examples_give_no_logits() -> None:
    found = Engine(MODEL, CPU, lane=lane_of("padded")).predict(*joined([]), ignore)
    assert found.logits_NC.shape == (0, 3)


def test_one_call_may_be_prepared_while_another_is_computed() -> None:
    engine = Engine(MODEL, CPU, 20, lane=lane_of("reference"))
    first, second = [[1, 2, 3], [4, 5]], [[6], [7, 8]]
    prepared = [engine.prepare(*joined(texts)) for texts in (first, second)]
    found = [engine.predict_prepared(each, ignore).logits_NC for each in prepared]
    np.testing.assert_allclose(found[0], alone(MODEL, first), atol=1e-5)
    np.testing.assert_allclose(found[1], alone(MODEL, second), atol=1e-5)


def test_where_nothing_can_be_compiled_operations_run_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch._dynamo.reset()

    def broken(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no compiler here")

    lane = lane_of("reference" + COMPILED, backend=broken)
    texts = [[1, 2, 3], [4, 5]]
    with caplog.at_level(logging.WARNING):
        found = Engine(MODEL, CPU, lane=lane).predict(*joined(texts), ignore)
    np.testing.assert_allclose(found.logits_NC, alone(MODEL, texts), atol=1e-5)
    assert "no compiler here" in caplog.text
    assert lane.way == "reference"
