"""What does not fit is halved, memory stays as it was, and nothing waits for the device."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import models
import numpy as np
import pytest
import torch
from gpu.conftest import CUDA, Joined, NewEngine, ignore, joined, made_up

from batchclf.compute import Compute
from batchclf.engine import Engine

if TYPE_CHECKING:
    from batchclf.model import GPT2Classifier

MIB = 1 << 20
SHAPE = {"n_positions": 1024, "n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 500}


def leave_room_for(size_bytes: int) -> None:
    """From now on the device has no more than this beside what is taken already."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    fraction = (torch.cuda.memory_reserved(CUDA) + size_bytes) / total
    torch.cuda.set_per_process_memory_fraction(fraction, CUDA)


def model() -> GPT2Classifier:
    return models.our_model(models.random_hf_model(pad_token_id=0, **SHAPE)).to(CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_that_do_not_fit_are_halved_with_the_same_logits(dtype: torch.dtype) -> None:
    engine = Engine(model().to(dtype), Compute(CUDA, dtype), 65536)
    batch = joined(made_up([128] * 512, 500))
    expected = engine.predict(*batch, ignore).logits_NC
    leave_room_for(64 * MIB)
    found = engine.predict(*batch, ignore)
    assert not found.failed_N.any()
    assert engine.max_batch_tokens < 65536
    np.testing.assert_allclose(
        found.logits_NC,
        expected,
        atol=1e-3 if dtype == torch.float32 else 0.05 * np.abs(expected).max(),
    )


def test_a_row_that_does_not_fit_alone_is_marked_and_the_others_are_labelled() -> None:
    engine = Engine(model(), Compute(CUDA, torch.float32), 4096)
    texts = made_up([1024, 4, 4, 4], 500)
    expected = engine.predict(*joined(texts), ignore).logits_NC
    # Anything of a mebibyte or more takes 20 from the device; the smaller ones take 2 together.
    leave_room_for(8 * MIB)
    found = engine.predict(*joined(texts), ignore)
    assert found.failed_N.tolist() == [True, False, False, False]
    np.testing.assert_allclose(found.logits_NC[1:], expected[1:], atol=1e-4)


def test_memory_is_flat_over_many_windows(new_engine: NewEngine) -> None:
    engine = new_engine(torch.bfloat16, 8192)
    reserved = []
    for seed in range(24):
        lengths = np.random.default_rng(seed).integers(1, 128, 2000).tolist()
        engine.predict(*joined(made_up(lengths, 400, seed)), ignore)
        reserved.append(torch.cuda.memory_reserved(CUDA))
    assert max(reserved[8:]) <= 1.25 * max(reserved[:8])
    before = torch.cuda.memory_allocated(CUDA)
    engine.predict(*joined(made_up([100] * 500, 400)), ignore)
    assert torch.cuda.memory_allocated(CUDA) == before


@pytest.mark.parametrize("way", ["varlen", "padded"])
def test_no_batch_waits_for_the_device(way: str, new_engine: NewEngine, sample: Joined) -> None:
    engine = new_engine(torch.bfloat16, 4096, way)
    expected = engine.predict(*sample, ignore).logits_NC  # kernels are loaded, tables worked out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    told = []
    found = engine.predict(*sample, lambda *counts: told.append(counts))
    torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(found.logits_NC, expected)
    assert len(told) > 1
    assert sum(rows for rows, _ in told) == len(expected)


def test_a_callback_may_stop_the_work_and_the_next_one_is_right(
    new_engine: NewEngine, sample: Joined
) -> None:
    engine = new_engine(torch.bfloat16, 4096)
    expected = engine.predict(*sample, ignore).logits_NC

    def stop(num_rows: int, num_tokens: int) -> None:
        raise InterruptedError

    for _ in range(3):
        with pytest.raises(InterruptedError):
            engine.predict(*sample, stop)
    np.testing.assert_array_equal(engine.predict(*sample, ignore).logits_NC, expected)


def test_one_window_may_be_prepared_while_another_is_computed(
    new_engine: NewEngine, sample: Joined
) -> None:
    engine = new_engine(torch.bfloat16, 4096)
    expected = engine.predict(*sample, ignore).logits_NC
    prepared = [engine.prepare(*sample) for _ in range(4)]
    for each in prepared:
        found = engine.predict_prepared(each, ignore).logits_NC
        np.testing.assert_array_equal(found, expected)
