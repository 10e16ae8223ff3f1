"""The device says what transformers and the CPU say, in every way that it can compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import models
import numpy as np
import pytest
import torch
from gpu.conftest import CUDA, Joined, NewEngine, ignore, joined, made_up

from batchclf.compute import Compute
from batchclf.engine import Engine
from batchclf.lane import COMPILED, Lane
from batchclf.predictions import softmax
from batchclf.token_budget import choose_way

if TYPE_CHECKING:
    import numpy.typing as npt

    from batchclf.checkpoint import Checkpoint
    from batchclf.model import GPT2Classifier

FLOAT32 = Compute(CUDA, torch.float32)
SHAPE = {"n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 500}
LENGTHS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 128, 128, 7, 64, 63, 65, 100, 1, 127]
PLAIN, COMPILING = ["padded"], ["padded" + COMPILED]
HALF_WAYS = ["varlen", "padded", "varlen" + COMPILED, "padded" + COMPILED]


def on_device(model: GPT2Classifier, way: str) -> Lane:
    lane = Lane(model.to(CUDA).eval())
    lane.use(way)
    return lane


@pytest.mark.parametrize("way", PLAIN + COMPILING)
def test_float32_logits_are_those_of_transformers(way: str) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    theirs = models.random_hf_model(pad_token_id=0, **SHAPE)
    texts = made_up(LENGTHS, 500)
    with torch.inference_mode():
        expected = torch.cat([theirs(torch.tensor([text])).logits for text in texts])
    model = models.our_model(theirs)
    found = Engine(model, FLOAT32, 512, lane=on_device(model, way)).predict(*joined(texts), ignore)
    np.testing.assert_allclose(found.logits_NC, expected.numpy(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("way", PLAIN + COMPILING)
def test_float32_logits_of_the_flatten_head_are_the_original_s(way: str) -> None:
    reference = models.random_flatten_reference(max_seq_len=128, **SHAPE)
    texts = made_up(LENGTHS, 500)
    ids, mask = models.pad_left([torch.tensor(text) for text in texts], 128, pad=0)
    with torch.inference_mode():
        expected = reference(ids, mask)
    model = models.our_flatten_model(reference, pad=0)
    found = Engine(model, FLOAT32, 512, lane=on_device(model, way)).predict(*joined(texts), ignore)
    np.testing.assert_allclose(found.logits_NC, expected.numpy(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", HALF_WAYS)
def test_half_precision_gives_the_labels_of_float32(
    way: str,
    dtype: torch.dtype,
    new_engine: NewEngine,
    sample: Joined,
    cpu_logits: npt.NDArray[np.float32],
) -> None:
    engine = new_engine(dtype, 16384, way)
    found = engine.predict(*sample, ignore)
    assert engine.lane is not None
    assert engine.lane.way == way  # it compiled, if it was to
    differing = np.flatnonzero(found.logits_NC.argmax(1) != cpu_logits.argmax(1))
    assert len(differing) <= max(1, len(cpu_logits) // 1000)
    assert np.abs(softmax(found.logits_NC) - softmax(cpu_logits)).mean() < 0.005
    assert not found.failed_N.any()


@pytest.mark.parametrize("head", ["last_token", "flatten"])
def test_varlen_and_padded_attention_agree(head: str) -> None:
    if head == "flatten":
        reference = models.random_flatten_reference(max_seq_len=128, **SHAPE)
        model = models.our_flatten_model(reference, pad=0)
    else:
        model = models.our_model(models.random_hf_model(pad_token_id=0, **SHAPE))
    texts = made_up(LENGTHS, 500)
    compute = Compute(CUDA, torch.bfloat16)
    half = model.to(torch.bfloat16)
    found = [
        Engine(half, compute, 512, lane=on_device(half, way)).predict(*joined(texts), ignore)
        for way in ("varlen", "padded")
    ]
    scale = np.abs(found[1].logits_NC).max()
    difference = np.abs(found[0].logits_NC - found[1].logits_NC).max()
    assert difference <= 0.05 * scale
    assert found[0].num_padded_tokens == sum(LENGTHS)  # no padding at all


@pytest.mark.parametrize("way", PLAIN + COMPILING)
def test_a_row_s_float32_logits_do_not_depend_on_its_batch(way: str, new_engine: NewEngine) -> None:
    texts = made_up(LENGTHS, 400)
    together = new_engine(torch.float32, 2048, way).predict(*joined(texts), ignore).logits_NC
    one_by_one = new_engine(torch.float32, 1, way).predict(*joined(texts), ignore).logits_NC
    np.testing.assert_allclose(together, one_by_one, atol=1e-4)


@pytest.mark.parametrize("way", HALF_WAYS)
def test_a_row_s_bfloat16_probabilities_hardly_depend_on_its_batch(
    way: str, new_engine: NewEngine, sample: Joined
) -> None:
    found = [
        softmax(new_engine(torch.bfloat16, budget, way).predict(*sample, ignore).logits_NC)
        for budget in (32768, 4096)
    ]
    assert np.abs(found[0] - found[1]).max() < 0.05


def test_few_graphs_are_compiled_for_all_numbers_of_tokens(new_engine: NewEngine) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    engine = new_engine(torch.bfloat16, 1000, "varlen" + COMPILED)
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(2, 100, 200 + seed).tolist()
        engine.predict(*joined(made_up(lengths, 400, seed)), ignore)
    assert 1 <= counters["stats"]["unique_graphs"] <= 5


def test_a_long_job_finds_its_way_by_measuring(
    new_engine: NewEngine, checkpoint: Checkpoint, sample: Joined
) -> None:
    engine = new_engine(torch.bfloat16)
    choose_way(engine, checkpoint.config, 128, 10**12)
    assert engine.lane is not None
    assert engine.lane.way in engine.lane.ways
    assert not engine.predict(*sample, ignore).failed_N.any()
