"""What a model directory says of the model: read as plain JSON, no weights and no tokenizer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchclf.errors import CheckpointError

_CONFIG = "config.json"
_SETTINGS = "batchclf.json"
_MOST_BYTES = 16 << 20
_SHAPE = ("model_type", "n_layer", "n_head", "n_embd", "n_positions", "vocab_size")


@dataclass(frozen=True)
class ModelCard:
    """What is worth knowing of a model.

    Attributes:
        labels: in the order of the logits.
        shape: layers, width and the like.
        reading: head, max_length, normalise and temperature; {} without batchclf.json.
        training: what it was trained on and how.
        metrics: what it reached.
        versions: of the libraries that wrote it.
    """

    path: str
    labels: Sequence[str]
    shape: Mapping[str, Any]
    reading: Mapping[str, Any]
    training: Mapping[str, Any]
    metrics: Mapping[str, Any]
    versions: Mapping[str, Any]


def read_card(directory: Path) -> ModelCard:
    """The card of a model directory.

    Raises:
        CheckpointError: there is none that can be read.
    """
    config = _read(directory / _CONFIG)
    has_settings = (directory / _SETTINGS).is_file()
    settings = _read(directory / _SETTINGS) if has_settings else {}
    names = _mapping(config, "id2label")
    return ModelCard(
        path=str(directory),
        labels=tuple(str(names[key]) for key in sorted(names, key=lambda key: (len(key), key))),
        shape={name: config[name] for name in _SHAPE if name in config},
        reading={
            name: settings[name]
            for name in ("head", "max_length", "normalise", "temperature")
            if name in settings
        },
        training=_mapping(settings, "training"),
        metrics=_mapping(settings, "metrics"),
        versions=_mapping(settings, "versions"),
    )


def _mapping(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{path}: too large for a model's {path.name}")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content
