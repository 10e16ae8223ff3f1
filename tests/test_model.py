"""Our forward against transformers' `GPT2ForSequenceClassification` and the original project."""

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    our_flatten_model,
    our_model,
    pad_left,
    pad_right,
    random_flatten_reference,
    random_hf_model,
    random_texts,
)
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from batchclf.errors import CheckpointError
from batchclf.model import ACTIVATIONS, GPT2Classifier
from batchclf.model_config import ACTIVATION_NAMES, ModelConfig

Pair = tuple[Any, GPT2Classifier]  # the reference and ours, of the same weights
LENGTHS = (1, 2, 5, 50, 127, 128, 129, 2000)
SMALL = {
    "vocab_size": 300,
    "n_positions": 1024,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "pad_token_id": 0,
}
PAD = 0


@pytest.fixture(autouse=True, scope="module")
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def small() -> Pair:
    hf = random_hf_model(**SMALL)
    return hf, our_model(hf)


@pytest.fixture(scope="module")
def full_size() -> Pair:
    hf = random_hf_model(pad_token_id=50256)
    return hf, our_model(hf)


@pytest.fixture(scope="module")
def small_flatten() -> Pair:
    reference = random_flatten_reference(**SMALL)
    return reference, our_flatten_model(reference, PAD)


@pytest.fixture(scope="module")
def full_size_flatten() -> Pair:
    reference = random_flatten_reference()
    return reference, our_flatten_model(reference, 50256)


def one_at_a_time(model: GPT2Classifier, texts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(text[None], torch.tensor([len(text)])) for text in texts])


