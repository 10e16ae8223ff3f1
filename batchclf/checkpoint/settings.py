"""What `batchclf.json` and the labels of `config.json` say."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from batchclf.checkpoint.files import FORMAT_VERSION, SETTINGS, naming, read_json
from batchclf.errors import CheckpointError
from batchclf.model_config import Head
from batchclf.text import Normalisation


@dataclass(frozen=True)
class Settings:
    """What `batchclf.json` says, or its defaults."""

    head: Head
    head_length: int
    max_length: int | None
    normalise: Normalisation
    temperature: float
    sha256: Mapping[str, str]
    metadata: Mapping[str, Any]


def read_settings(directory: Path) -> Settings:
    """What a model directory says, with the defaults for what it leaves out.

    Raises:
        CheckpointError: it makes no sense, or to a newer version alone.
    """
    path = directory / SETTINGS
    content = read_json(path, {"format_version": FORMAT_VERSION})
    with naming(path):
        if content.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"format_version is {content.get('format_version')!r}, this batchclf reads "
                f"{FORMAT_VERSION}; use the version of batchclf that wrote it, or a newer one"
            )
        head = content.get("head", "last_token")
        if head not in get_args(Head):
            raise CheckpointError(f"head {head!r} is none of {', '.join(get_args(Head))}")
        normalise = content.get("normalise", "none")
        if normalise not in get_args(Normalisation):
            raise CheckpointError(
                f"normalise {normalise!r} is none of {', '.join(get_args(Normalisation))}"
            )
        temperature = content.get("temperature", 1.0)
        if type(temperature) not in {int, float} or not 0 < temperature < math.inf:
            raise CheckpointError(f"temperature {temperature!r} is not a number above 0")
        for name in ("max_length", "head_length"):
            value = content.get(name)
            if value is not None and (type(value) is not int or value < 1):
                raise CheckpointError(f"{name} {value!r} is not a whole number above 0")
        for name in ("sha256", "training", "metrics", "versions"):
            if not isinstance(content.get(name, {}), dict):
                raise CheckpointError(f"{name} is not a JSON object")
    return Settings(
        head=head,
        head_length=content.get("head_length") or 0,
        max_length=content.get("max_length"),
        normalise=normalise,
        temperature=float(temperature),
        sha256=content.get("sha256", {}),
        metadata={k: v for k in ("training", "metrics", "versions") if (v := content.get(k))},
    )


def read_labels(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels in the order of the logits; LABEL_0, ... where none are named, as transformers."""
    num_labels = hf_config.get("num_labels")
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise CheckpointError(f"num_labels {num_labels!r} is not a whole number above 0")
    id2label = hf_config.get("id2label")
    if id2label is None:
        return tuple(f"LABEL_{index}" for index in range(num_labels or 2))
    if not isinstance(id2label, dict):
        raise CheckpointError("id2label is not a JSON object")
    try:
        by_id = {int(key): label for key, label in id2label.items()}
    except ValueError:
        raise CheckpointError("the keys of id2label are not whole numbers") from None
    if sorted(by_id) != list(range(len(id2label))):
        raise CheckpointError(f"the keys of id2label are not 0 to {len(id2label) - 1}")
    if num_labels is not None and num_labels != len(by_id):
        raise CheckpointError(f"num_labels is {num_labels}, but id2label names {len(by_id)} labels")
    labels = [by_id[index] for index in range(len(by_id))]
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise CheckpointError(f"the label {label!r} in id2label is not a name")
        if labels.count(label) > 1:
            raise CheckpointError(f"id2label names the label {label!r} more than once")
    return tuple(labels)
