"""OpenVINO computes what torch computes, for both heads, any shape, and from several threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import models
import pytest
import torch
from torch import Tensor

from batchclf.errors import ConfigError
from batchclf.model import ACTIVATIONS, GPT2Classifier
from batchclf.model_config import ModelConfig
from batchclf.openvino_model import check_installed, hand_over

pytest.importorskip("openvino", reason="the extra openvino is not installed")

SHAPES = ((1, 1), (3, 7), (2, 33), (5, 64))
TOLERANCE = 1e-4  # float32, on logits


def make_model(head: str = "last_token", activation: str = "gelu_new") -> GPT2Classifier:
    config = ModelConfig(
        vocab_size=400,
        max_positions=64,
        hidden_size=48,
        num_layers=3,
        num_heads=4,
        inner_size=96,
        num_labels=5,
        head=head,  # type: ignore[arg-type]
        head_length=64 if head == "flatten" else 0,
        activation=activation,
        scale_attn_by_inverse_layer_idx=head == "last_token",
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = GPT2Classifier(config)
    model.init_weights()
    models.spread_weights(model)
    return model.eval()


def texts(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Of lengths from 1 to `tokens`; the longest is among them."""
    chance = torch.Generator().manual_seed(batch * 100 + tokens)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=chance)
    lengths[0] = tokens
    return torch.randint(1, 400, (batch, tokens), generator=chance), lengths


def logits(model: GPT2Classifier, batch: int, tokens: int) -> Tensor:
    with torch.inference_mode():
        answer: Tensor = model(*texts(batch, tokens))
        return answer


@pytest.mark.parametrize("head", ["last_token", "flatten"])
def test_logits_are_those_of_torch_for_any_shape(head: str) -> None:
    wanted = [logits(make_model(head), *shape) for shape in SHAPES]
    handed_over = hand_over(make_model(head), "float32", 1, 1)
    for shape, found in zip(SHAPES, wanted, strict=True):
        torch.testing.assert_close(
            logits(handed_over, *shape), found, atol=TOLERANCE, rtol=TOLERANCE
        )


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_is_that_of_torch(activation: str) -> None:
    wanted = logits(make_model(activation=activation), 3, 20)
    handed_over = hand_over(
        make_model(activation=activation), "float32", num_streams=1, num_threads=1
    )
    torch.testing.assert_close(logits(handed_over, 3, 20), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_threads_side_by_side_do_not_mix_their_batches() -> None:
    model = hand_over(make_model(), "float32", 2, 2)
    shapes = [SHAPES[number % len(SHAPES)] for number in range(64)]
    alone = {shape: logits(model, *shape) for shape in SHAPES}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda shape: logits(model, *shape), shapes))
    for shape, found in zip(shapes, together, strict=True):
        torch.testing.assert_close(found, alone[shape])


def test_what_is_not_installed_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(ConfigError, match=r"no_such_package.*pip install 'batchclf\[openvino\]'"):
        check_installed("no_such_package")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    import openvino

    def fail() -> None:
        def compile_model(*_args: object) -> None:
            raise RuntimeError("Exception from core.cpp\nno such device\n")

        monkeypatch.setattr(openvino.Core, "compile_model", compile_model)

    return fail


def test_a_failure_of_openvino_says_its_reason_and_what_to_use_instead(
    failing: Callable[[], None],
) -> None:
    failing()
    with pytest.raises(ConfigError, match=r"no such device.*--backend torch"):
        hand_over(make_model(), "float32", 1, 1)
