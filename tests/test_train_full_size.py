"""GPT-2 as it is published, 124M weights: our step against that of plain transformers."""

import models
import pytest
import torch
from torch import nn

from batchclf.train import TrainSettings
from batchclf.train.objective import Objective, PaddedBatch
from batchclf.train.optimisation import new_optimizer

LENGTHS = (12, 7, 3)
CLOSE = 1e-4


@pytest.mark.slow
def test_one_step_of_a_124m_gpt2_is_that_of_plain_transformers() -> None:
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    hf = models.random_hf_model(pad_token_id=50256, **no_dropout).train()
    ours = models.our_model(hf).train()
    texts = models.random_texts(LENGTHS, 50256)
    labels = torch.tensor([0, 3, 1])
    settings = TrainSettings(max_length=1024)

    ids, lengths = models.pad_right(texts, 50256)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    expected = hf(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
    expected.backward()
    objective = Objective(ours, settings, None, torch.float32)
    loss, _ = objective(PaddedBatch(ids.int(), lengths, labels), 1.0, 1.0)
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=CLOSE)
    norms, expected_norms = gradient_norms(ours), gradient_norms(hf)
    assert norms.keys() == expected_norms.keys()
    assert norms == pytest.approx(expected_norms, rel=CLOSE, abs=CLOSE)

    take_step(ours, settings)
    take_step(hf, settings)
    stepped = {name: tensor.norm().item() for name, tensor in ours.hf_state().items()}
    assert stepped == pytest.approx(
        {name: parameter.norm().item() for name, parameter in hf.named_parameters()}, rel=CLOSE
    )


def gradient_norms(model: nn.Module) -> dict[str, float]:
    return {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}


def take_step(model: nn.Module, settings: TrainSettings) -> None:
    optimizer = new_optimizer(model, settings)
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()
