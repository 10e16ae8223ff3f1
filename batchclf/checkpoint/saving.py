"""A model directory appears whole or not at all."""

import ctypes
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from batchclf import __version__
from batchclf.checkpoint.files import (
    CONFIG,
    END_OF_TEXT,
    FORMAT_VERSION,
    SETTINGS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    sha256,
    write_json,
)
from batchclf.checkpoint.loading import load
from batchclf.checkpoint.weights import write_tensors
from batchclf.errors import CheckpointError
from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig
from batchclf.store.base import fsync, translate_os_error
from batchclf.text import Normalisation

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h and linux/fs.h; man 2 renameat2


def save(
    directory: str | Path,
    model: GPT2Classifier,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    *,
    max_length: int,
    normalise: Normalisation,
    temperature: float,
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    weights_dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    add_report: Callable[[Path], None] | None = None,
) -> None:
    """Write a model directory that `load` reads, and with the `last_token` head transformers too.

    It appears whole or not at all: everything is written beside it, flushed, read back and renamed.

    Args:
        directory: where; its parents are made.
        model: the weights.
        tokenizer: its truncation and padding are left out.
        labels: in the order of the logits.
        max_length: tokens of a text that the model reads.
        normalise: what is done to a text before it is tokenised. transformers does not do it.
        temperature: logits are divided by it before softmax. transformers does not do it.
        training: what it was trained on and how, in plain values.
        metrics: what it reached, in plain values.
        weights_dtype: float32, or float16 or bfloat16 for half the size.
        overwrite: replace a model directory.
        add_report: writes more files into the new directory; what they say is not looked at.

    Raises:
        CheckpointError: something else stands there, or what was written is no valid model.
        OutOfSpaceError: the disk is full; what stood there still does.
    """
    directory = Path(directory)
    check_free(directory, overwrite=overwrite)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_weights(temporary / WEIGHTS, model, weights_dtype)
        dtype_name = str(weights_dtype).removeprefix("torch.")
        end = tokenizer.token_to_id(END_OF_TEXT)
        write_json(temporary / CONFIG, _hf_config(model.config, labels, dtype_name, end))
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # safetensors makes it private
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        (temporary / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
        write_json(
            temporary / TOKENIZER_CONFIG, _hf_tokenizer_config(tokenizer, model.config, max_length)
        )
        write_json(
            temporary / SETTINGS,
            {
                "format_version": FORMAT_VERSION,
                "head": model.config.head,
                **({"head_length": n} if (n := model.config.head_length) else {}),
                "max_length": max_length,
                "normalise": normalise,
                "temperature": temperature,
                "training": dict(training),
                "metrics": dict(metrics),
                "versions": {
                    "batchclf": __version__,
                    **{name: version(name) for name in ("torch", "tokenizers")},
                },
                "sha256": {name: sha256(temporary / name) for name in (WEIGHTS, TOKENIZER)},
            },
        )
        if add_report is not None:
            add_report(temporary)
        load(temporary)
        publish_directory(temporary, directory)
    except OSError as error:
        raise translate_os_error(error, f"model directory {directory}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(directory: Path, *, overwrite: bool) -> None:
    """Whether `save` may write there.

    Raises:
        CheckpointError: something stands there that may not be replaced.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        raise CheckpointError(f"{directory} holds something other than a model; choose another")
    if not overwrite:
        raise CheckpointError(f"{directory} holds a model already; choose another directory")


def _write_weights(path: Path, model: GPT2Classifier, dtype: torch.dtype) -> None:
    state = {
        name: tensor.to(device="cpu", dtype=dtype).contiguous()
        for name, tensor in model.hf_state().items()
    }
    write_tensors(path, state, {"format": "pt"})


def _hf_config(
    config: ModelConfig, labels: Sequence[str], dtype_name: str, end: int | None
) -> dict[str, Any]:
    architecture = {
        "last_token": "GPT2ForSequenceClassification",
        "flatten": "SimpleGPT2SequenceClassifier",
    }[config.head]
    return {
        "architectures": [architecture],
        **config.to_hf(),
        "bos_token_id": end,
        "eos_token_id": end,
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "dtype": dtype_name,
    }


def _hf_tokenizer_config(
    tokenizer: Tokenizer, config: ModelConfig, max_length: int
) -> dict[str, Any]:
    # The class that reads tokenizer.json as it is; GPT2Tokenizer keeps vocabulary and merges alone.
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        content |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    if config.pad_token_id is not None:
        content["pad_token"] = tokenizer.id_to_token(config.pad_token_id)
    return content


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return bool(renameat2(*names, _RENAME_EXCHANGE) == 0)


def publish_directory(temporary: Path, directory: Path) -> None:
    """Flush a directory and rename it into place, or let it change places with one that is there.

    Where the file system cannot do that, the old one goes aside first, and away last. Whoever
    calls removes `temporary`, which may hold the old one then.
    """
    for path in (*temporary.rglob("*"), temporary):
        fsync(path)
    if directory.exists() and _exchange(temporary, directory):
        fsync(directory.parent)
        return
    aside = temporary.with_suffix(".old")
    if directory.exists():
        directory.rename(aside)
    try:
        temporary.rename(directory)
    except OSError:
        if aside.exists():
            aside.rename(directory)
        raise
    fsync(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)
