"""A classifier to label with: read, checked, and known by a hash of what its answers depend on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from batchclf.checkpoint.files import (
    CONFIG,
    SETTINGS,
    TOKENIZER_CONFIG,
    hash_json,
    naming,
    read_json,
    sha256,
)
from batchclf.checkpoint.location import find_model
from batchclf.checkpoint.settings import Settings, read_labels, read_settings
from batchclf.checkpoint.tokenizer import check_tokenizer, describe_tokenizer, read_tokenizer
from batchclf.checkpoint.weights import check_weights, find_weights
from batchclf.errors import CheckpointError, ConfigError
from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig
from batchclf.text import Normalisation


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model directory that was read and found consistent; the weights stay on disk.

    Attributes:
        labels: in the order of the logits.
        tokenizer: neither truncates nor pads.
        max_length: tokens of a text that the model is given.
        normalise: what is done to a text before it is tokenised.
        temperature: logits are divided by it before softmax.
        metadata: `training`, `metrics` and `versions` of `batchclf.json`; {} without one.
        weight_files: the safetensors files, in the order of their names.
        content_hash: sha256, in hex, of all that the logits and their reading depend on: weights,
            configuration, tokenizer, labels, max_length, normalise, temperature. Paths, dates and
            metadata are no part of it.
        weights_hash: the same of the weights and the configuration alone.
    """

    path: Path
    config: ModelConfig
    labels: tuple[str, ...]
    tokenizer: Tokenizer
    max_length: int
    normalise: Normalisation
    temperature: float
    metadata: Mapping[str, Any]
    weight_files: tuple[Path, ...]
    content_hash: str
    weights_hash: str

    def build_model(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> GPT2Classifier:
        """The model with its weights, in eval mode; its head stays in float32.

        Raises:
            CheckpointError: a weight is too large for the dtype.
        """
        with torch.device("meta"):
            model = GPT2Classifier(self.config)
        model.transformer.to(dtype)
        state: dict[str, torch.Tensor] = {}
        for path in self.weight_files:
            state |= load_file(path, device=str(device))
        with naming(self.path):
            model.load_hf_state(state)
        return model.eval()


def load(
    model: str | Path,
    max_length: int | None = None,
    endpoint_url: str | None = None,
    *,
    build: bool = False,
) -> Checkpoint:
    """Read a model directory, or download one from S3 or the Hugging Face hub, and check all of it.

    Args:
        model: a directory, an `s3://` prefix, else a hub id such as `gpt2` or `owner/name`.
        max_length: instead of the model's own.
        endpoint_url: another server of the S3 protocol.
        build: whether what `batchclf build` made of it is to be downloaded too, if it is there.

    Raises:
        CheckpointError: it cannot be had, or is not a GPT-2 classifier that can be trusted.
        ConfigError: the model cannot read that many tokens.
        StoreError: S3 kept failing.
    """
    directory = find_model(model, build=build, endpoint_url=endpoint_url)
    hf_config = read_json(directory / CONFIG)
    settings = read_settings(directory)
    with naming(directory / CONFIG):
        labels = read_labels(hf_config)
        config = ModelConfig.from_hf(
            hf_config, len(labels), head=settings.head, head_length=settings.head_length
        )
    weight_files = find_weights(directory)
    check_weights(weight_files, config)
    tokenizer_config = read_json(directory / TOKENIZER_CONFIG, {})
    tokenizer, tokenizer_files = read_tokenizer(directory, tokenizer_config)
    check_tokenizer(tokenizer, tokenizer_files[0], config)
    digests = {path.name: sha256(path) for path in (*weight_files, *tokenizer_files)}
    _check_digests(directory, settings.sha256, digests)
    length = _choose_max_length(max_length, settings, tokenizer_config, config, directory)
    architecture = asdict(config)
    for name in ("embd_dropout", "attn_dropout", "resid_dropout"):
        del architecture[name]
    return Checkpoint(
        path=directory,
        config=config,
        labels=labels,
        tokenizer=tokenizer,
        max_length=length,
        normalise=settings.normalise,
        temperature=settings.temperature,
        metadata=settings.metadata,
        weight_files=weight_files,
        weights_hash=hash_json(
            {
                "files": {path.name: digests[path.name] for path in weight_files},
                "config": architecture,
            }
        ),
        content_hash=hash_json(
            {
                "files": digests,
                "config": architecture,
                "labels": labels,
                "tokenizer": describe_tokenizer(tokenizer),
                "max_length": length,
                "normalise": settings.normalise,
                "temperature": settings.temperature,
            }
        ),
    )


def fingerprint(checkpoint: Checkpoint, settings: Mapping[str, object]) -> str:
    """32 hex digits that change when the model, or a setting that its answers depend on, does.

    Args:
        checkpoint: the model.
        settings: plain values, as JSON has them.
    """
    return hash_json({"model": checkpoint.content_hash, "settings": settings})[:32]


def _check_digests(directory: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name, digest in found.items():
        if expected.get(name, digest) != digest:
            raise CheckpointError(
                f"{directory / name} is not the file that {SETTINGS} was written for "
                "(sha256 differs); copy the whole directory again"
            )


def _choose_max_length(
    wanted: int | None,
    settings: Settings,
    tokenizer_config: Mapping[str, Any],
    config: ModelConfig,
    directory: Path,
) -> int:
    longest = config.longest
    if wanted is not None:
        if not 1 <= wanted <= longest:
            raise ConfigError(
                f"a maximum length of {wanted} tokens: the model {directory} reads 1 to {longest}"
            )
        return wanted
    if settings.max_length is not None:
        if settings.max_length > longest:
            raise CheckpointError(
                f"{directory / SETTINGS}: max_length is {settings.max_length}, "
                f"but the model reads at most {longest} tokens"
            )
        return settings.max_length
    # transformers writes 1e30 where it knows no limit.
    declared = tokenizer_config.get("model_max_length")
    if config.head == "last_token" and type(declared) is int and 1 <= declared <= longest:
        return declared
    return longest
