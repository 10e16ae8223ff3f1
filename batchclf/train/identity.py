"""What the weights of a run depend on: for its checkpoints, and for its processes, to compare."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batchclf.errors import ConfigError
from batchclf.model import GPT2Classifier
from batchclf.train.examples import Tokenised
from batchclf.train.processes import Processes
from batchclf.train.settings import TrainSettings


def describe(
    model: GPT2Classifier,
    train: Tokenised,
    val: Tokenised,
    settings: TrainSettings,
    dtype: torch.dtype,
    processes: Processes,
) -> dict[str, Any]:
    """Plain values, each under a name for messages.

    Args:
        model: as training begins.
        train: what is trained on.
        val: what the best epoch is chosen by.
        settings: how it is trained.
        dtype: what the precision of the settings means here.
        processes: that share the work.
    """
    return {
        **asdict(settings),
        "precision": str(dtype).removeprefix("torch."),
        "model": asdict(model.config),
        "first weights": _digest(t.cpu().numpy() for t in model.state_dict().values()),
        "training examples": _digest_examples(train),
        "validation examples": _digest_examples(val),
        "number of processes": processes.size,
        "kind of device": processes.device.type,
    }


def check_alike(identity: Mapping[str, Any], processes: Processes) -> None:
    """Whether all processes are about to do the same.

    Raises:
        ConfigError: this one has another setting, file or model than the first.
    """
    first = json.loads(processes.broadcast_text(json.dumps(identity)))
    for name, value in json.loads(json.dumps(identity)).items():
        if first[name] != value:
            raise ConfigError(
                f"process {processes.rank} of {processes.size} has other {name}: {value!r}, "
                f"the first one {first[name]!r}; give all the same options and files"
            )


def _digest_examples(examples: Tokenised) -> str:
    lengths = np.array([len(ids) for ids in examples.ids])
    return _digest([np.array(examples.labels), lengths, *examples.ids])


def _digest(arrays: Iterable[npt.NDArray[Any]]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:16]
