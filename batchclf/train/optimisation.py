import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from batchclf.errors import ConfigError
from batchclf.model import GPT2Classifier
from batchclf.train.settings import Schedule, TrainSettings

_BETAS = (0.9, 0.98)
_LAST_LEARNING_RATE = 0.05  # where the schedule ends, as a share of its top


def new_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the weights that are not frozen."""
    groups = list(parameter_groups(model, settings.weight_decay))
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=_BETAS)


def parameter_groups(model: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """The weights that are trained: first those that decay, then embeddings, norms and biases."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim > 1 and not name.endswith(("wte.weight", "wpe.weight"))
        (decayed if is_matrix else others).append(parameter)
    yield {"params": decayed, "weight_decay": weight_decay}
    yield {"params": others, "weight_decay": 0.0}


def learning_rate_share(progress: float, warmup_share: float, schedule: Schedule) -> float:
    """The learning rate as a share of its top: linear to 1, then a half cosine or a line down.

    Args:
        progress: share of all steps that are done, from 0 to 1.
        warmup_share: of all steps.
        schedule: how it falls.
    """
    if progress < warmup_share:
        return progress / warmup_share
    rest = (progress - warmup_share) / (1 - warmup_share)
    height = (1 + math.cos(math.pi * rest)) / 2 if schedule == "cosine" else 1 - rest
    return _LAST_LEARNING_RATE + (1 - _LAST_LEARNING_RATE) * height


def freeze(model: GPT2Classifier, num_layers: int) -> None:
    """Keep the embeddings and the lowest layers as they are.

    Raises:
        ConfigError: the model has fewer layers.
    """
    if num_layers > model.config.num_layers:
        raise ConfigError(
            f"freeze_layers {num_layers}: the model has {model.config.num_layers} layers"
        )
    layers = tuple(f"transformer.h.{layer}." for layer in range(num_layers))
    frozen = ("transformer.wte.", "transformer.wpe.", *layers) if num_layers else ()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))


class Average:
    """An exponential moving average of a model's weights, as a model of its own.

    After step t it takes the share max(1 - decay, 9 / (10 + t)) of the new weights, so that the
    first ones are soon forgotten. Source: tf.train.ExponentialMovingAverage, `num_updates`.
    """

    def __init__(self, model: GPT2Classifier, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self._decay = decay

    def update(self, model: GPT2Classifier, step: int) -> None:
        """Take in the weights after a step of the optimizer, counted from 1."""
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.model.parameters()),
                list(model.parameters()),
                max(1 - self._decay, 9 / (10 + step)),
            )
