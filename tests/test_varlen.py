"""Texts end to end give the logits that they give one by one, whichever attention is used."""

# ruff: noqa: N803 - names of tensors end in their shape, in capitals

import itertools
from collections.abc import Sequence
from typing import Any

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from batchclf.model import GPT2Classifier
from batchclf.varlen import Attention, Batch, PaddedAttention, VarlenClassifier, lay_out

SHAPE = {"n_positions": 24, "n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50}
LONGEST = 12  # that both heads read


class ReferenceVarlen:
    """What `varlen_attn` is documented to compute, text by text."""

    name = "reference"
    pads = False

    def all_tokens(
        self, query_MND: Tensor, key_MND: Tensor, value_MND: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        borders = batch.starts_B1.tolist()
        parts = [
            F.scaled_dot_product_attention(
                *(each[a:b].transpose(0, 1) for each in (query_MND, key_MND, value_MND)),
                is_causal=True,
                scale=scale,
            ).transpose(0, 1)
            for a, b in itertools.pairwise(borders)
        ]
        return torch.cat(parts)

    def last_tokens(
        self, query_BND: Tensor, key_MND: Tensor, value_MND: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        borders = batch.starts_B1.tolist()
        parts = [
            F.scaled_dot_product_attention(
                query_BND[row : row + 1].transpose(0, 1),
                *(each[a:b].transpose(0, 1) for each in (key_MND, value_MND)),
                scale=scale,
            ).transpose(0, 1)
            for row, (a, b) in enumerate(itertools.pairwise(borders))
        ]
        return torch.cat(parts)


def last_token_model() -> GPT2Classifier:
    config = {"pad_token_id": 0, "scale_attn_by_inverse_layer_idx": True}
    return models.our_model(models.random_hf_model(**SHAPE, **config))


def flatten_model() -> GPT2Classifier:
    reference = models.random_flatten_reference(max_seq_len=LONGEST, **SHAPE)
    return models.our_flatten_model(reference, pad=0)


MODELS = {"last_token": last_token_model(), "flatten": flatten_model()}
ATTENTIONS: list[Attention] = [PaddedAttention(), ReferenceVarlen()]


def batch_of(texts: Sequence[Sequence[int]], attention: Attention) -> Batch:
    """Texts out of a run in which others stand before and behind them."""
    lengths = [len(text) for text in texts]
    ids = torch.tensor([7, 7, *(token for text in texts for token in text)], dtype=torch.int32)
    starts = 2 + np.concatenate(([0], np.cumsum(lengths)[:-1]))
    longest = max(lengths)
    return lay_out(
        ids,
        torch.from_numpy(starts),
        torch.tensor(lengths),
        num_tokens=len(texts) * longest if attention.pads else sum(lengths),
        longest=longest,
        pad=attention.pads,
    )


def alone(model: GPT2Classifier, texts: Sequence[Sequence[int]]) -> Tensor:
    with torch.inference_mode():
        logits = [model(torch.tensor([text]), torch.tensor([len(text)]))[0] for text in texts]
    return torch.stack(logits)


texts_lists = st.lists(
    st.lists(st.integers(0, 49), min_size=1, max_size=LONGEST), min_size=1, max_size=6
)


@pytest.mark.parametrize("head", MODELS)
@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda each: each.name)
@given(texts=texts_lists)
@settings(max_examples=30)
def test_texts_end_to_end_have_the_logits_of_texts_alone(
    attention: Attention, head: str, texts: list[list[int]]
) -> None:
    model = MODELS[head]
    found = VarlenClassifier(model, attention)(batch_of(texts, attention))
    torch.testing.assert_close(found, alone(model, texts), atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", MODELS)
def test_one_layer_is_enough(head: str) -> None:
    one = {**SHAPE, "n_layer": 1}
    model = (
        models.our_model(models.random_hf_model(**one, pad_token_id=0))
        if head == "last_token"
        else models.our_flatten_model(
            models.random_flatten_reference(max_seq_len=LONGEST, **one), pad=0
        )
    )
    texts = [[1, 2, 3], [4]]
    attention = ReferenceVarlen()
    found = VarlenClassifier(model, attention)(batch_of(texts, attention))
    torch.testing.assert_close(found, alone(model, texts), atol=1e-4, rtol=0)


@given(texts=texts_lists)
@settings(max_examples=30)
def test_without_padding_every_token_is_one_of_a_text(texts: list[list[int]]) -> None:
    batch = batch_of(texts, ReferenceVarlen())
    assert batch.ids_M.tolist() == [token for text in texts for token in text]
    assert batch.columns_M.tolist() == [place for text in texts for place in range(len(text))]
    assert batch.ids_M[batch.last_B].tolist() == [text[-1] for text in texts]
    assert batch.starts_B1.dtype == torch.int32  # FlashAttention reads no other


@pytest.mark.parametrize("head", MODELS)
def test_one_graph_serves_all_numbers_of_tokens(head: str) -> None:
    torch._dynamo.reset()
    shapes: list[tuple[int, ...]] = []

    def count(graph: Any, inputs: Sequence[Any]) -> Any:
        shapes.append(tuple(len(i) if isinstance(i, Tensor) else -1 for i in inputs))
        return graph.forward

    model, attention = MODELS[head], ReferenceVarlen()
    classifier = VarlenClassifier(model, attention, backend=count)
    compiled = []
    for num_texts in (3, 5, 1, 2, 6):
        texts = [[row + 1, 2, 3, 4][: row + 2] for row in range(num_texts)]
        found = classifier(batch_of(texts, attention))
        torch.testing.assert_close(found, alone(model, texts), atol=1e-4, rtol=0)
        compiled.append(len(shapes))
    assert compiled[0] == compiled[-1] <= 5
