"""All tensors that a run goes on from: taken out of their places, and put back."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from batchclf.errors import CheckpointError
from batchclf.model import GPT2Classifier
from batchclf.train.processes import Processes


@dataclass
class Parts:
    """Where the tensors of a run are.

    Attributes:
        average: the model with the averaged weights, if there is one.
        best: the weights of the best epoch so far, on the CPU; {} before the first.
    """

    model: GPT2Classifier
    optimizer: torch.optim.Optimizer
    average: GPT2Classifier | None
    best: dict[str, Tensor]


def take(parts: Parts, processes: Processes) -> dict[str, Tensor]:
    """Copies on the CPU. All processes must ask: random states are gathered from each."""
    tensors = {"random.cpu": processes.gather(torch.get_rng_state())}
    if processes.device.type == "cuda":
        tensors["random.cuda"] = processes.gather(torch.cuda.get_rng_state(processes.device))
    if not processes.is_first:
        return {}
    tensors |= _named("model", parts.model.state_dict())
    tensors |= _named("best", parts.best)
    if parts.average is not None:
        tensors |= _named("average", parts.average.state_dict())
    for name, parameter in parts.model.named_parameters():
        tensors |= _named(f"optimizer.{name}", parts.optimizer.state.get(parameter, {}))
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def put_back(tensors: Mapping[str, Tensor], parts: Parts, processes: Processes) -> None:
    """Make everything as it was when the tensors were taken.

    Raises:
        CheckpointError: a tensor is missing, or of another shape.
    """
    try:
        parts.model.load_state_dict(_under("model", tensors))
        if parts.average is not None:
            parts.average.load_state_dict(_under("average", tensors))
        parts.best = _under("best", tensors)
        for name, parameter in parts.model.named_parameters():
            moments = _under(f"optimizer.{name}", tensors)
            if moments:
                parts.optimizer.state[parameter] = {
                    # AdamW counts its steps on the CPU
                    moment: tensor if moment == "step" else tensor.to(parameter.device)
                    for moment, tensor in moments.items()
                }
        # Copies: torch reads a random state from the start of its storage.
        torch.set_rng_state(tensors["random.cpu"][processes.rank].clone())
        if processes.device.type == "cuda":
            state = tensors["random.cuda"][processes.rank].clone()
            torch.cuda.set_rng_state(state, processes.device)
    except (KeyError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"the training checkpoint does not fit its own description ({error}); "
            "delete it to start again"
        ) from error


def _named(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}.{name}": tensor for name, tensor in tensors.items()}


def _under(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{group}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
