"""The original project's `model.pth` to a model directory.

The file is the `state_dict` of `SimpleGPT2SequenceClassifier`: a GPT-2 under `gpt2model.*`, and one
linear layer `fc1` over all its hidden states.
Source: https://github.com/haocai1992/GPT2-News-Classifier
"""

import hashlib
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from batchclf.checkpoint import check_free, load_base_config, save
from batchclf.errors import CheckpointError, ConfigError
from batchclf.local_folder import check_writable
from batchclf.model import GPT2Classifier, is_ignored
from batchclf.text import Normalisation

_WRAPPER = "module."  # what DataParallel and DistributedDataParallel put before every name
_TRUNK = "gpt2model."
_OUR_TRUNK = "transformer."
_HEAD_WEIGHT, _HEAD_BIAS = "fc1.weight", "fc1.bias"
_EMBEDDING = _TRUNK + "wte.weight"
# What that project does to a text before it is tokenised, training and inference alike.
_NORMALISE: Normalisation = "lower+collapse"
_ASKED_FOR = re.compile(r"(?:GLOBAL|Unsupported class|Unsupported global:?) ([\w.]+)")


def import_checkpoint(
    file: Path, *, base_model: str, labels: Sequence[str], output: Path, overwrite: bool = False
) -> GPT2Classifier:
    """Write a model directory with a `flatten` head that gives the logits of the original.

    Args:
        file: written by `torch.save(model.state_dict(), file)`.
        base_model: a directory or hub name that has the configuration and the tokenizer of the
            GPT-2 it was fine-tuned from; weights need not be there.
        labels: in the order of the original's label map.
        output: model directory to write.
        overwrite: replace a model directory.

    Raises:
        CheckpointError: the file is not such a checkpoint, or does not fit the base model.
        ConfigError: the labels do not fit it.
    """
    check_writable("--output", output)
    check_free(output, overwrite=overwrite)
    state = _rename(_read_state(file), file)
    num_labels, width = state[_HEAD_WEIGHT].shape
    hidden_size = state[_OUR_TRUNK + "wte.weight"].shape[1]
    _check_labels(labels, num_labels, file)
    if width % hidden_size:
        raise CheckpointError(
            f"{file}: {_HEAD_WEIGHT} is {width} wide, which is no multiple of the {hidden_size} "
            "numbers of a hidden state; it is not the head of the original project"
        )
    config, tokenizer = load_base_config(base_model, num_labels, "flatten", width // hidden_size)
    model = GPT2Classifier(config)
    try:
        model.load_hf_state(state)
    except CheckpointError as error:
        reason = str(error).replace(_OUR_TRUNK, _TRUNK)
        raise CheckpointError(f"{file}, with the configuration of {base_model}: {reason}") from None
    model.eval()
    save(
        output,
        model,
        tokenizer,
        labels,
        max_length=model.config.head_length,
        normalise=_NORMALISE,
        temperature=1.0,
        training={"imported_from": file.name, "sha256": _digest(file), "base_model": base_model},
        metrics={},
        overwrite=overwrite,
    )
    return model


def _read_state(file: Path) -> Mapping[str, Tensor]:
    """The tensors of the file by name. Unpickles nothing but tensors and plain containers."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give the original project's model.pth")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on protocols; what matters is raised
            content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{file}: {error.strerror}; let this user read it") from error
    except pickle.UnpicklingError as error:
        asked = _ASKED_FOR.search(str(error))
        raise CheckpointError(
            f"{file} is damaged, or more than a state_dict"
            f"{f': it asks for {asked[1]}' if asked else ''}. No code in it was run. From a source "
            "that you trust, load it in the original project and save it again with "
            "torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # a damaged file trips torch.load up wherever its bytes lead
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file} is cut short or was not written by torch.save "
            f"({type(error).__name__}: {reason}); copy it again"
        ) from error
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{file} holds no state_dict, but a {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor; only a bare "
                "state_dict is read, not what training keeps beside it"
            )
    return content


def _rename(found: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors under the names of a model directory, without constants.

    Raises:
        CheckpointError: they are of another architecture, or hold no numbers.
    """
    state = {name.removeprefix(_WRAPPER): tensor for name, tensor in found.items()}
    for name, dimensions in ((_EMBEDDING, 2), (_HEAD_WEIGHT, 2), (_HEAD_BIAS, 1)):
        if name not in state:
            raise CheckpointError(
                f"{file}: no tensor {name}, so it is not a SimpleGPT2SequenceClassifier; it has "
                f"{_some(sorted(state))}"
            )
        if state[name].ndim != dimensions or not state[name].numel():
            raise CheckpointError(
                f"{file}: tensor {name} has the shape {list(state[name].shape)}, which is not "
                "that of a SimpleGPT2SequenceClassifier"
            )
    for name, tensor in state.items():
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_ignored(name) and not (is_plain and tensor.is_floating_point()):
            raise CheckpointError(f"{file}: tensor {name} holds no plain floating point numbers")
    return {
        name.replace(_TRUNK, _OUR_TRUNK, 1) if name.startswith(_TRUNK) else name: tensor
        for name, tensor in state.items()
        if not is_ignored(name)
    }


def _check_labels(labels: Sequence[str], num_labels: int, file: Path) -> None:
    if len(labels) != num_labels:
        raise ConfigError(
            f"--labels names {len(labels)} labels ({', '.join(labels)}), but {file} has "
            f"{num_labels}; give all of them, in the order of the original's label map"
        )
    if len(set(labels)) != len(labels) or not all(labels):
        raise ConfigError(f"--labels has an empty label or names one twice: {', '.join(labels)}")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
