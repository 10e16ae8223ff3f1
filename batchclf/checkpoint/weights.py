"""Safetensors: found, checked, written."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from batchclf.checkpoint.files import (
    PICKLES,
    SETTINGS,
    WEIGHTS,
    WEIGHTS_INDEX,
    naming,
    read_json,
)
from batchclf.errors import CheckpointError
from batchclf.model import check_names_and_shapes, is_finite, is_ignored
from batchclf.model_config import ModelConfig

_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


def find_weights(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a model, sorted by name.

    Raises:
        CheckpointError: there are none, or an index names one that is not there.
    """
    if (directory / WEIGHTS).is_file():
        return (directory / WEIGHTS,)
    index = directory / WEIGHTS_INDEX
    if not index.is_file():
        pickles = [path.name for path in directory.iterdir() if path.suffix in PICKLES]
        if pickles:
            raise CheckpointError(
                f"{directory} holds its weights as a pickle alone ({min(pickles)}), which can run "
                f"code when it is read; write {WEIGHTS} with transformers' save_pretrained, or use "
                "`batchclf import-checkpoint` for the weights of the original project"
            )
        raise CheckpointError(f"{directory} holds no {WEIGHTS}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; copy it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} points to {name!r}, which is no safetensors file here")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing, but {WEIGHTS_INDEX} names it")
    return tuple(directory / name for name in names)


def check_weights(paths: Sequence[Path], config: ModelConfig) -> None:
    """Names, shapes and types from the headers first, then every value."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if is_ignored(name):
                    continue
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in _FLOAT_TYPES:
                    raise CheckpointError(
                        f"{path}: tensor {name} is {tensor.get_dtype()}; only "
                        f"{', '.join(_FLOAT_TYPES)} are read, use the original checkpoint"
                    )
                shapes[name] = tuple(tensor.get_shape())
    source = paths[0] if len(paths) == 1 else paths[0].parent
    with naming(source):
        if config.head == "last_token" and "score.weight" not in shapes:
            if "fc1.weight" in shapes:
                raise CheckpointError(f"a flatten head (fc1.weight) needs its {SETTINGS}")
            raise CheckpointError(
                "no tensor score.weight: this is a language model, not a classifier yet; "
                "fine-tune it with `batchclf train --base-model`"
            )
        check_names_and_shapes(config, shapes)
    for path in paths:
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if not is_ignored(name) and not is_finite(file.get_tensor(name)):
                    raise CheckpointError(
                        f"{path}: tensor {name} holds NaN or infinite values; "
                        "the training that wrote it failed"
                    )


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read when they are asked for."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is cut short or not a safetensors file ({error}); copy it again"
        ) from error


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written; safetensors itself hides the number of the error in a text.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
