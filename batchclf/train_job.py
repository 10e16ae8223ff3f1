"""The job of `batchclf train`: labelled files in, a model directory out."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from batchclf.checkpoint import END_OF_TEXT, load_base, save
from batchclf.engine import choose_compute
from batchclf.errors import ConfigError, InputError
from batchclf.labelled import Labelled, read_labelled
from batchclf.log import fields
from batchclf.model import GPT2Classifier, Head, ModelConfig
from batchclf.text import normalise
from batchclf.train import Examples, Trained, TrainSettings, fit, train_tokenizer

log = logging.getLogger(__name__)

_LEAST_LABELS = 2


@dataclass(frozen=True)
class TrainJob:
    """What `train` was asked for.

    Attributes:
        base_model: a model directory or hub name to start from, or a config JSON in Hugging
            Face's words to start from scratch.
        vocab_size: of the tokenizer that is trained with a model from scratch.
        labels: their order; empty for those of the training data, sorted.
        weights: how they are saved; float16 takes half the space.
        drop_leaked: leave out training articles that also stand in the validation data.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    base_model: str
    output: str
    settings: TrainSettings
    head: Head = "last_token"
    vocab_size: int = 8192
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "category"
    labels: tuple[str, ...] = ()
    delimiter: str = ","
    device: str = "auto"
    weights: Literal["float32", "float16", "bfloat16"] = "float32"
    drop_leaked: bool = False
    overwrite: bool = False
    endpoint_url: str | None = None

    def run(self) -> Trained:
        """Train and save.

        Raises:
            InputError: a file cannot be read, or holds a label that is not known; says which row.
            ConfigError, CheckpointError: the settings or the base model make no sense.
        """
        began = time.perf_counter()
        device = choose_compute(self.device, "float32").device
        train, val = self._read(self.train), self._read(self.val)
        train, num_leaked = self._check_leaks(train, val)
        labels = self._choose_labels(train)
        train_examples = _examples(train, labels)
        val_examples = _examples(val, labels)
        log.info(
            "training on %d articles, %d labels; validating on %d",
            len(train),
            len(labels),
            len(val),
            extra=fields(train=len(train), val=len(val), labels=list(labels)),
        )
        torch.manual_seed(self.settings.seed)
        head_length = self.settings.max_length if self.head == "flatten" else 0
        if Path(self.base_model).is_file():
            model, tokenizer = self._from_scratch(train.texts, len(labels), head_length)
        else:
            model, tokenizer = load_base(self.base_model, len(labels), self.head, head_length)
        trained = fit(model.to(device), tokenizer, train_examples, val_examples, self.settings)
        save(
            self.output,
            trained.model.to("cpu"),
            tokenizer,
            labels,
            max_length=self.settings.max_length,
            normalise=self.settings.normalise,
            temperature=trained.temperature,
            training={
                "num_train": len(train),
                "num_val": len(val),
                "num_leaked": num_leaked,
                "leaked_dropped": self.drop_leaked,
                "labels": dict(Counter(train.labels)),
                "train_sha256": _digest(train),
                "val_sha256": _digest(val),
                "settings": asdict(self.settings),
                "seconds": round(time.perf_counter() - began, 1),
            },
            metrics=trained.metrics,
            weights_dtype=getattr(torch, self.weights),
            overwrite=self.overwrite,
        )
        return trained

    def _read(self, inputs: Sequence[str]) -> Labelled:
        found = read_labelled(
            inputs,
            text_columns=self.text_columns,
            label_column=self.label_column,
            delimiter=self.delimiter,
            endpoint_url=self.endpoint_url,
        )
        if not len(found):
            raise InputError(f"{', '.join(inputs)}: no labelled articles there")
        if found.num_without_text:
            log.warning("left out %d rows without text", found.num_without_text)
        return found

    def _check_leaks(self, train: Labelled, val: Labelled) -> tuple[Labelled, int]:
        """Training articles that are also validated on make the model look better than it is."""
        seen = {normalise(text, "lower+collapse") for text in val.texts}
        leaked = [normalise(text, "lower+collapse") in seen for text in train.texts]
        num_leaked = sum(leaked)
        if not num_leaked:
            return train, 0
        if not self.drop_leaked:
            log.warning(
                "%d training articles also stand in the validation data; --drop-leaked leaves "
                "them out",
                num_leaked,
            )
            return train, num_leaked
        log.info("left out %d training articles that stand in the validation data", num_leaked)
        return train.without(leaked), num_leaked

    def _choose_labels(self, train: Labelled) -> tuple[str, ...]:
        labels = self.labels or tuple(sorted(set(train.labels)))
        if len(labels) < _LEAST_LABELS:
            raise InputError(f"all articles have one label, {labels[0]!r}; nothing to learn")
        if len(set(labels)) != len(labels):
            raise ConfigError(f"--labels names a label twice: {', '.join(labels)}")
        return labels

    def _from_scratch(
        self, texts: Sequence[str], num_labels: int, head_length: int
    ) -> tuple[GPT2Classifier, Any]:
        path = Path(self.base_model)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--base-model {path}: not a config JSON: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"--base-model {path}: not a JSON object")
        tokenizer = train_tokenizer(
            [normalise(text, self.settings.normalise) for text in texts], self.vocab_size
        )
        config |= {
            "vocab_size": tokenizer.get_vocab_size(),
            "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        }
        model = GPT2Classifier(
            ModelConfig.from_hf(config, num_labels, head=self.head, head_length=head_length)
        )
        model.init_weights()
        return model, tokenizer


def _examples(found: Labelled, labels: Sequence[str]) -> Examples:
    index = {label: number for number, label in enumerate(labels)}
    for label, place in zip(found.labels, found.places, strict=True):
        if label not in index:
            raise InputError(f"{place}: unknown label {label!r}; known are {', '.join(labels)}")
    return Examples(found.texts, [index[label] for label in found.labels])


def _digest(found: Labelled) -> str:
    lines = sorted(
        f"{label}\0{text}" for label, text in zip(found.labels, found.texts, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
