"""Packed weights change the time that a forward pass takes, not what comes out."""

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st

from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig
from batchclf.packed import _few_tokens, pack

LONGEST = 48


def random_model(**wanted: object) -> GPT2Classifier:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50,
        "max_positions": LONGEST,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "inner_size": 64,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    model = GPT2Classifier(ModelConfig(**{**shape, **wanted}))  # type: ignore[arg-type]
    model.init_weights(std=0.3)
    return model.eval()


LAST_TOKEN = random_model()
FLATTEN = random_model(head="flatten", head_length=LONGEST)
PACKED = {id(model): pack(copy.deepcopy(model)) for model in (LAST_TOKEN, FLATTEN)}

batches = st.lists(st.integers(1, LONGEST), min_size=1, max_size=9)


def logits(model: GPT2Classifier, lengths: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    with torch.inference_mode():
        return model(ids, torch.tensor(lengths))


@pytest.mark.parametrize("model", [LAST_TOKEN, FLATTEN], ids=["last_token", "flatten"])
@given(lengths=batches)
@settings(max_examples=30)
def test_packed_weights_give_the_same_logits(model: GPT2Classifier, lengths: list[int]) -> None:
    torch.testing.assert_close(
        logits(PACKED[id(model)], lengths), logits(model, lengths), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
def test_every_activation_is_what_the_model_asks_for(activation: str) -> None:
    model = random_model(activation=activation)
    wanted = logits(model, [5, 40, 17])
    torch.testing.assert_close(logits(pack(model), [5, 40, 17]), wanted, atol=1e-5, rtol=1e-5)


def test_few_tokens_have_the_logits_of_packed_weights() -> None:
    few, many = [5], [5, *[40] * 7]
    together = logits(PACKED[id(LAST_TOKEN)], many)
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(len(many))
        ids = torch.randint(1, 50, (len(many), max(many)), generator=generator)
        alone = PACKED[id(LAST_TOKEN)](ids[:1, :5], torch.tensor(few))
    torch.testing.assert_close(alone, together[:1], atol=1e-5, rtol=1e-5)


def test_only_a_small_float32_model_multiplies_few_tokens_without_packed_weights() -> None:
    small, half = random_model(), random_model()
    half.transformer.to(torch.bfloat16)
    large = random_model(hidden_size=512, inner_size=1024)
    assert [_few_tokens(model) > 0 for model in (small, half, large)] == [True, False, False]


def test_attention_scales_are_those_of_the_model() -> None:
    model = random_model(scale_attn_by_inverse_layer_idx=True)
    wanted = logits(model, [9, 30])
    torch.testing.assert_close(logits(pack(model), [9, 30]), wanted, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_packed_weights_are_no_further_from_float32() -> None:
    lengths = [5, 40, 17, 48, 1]
    exact = logits(LAST_TOKEN, lengths)
    plain = copy.deepcopy(LAST_TOKEN)
    plain.transformer.to(torch.bfloat16)
    error = (logits(plain, lengths) - exact).abs().max()
    packed_error = (logits(pack(plain), lengths) - exact).abs().max()
    assert packed_error <= 1.5 * error


def test_where_nothing_can_be_packed_the_model_stays_as_it_is() -> None:
    model = random_model()
    model.transformer.to(torch.float16)
    before = model.transformer
    assert pack(model).transformer is before