def hf_one_at_a_time(hf: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([hf(text[None]).logits for text in texts])


def hf_padded_right(hf: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    ids, lengths = pad_right(texts, hf.config.pad_token_id)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return hf(ids, attention_mask=mask.long()).logits


def cut_texts(longest: int, vocab_size: int) -> list[torch.Tensor]:
    return [text[:longest] for text in random_texts(LENGTHS, vocab_size)]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    assert theirs.std() > 0.3, "logits near zero compare nothing"
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_texts_one_at_a_time_have_the_logits_of_transformers(small: Pair) -> None:
    hf, model = small
    texts = cut_texts(1024, 300)
    assert_close(one_at_a_time(model, texts), hf_one_at_a_time(hf, texts), atol=1e-4)


def test_a_mixed_batch_has_the_logits_of_transformers_padded_right_with_a_mask(small: Pair) -> None:
    hf, model = small
    texts = cut_texts(1024, 300)
    assert_close(model(*pad_right(texts, PAD)), hf_padded_right(hf, texts), atol=1e-4)


@pytest.mark.slow
def test_a_full_size_model_has_the_logits_of_transformers_one_at_a_time(full_size: Pair) -> None:
    hf, model = full_size
    texts = cut_texts(1024, 50256)
    assert_close(one_at_a_time(model, texts), hf_one_at_a_time(hf, texts), atol=1e-4)


@pytest.mark.slow
def test_a_full_size_model_has_the_logits_of_transformers_in_a_mixed_batch(full_size: Pair) -> None:
    hf, model = full_size
    texts = cut_texts(1024, 50256)
    assert_close(model(*pad_right(texts, 50256)), hf_padded_right(hf, texts), atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "relu"},
        {"activation_function": "silu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"n_inner": 50},
        {"layer_norm_epsilon": 0.1},
        {"n_layer": 1},
        {"num_labels": 2},
    ],
    ids=str,
)
def test_a_variant_of_the_configuration_is_honoured(changes: dict[str, Any]) -> None:
    hf = random_hf_model(**(SMALL | changes))
    texts = random_texts([1, 7, 30], 300)
    assert_close(our_model(hf)(*pad_right(texts, PAD)), hf_padded_right(hf, texts), atol=1e-4)


def test_what_pads_a_row_does_not_change_its_logits(small: Pair) -> None:
    _, model = small
    ids, lengths = pad_right(random_texts([3, 9, 20], 300), PAD)
    noisy = torch.where(torch.arange(20) < lengths[:, None], ids, torch.randint_like(ids, high=300))
    torch.testing.assert_close(model(noisy, lengths), model(ids, lengths), atol=0, rtol=0)


def test_int32_ids_are_taken(small: Pair) -> None:
    _, model = small
    ids, lengths = pad_right(random_texts([3, 9], 300), PAD)
    torch.testing.assert_close(model(ids.int(), lengths), model(ids, lengths), atol=0, rtol=0)


@pytest.mark.parametrize(
    "text",
    [[5, 6, 0], [5, 0, 6, 0, 0], [0, 5], [0], [0, 0, 0], [5, 0], [7]],
    ids=str,
)
def test_a_text_that_ends_in_the_pad_token_is_pooled_where_transformers_pools_it(
    small: Pair, text: list[int]
) -> None:
    hf, model = small
    kept = model.config.num_pooled_tokens(np.array(text, np.int32))
    ours = model(torch.tensor([text[:kept]]), torch.tensor([kept]))
    torch.testing.assert_close(ours, hf(torch.tensor([text])).logits, atol=1e-4, rtol=0)


def test_without_a_pad_token_the_last_token_is_pooled() -> None:
    hf = random_hf_model(**(SMALL | {"pad_token_id": None}))
    model = our_model(hf)
    text = np.array([5, 6, 0], np.int32)
    assert model.config.num_pooled_tokens(text) == 3
    torch.testing.assert_close(
        model(torch.from_numpy(text)[None], torch.tensor([3])),
        hf(torch.from_numpy(text)[None].long()).logits,
        atol=1e-4,
        rtol=0,
    )


def test_flatten_pools_pad_tokens_inside_a_text(small_flatten: Pair) -> None:
    _, model = small_flatten
    assert model.config.num_pooled_tokens(np.array([5, 0, 0], np.int32)) == 3


def reference_logits(reference: Any, texts: list[torch.Tensor], pad: int) -> torch.Tensor:
    return reference(*pad_left(texts, 128, pad))


def test_flatten_has_the_logits_of_the_original_one_at_a_time(small_flatten: Pair) -> None:
    reference, model = small_flatten
    texts = cut_texts(128, 300)
    assert_close(one_at_a_time(model, texts), reference_logits(reference, texts, PAD), atol=1e-3)


def test_flatten_has_the_logits_of_the_original_in_a_mixed_batch(small_flatten: Pair) -> None:
    reference, model = small_flatten
    texts = cut_texts(128, 300)
    assert_close(model(*pad_right(texts, 7)), reference_logits(reference, texts, PAD), atol=1e-3)


@pytest.mark.parametrize("lengths", [(1, 1), (3, 5, 5), (60,)], ids=str)
def test_flatten_has_the_logits_of_the_original_for_a_batch_of_short_texts(
    small_flatten: Pair, lengths: tuple[int, ...]
) -> None:
    reference, model = small_flatten
    texts = random_texts(lengths, 300)
    torch.testing.assert_close(
        model(*pad_right(texts, 7)), reference_logits(reference, texts, PAD), atol=1e-3, rtol=0
    )


@pytest.mark.slow
def test_a_full_size_flatten_model_has_the_logits_of_the_original(full_size_flatten: Pair) -> None:
    reference, model = full_size_flatten
    texts = cut_texts(128, 50256)
    expected = reference_logits(reference, texts, 50256)
    assert_close(one_at_a_time(model, texts), expected, atol=1e-3)
    assert_close(model(*pad_right(texts, 50256)), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ["small", "small_flatten"])
def test_half_precision_gives_float32_logits_near_those_of_float32(
    dtype: torch.dtype, head: str, request: pytest.FixtureRequest
) -> None:
    _, model = request.getfixturevalue(head)
    batch = pad_right(random_texts([1, 20, 128], 300), PAD)
    logits = copy.deepcopy(model).to(dtype)(*batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(*batch), atol=0.25, rtol=0.1)


def gradients(model: torch.nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    F.cross_entropy(logits, torch.tensor([0, 3, 2])).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, gradient in theirs.items():
        expected = gradient.t() if gradient.shape != ours[name].shape else gradient
        if "c_attn.weight" in name or "c_proj.weight" in name or "c_fc.weight" in name:
            expected = gradient.t()
        torch.testing.assert_close(ours[name], expected, atol=1e-4, rtol=1e-3, msg=name)


@torch.enable_grad()
def test_gradients_are_those_of_transformers() -> None:
    hf = random_hf_model(**SMALL)
    model = our_model(hf)
    texts = random_texts([2, 9, 31], 300)
    assert_same_gradients(
        gradients(model, model(*pad_right(texts, PAD))),
        gradients(hf, hf_padded_right(hf, texts)),
    )


@torch.enable_grad()
def test_flatten_gradients_are_those_of_the_original() -> None:
    reference = random_flatten_reference(**(SMALL | {"n_positions": 128}))
    model = our_flatten_model(reference, PAD)
    texts = random_texts([2, 9, 31], 300)
    theirs = gradients(reference, reference_logits(reference, texts, PAD))
    assert_same_gradients(
        gradients(model, model(*pad_right(texts, PAD))),
        {name.replace("gpt2model.", "transformer.", 1): grad for name, grad in theirs.items()},
    )


def test_flatten_logits_follow_the_weights_through_a_step_of_training() -> None:
    model = our_flatten_model(random_flatten_reference(**SMALL), PAD)
    batch = pad_right(random_texts([2, 9, 31], 300), PAD)
    model(*batch)
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        F.cross_entropy(model(*batch), torch.tensor([0, 3, 2])).backward()
        optimizer.step()
    fresh = GPT2Classifier(model.config).eval()
    fresh.load_hf_state(model.hf_state())
    torch.testing.assert_close(model(*batch), fresh(*batch))


def test_flatten_logits_follow_the_weights_that_are_loaded() -> None:
    first = our_flatten_model(random_flatten_reference(**SMALL), PAD)
    second = our_flatten_model(random_flatten_reference(seed=1, **SMALL), PAD)
    batch = pad_right(random_texts([2, 9, 31], 300), PAD)
    first(*batch)
    first.load_hf_state(second.hf_state())
    torch.testing.assert_close(first(*batch), second(*batch))


@pytest.mark.parametrize("head", ["small", "small_flatten"])
def test_dropout_is_on_in_training_alone(head: str, request: pytest.FixtureRequest) -> None:
    _, model = request.getfixturevalue(head)
    model = copy.deepcopy(model)
    batch = pad_right(random_texts([2, 9, 31], 300), PAD)
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    assert not torch.allclose(model(*batch), model(*batch))


def test_weights_return_as_they_came(small: Pair) -> None:
    hf, model = small
    state = model.hf_state()
    assert state.keys() == hf.state_dict().keys()
    for name, tensor in hf.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_masks_that_old_files_carry_are_ignored(small: Pair) -> None:
    hf, model = small
    state = hf.state_dict() | {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    loaded = copy.deepcopy(model)
    loaded.init_weights()
    loaded.load_hf_state(state)
    for name, tensor in model.hf_state().items():
        assert torch.equal(loaded.hf_state()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transformer.ln_f.bias": None}, "no tensor transformer.ln_f.bias"),
        ({"lm_head.weight": torch.ones(2)}, "unexpected tensor lm_head.weight"),
        ({"score.weight": torch.ones(4, 48)}, r"score.weight has the shape \[4, 48\]"),
        ({"score.weight": torch.full((5, 48), math.nan)}, "score.weight holds NaN"),
        ({"score.weight": torch.full((5, 48), -math.inf)}, "score.weight holds NaN or inf"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused_by_name(
    small: Pair, changes: dict[str, Any], reason: str
) -> None:
    hf, model = small
    state = {k: v for k, v in (hf.state_dict() | changes).items() if v is not None}
    with pytest.raises(CheckpointError, match=reason):
        copy.deepcopy(model).load_hf_state(state)


def test_weights_too_large_for_float16_are_refused_by_name(small: Pair) -> None:
    hf, model = small
    state = hf.state_dict() | {"transformer.ln_f.bias": torch.full((48,), 1e5)}
    with pytest.raises(
        CheckpointError, match=r"ln_f\.bias holds NaN or infinite values as float16"
    ):
        copy.deepcopy(model).half().load_hf_state(state)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "bert"}, "'bert'"),
        ({"model_type": None}, "None"),
        ({"problem_type": "regression"}, "regression"),
        ({"problem_type": "multi_label_classification"}, "multi_label"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"is_causal": False}, "is_causal"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"activation_function": "tanh"}, "'tanh'"),
        ({"n_head": 5}, "multiple of n_head 5"),
        ({"n_embd": "48"}, "n_embd '48'"),
        ({"n_layer": 0}, "n_layer 0"),
        ({"n_head": True}, "n_head True"),
        ({"pad_token_id": "x"}, "pad_token_id 'x'"),
        ({"attn_pdrop": 2}, "attn_pdrop 2"),
        ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon 'tiny'"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_honoured_is_refused(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        ModelConfig.from_hf({"model_type": "gpt2"} | SMALL | changes, 5)


def test_a_single_label_is_refused() -> None:
    with pytest.raises(CheckpointError, match="at least 2 labels"):
        ModelConfig.from_hf({"model_type": "gpt2"}, 1)


@pytest.mark.parametrize(
    ("head_length", "pad", "reason"),
    [(0, 0, "head_length 0"), (1025, 0, "head_length 1025"), (8, None, "needs a pad_token_id")],
)
def test_a_flatten_head_that_cannot_be_read_is_refused(
    head_length: int, pad: int | None, reason: str
) -> None:
    config = {"model_type": "gpt2"} | SMALL | {"pad_token_id": pad}
    with pytest.raises(CheckpointError, match=reason):
        ModelConfig.from_hf(config, 5, head="flatten", head_length=head_length)


def test_a_configuration_survives_the_way_to_hugging_face_and_back() -> None:
    config = ModelConfig.from_hf(
        {"model_type": "gpt2", "n_inner": 50, "activation_function": "relu"} | SMALL, 5
    )
    assert ModelConfig.from_hf(config.to_hf(), 5) == config


def test_an_empty_configuration_has_the_defaults_of_transformers() -> None:
    config = ModelConfig.from_hf({"model_type": "gpt2", "n_inner": None}, 5)
    assert (config.vocab_size, config.hidden_size, config.inner_size) == (50257, 768, 3072)
    assert (config.num_layers, config.num_heads, config.max_positions) == (12, 12, 1024)


def test_more_tokens_than_the_model_reads_are_an_error(small_flatten: Pair) -> None:
    _, model = small_flatten
    with pytest.raises(ValueError, match="129 tokens, but the model reads 128"):
        model(torch.ones(1, 129, dtype=torch.int64), torch.tensor([129]))


def test_initial_weights_are_those_of_gpt2() -> None:
    torch.manual_seed(0)
    model = GPT2Classifier(ModelConfig.from_hf({"model_type": "gpt2"} | SMALL, 5))
    model.init_weights()
    block = model.transformer.h[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert block.attn.c_proj.bias.abs().max() == 0
    assert torch.equal(block.ln_1.weight, torch.ones(48))


def test_every_activation_that_a_configuration_may_name_is_known() -> None:
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES


def test_a_model_without_weights_is_made_without_torchs_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from batchclf.model import GPT2Classifier\n"
        "from batchclf.model_config import ModelConfig\n"
        f"config = ModelConfig.from_hf({ {'model_type': 'gpt2'} | SMALL!r}, 5)\n"
        "with torch.device('meta'):\n"
        "    GPT2Classifier(config)\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
