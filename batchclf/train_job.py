"""The job of `batchclf train`: labelled files in, a model directory out."""

import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from batchclf.calibration import fit_temperature
from batchclf.checkpoint import END_OF_TEXT, check_free, load_base, save
from batchclf.compute import choose_compute
from batchclf.errors import ConfigError, InputError, Interrupted
from batchclf.evaluation import Measures, Mistake, confident_mistakes, measure, top_scores
from batchclf.labelled import Labelled, read_labelled
from batchclf.local_folder import check_writable
from batchclf.log import fields
from batchclf.model import GPT2Classifier
from batchclf.model_config import Head, ModelConfig
from batchclf.progress import Style
from batchclf.text import normalise
from batchclf.train import (
    Examples,
    Fitted,
    Surroundings,
    TrainingCheckpoints,
    TrainingDisplay,
    TrainSettings,
    fit,
    predict,
    train_tokenizer,
)
from batchclf.train.examples import tokenise
from batchclf.train.processes import Processes, join
from batchclf.train.splits import Splits, choose_labels, compare, to_examples

log = logging.getLogger(__name__)

REPORT = "report"  # the folder in the model directory
_SPLIT_NAMES = {"test": "test", "val": "validation"}

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TrainJob:
    """What `train` was asked for.

    Attributes:
        test: files that are measured after training, and change nothing in it; may be none.
        base_model: a model directory or hub name to start from, or a config JSON in Hugging
            Face's words to start from scratch.
        vocab_size: of the tokenizer that is trained with a model from scratch.
        labels: their order; empty for those of the training data, sorted.
        weights: how they are saved; float16 takes half the space.
        drop_leaked: leave out training articles that also stand in the validation or test data.
        checkpoint_dir: where a training checkpoint is kept that a stopped run goes on from.
        checkpoint_steps: how many steps of the optimizer lie between two of them.
        style: where progress is shown.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    base_model: str
    output: str
    settings: TrainSettings
    test: tuple[str, ...] = ()
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
    checkpoint_dir: str | None = None
    checkpoint_steps: int = 1000
    style: Style = "none"
    endpoint_url: str | None = None

    def run(self, interrupt: threading.Event | None = None) -> dict[str, Any]:
        """Train, measure and save; returns the metrics, in the first process of several.

        Args:
            interrupt: set when the run should stop soon.

        Raises:
            InputError: a file cannot be read, or holds a label that is not known; says which row.
            ConfigError, CheckpointError: the settings or the base model make no sense.
            Interrupted: asked to stop, or another process of the run went away.
            OutOfSpaceError: the disk is full.
        """
        began = time.perf_counter()
        self._check_places()
        with join(self.device) as processes:
            if not processes.is_first:
                logging.getLogger("batchclf").setLevel(logging.ERROR)
            splits = self._read_splits()
            labels = choose_labels(splits.train, self.labels)
            examples = {name: to_examples(found, labels) for name, found in splits.by_name.items()}
            log.info(
                "training on %d articles, %d labels; validating on %d",
                len(splits.train),
                len(labels),
                len(splits.by_name["val"]),
                extra=fields(
                    **{name: len(found) for name, found in splits.by_name.items()},
                    labels=list(labels),
                ),
            )
            model, tokenizer = self._first_model(splits.train.texts, len(labels))
            fitted = self._fit(
                model.to(processes.device), tokenizer, examples, processes, interrupt
            )
        if not processes.is_first:
            return {}
        logits = {"val": fitted.val_logits}
        if "test" in examples:
            logits["test"] = self._predict(fitted.model, tokenizer, examples["test"], interrupt)
        temperature = _temperature(fitted.val_logits, examples["val"])
        measures = {
            name: measure(logits[name], np.array(examples[name].labels), labels, temperature)
            for name in _SPLIT_NAMES
            if name in logits
        }
        metrics = _metrics(measures, fitted)
        training = self._describe(splits, time.perf_counter() - began)

        def add_report(directory: Path) -> None:
            from batchclf.training_report import write_training_report

            first = next(iter(measures))
            write_training_report(
                directory / REPORT,
                title=f"Training of {Path(self.output).name}",
                history=fitted.history.as_dict(),
                measures={_SPLIT_NAMES[name]: found for name, found in measures.items()},
                details={"temperature": temperature, **training},
                mistakes=_mistakes(logits[first] / temperature, examples[first], labels),
            )

        save(
            self.output,
            fitted.model.to("cpu"),
            tokenizer,
            labels,
            max_length=self.settings.max_length,
            normalise=self.settings.normalise,
            temperature=temperature,
            training=training,
            metrics=metrics,
            weights_dtype=getattr(torch, self.weights),
            overwrite=self.overwrite,
            add_report=add_report,
        )
        return metrics

    def _check_places(self) -> None:
        """Training may take a night: what cannot be written is known before."""
        check_writable("--output", self.output)
        if self.checkpoint_dir is not None:
            check_writable("--checkpoint-dir", self.checkpoint_dir)
        check_free(Path(self.output), overwrite=self.overwrite)

    def _read_splits(self) -> Splits:
        by_name = {"train": self.train, "val": self.val, "test": self.test}
        found = {name: self._read(inputs, name) for name, inputs in by_name.items() if inputs}
        return compare(found, drop_leaked=self.drop_leaked)

    def _read(self, inputs: Sequence[str], name: str) -> Labelled:
        found = read_labelled(
            inputs,
            text_columns=self.text_columns,
            label_column=self.label_column,
            delimiter=self.delimiter,
            endpoint_url=self.endpoint_url,
        )
        if not len(found):
            raise InputError(f"--{name} {', '.join(inputs)}: no labelled articles there")
        if found.num_without_text:
            log.warning("--%s: left out %d rows without text", name, found.num_without_text)
        return found

    def _first_model(self, texts: Sequence[str], num_labels: int) -> tuple[GPT2Classifier, Any]:
        torch.manual_seed(self.settings.seed)
        head_length = self.settings.max_length if self.head == "flatten" else 0
        if Path(self.base_model).is_file():
            return self._from_scratch(texts, num_labels, head_length)
        return load_base(self.base_model, num_labels, self.head, head_length, self.endpoint_url)

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

    def _fit(
        self,
        model: GPT2Classifier,
        tokenizer: Any,
        examples: Mapping[str, Examples],
        processes: Processes,
        interrupt: threading.Event | None,
    ) -> Fitted:
        checkpoints = None
        if self.checkpoint_dir is not None:
            checkpoints = TrainingCheckpoints(Path(self.checkpoint_dir), self.checkpoint_steps)
        with TrainingDisplay(self.style if processes.is_first else "none") as display:
            around = Surroundings(processes, checkpoints, interrupt, display)
            return fit(model, tokenizer, examples["train"], examples["val"], self.settings, around)

    def _predict(
        self,
        model: GPT2Classifier,
        tokenizer: Any,
        examples: Examples,
        interrupt: threading.Event | None,
    ) -> Logits:
        settings = self.settings

        def stop_if_asked() -> None:
            if interrupt is not None and interrupt.is_set():
                raise Interrupted(
                    "interrupted while the test articles were measured; "
                    + ("run the same command again" if self.checkpoint_dir else "nothing was saved")
                )

        device = str(next(model.parameters()).device)
        texts = tokenise(tokenizer, examples, settings.normalise, model.config.num_labels)
        return predict(
            model,
            texts.cut(settings.max_length).ids,
            settings.batch_tokens,
            choose_compute(device, settings.precision).dtype,
            stop_if_asked,
        ).numpy()

    def _describe(self, splits: Splits, seconds: float) -> dict[str, Any]:
        return {
            **{f"num_{name}": len(found) for name, found in splits.by_name.items()},
            "repeats": dict(splits.repeats),
            "num_leaked_dropped": splits.num_dropped,
            "labels": dict(Counter(splits.train.labels)),
            **{f"{name}_sha256": _digest(found) for name, found in splits.by_name.items()},
            "settings": asdict(self.settings),
            "seconds": round(seconds, 1),
        }


def _temperature(val_logits: Logits, val: Examples) -> float:
    labels = np.array(val.labels)
    if (val_logits.argmax(axis=1) == labels).all():
        log.warning(
            "all %d validation articles are labelled right, which says nothing of how sure to be; "
            "the temperature stays 1",
            len(labels),
        )
    return fit_temperature(val_logits, labels)


def _metrics(measures: Mapping[str, Measures], fitted: Fitted) -> dict[str, Any]:
    """The few numbers that travel with the model; the report has them all."""
    metrics: dict[str, Any] = {"best_epoch": fitted.history.best_epoch}
    for name, found in measures.items():
        metrics |= {
            f"num_{name}": found.num_examples,
            f"{name}_accuracy": found.accuracy,
            f"{name}_macro_f1": found.macro_f1,
            f"{name}_loss": found.log_loss,
            f"{name}_ece": found.ece,
        }
    return metrics


def _mistakes(logits: Logits, examples: Examples, labels: Sequence[str]) -> list[Mistake]:
    scores = top_scores(logits)
    return [
        Mistake(
            place=examples.place(row),
            text=examples.texts[row],
            label=labels[examples.labels[row]],
            predicted=labels[int(logits[row].argmax())],
            score=float(scores[row]),
        )
        for row in confident_mistakes(logits, np.array(examples.labels))
    ]


def _digest(found: Labelled) -> str:
    lines = sorted(
        f"{label}\0{text}" for label, text in zip(found.labels, found.texts, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
