"""Training on texts and labels in memory: tokenizer, weights, temperature.

Shapes: B rows of a batch, T tokens of its longest row, C labels.
"""
# ruff: noqa: N806 - names of tensors end in their shape, in capitals

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from batchclf.batching import plan_batches
from batchclf.checkpoint import END_OF_TEXT
from batchclf.errors import ConfigError, InputError
from batchclf.log import fields
from batchclf.model import GPT2Classifier
from batchclf.text import Normalisation, normalise

log = logging.getLogger(__name__)

_BETAS = (0.9, 0.98)
_LAST_LEARNING_RATE = 0.05  # where the cosine ends, as a share of its top
_TEMPERATURES = (0.05, 20.0)
_TEMPERATURE_STEPS = 60  # each leaves 0.62 of the interval: 1e-12 of it in the end

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Examples:
    """Texts with their labels, as positions in the model's list of labels."""

    texts: Sequence[str]
    labels: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise InputError(f"{len(self.texts)} texts, but {len(self.labels)} labels")
        if not self.texts:
            raise InputError("no examples")


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        max_length: tokens of a text that the model is given.
        normalise: what is done to a text before it is tokenised.
        batch_tokens: the token budget of a batch, padding included.
        learning_rate: its top, reached after the warm-up.
        warmup_share: of all steps.
        weight_decay: of the matrices; embeddings, norms and biases have none.
        crop_share: of the examples, in each epoch, that are read from a random place on and to a
            random length, as if the text were that piece alone.
        noise_share: of the tokens in training that are replaced by random ones.
    """

    max_length: int
    normalise: Normalisation = "none"
    epochs: int = 3
    batch_tokens: int = 4096
    learning_rate: float = 5e-5
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    crop_share: float = 0.0
    noise_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_length", "epochs", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup_share", "crop_share", "noise_share", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Trained:
    """The model after its best epoch, in eval mode.

    Attributes:
        temperature: logits are divided by it before softmax; fits the validation examples.
        metrics: on the validation examples, in plain values.
    """

    model: GPT2Classifier
    temperature: float
    metrics: dict[str, Any]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's, with the end-of-text token (id 0) as its only special.

    Args:
        texts: what it will have to spell, normalised as the model's input.
        vocab_size: tokens at most; 256 bytes and the end-of-text token are always among them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def fit(
    model: GPT2Classifier,
    tokenizer: Tokenizer,
    train: Examples,
    val: Examples,
    settings: TrainSettings,
) -> Trained:
    """Train a model, in place, and keep the weights of the epoch with the lowest validation loss.

    The same seed on the same machine with as many threads gives the same weights.

    Raises:
        ConfigError: the model cannot read `max_length` tokens.
        InputError: a text without tokens, or a label that the model does not have.
    """
    if settings.max_length > model.config.longest:
        raise ConfigError(
            f"max_length {settings.max_length}: the model reads at most {model.config.longest}"
        )
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    train_ids = _tokenise(tokenizer, train, settings, model.config.num_labels)
    val_ids = [
        ids[: settings.max_length]
        for ids in _tokenise(tokenizer, val, settings, model.config.num_labels)
    ]
    train_labels, val_labels = torch.tensor(train.labels), torch.tensor(val.labels)
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=_BETAS
    )
    best_loss, best_epoch, best_state = math.inf, 0, model.state_dict()
    for epoch in range(settings.epochs):
        seen = _augment(train_ids, settings, model.config.vocab_size, rng)
        batches = _shuffled_batches(seen, settings.batch_tokens, rng)
        train_loss = 0.0
        model.train()
        for step, batch in enumerate(batches):
            progress = (epoch + step / len(batches)) / settings.epochs
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(progress, settings.warmup_share)
            logits_BC = _forward(model, [seen[row] for row in batch])
            targets_B = train_labels[batch].to(logits_BC.device)
            loss = F.cross_entropy(logits_BC, targets_B, label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            train_loss += loss.item() * len(batch) / len(seen)
        val_logits = predict(model, val_ids, settings.batch_tokens)
        val_loss = F.cross_entropy(val_logits, val_labels).item()
        if val_loss < best_loss:
            best_loss, best_epoch = val_loss, epoch + 1
            best_state = copy.deepcopy(model.state_dict())
        log.info(
            "epoch %d of %d: training loss %.4f, validation loss %.4f, accuracy %.4f",
            epoch + 1,
            settings.epochs,
            train_loss,
            val_loss,
            val_accuracy := _accuracy(val_logits, val_labels),
            extra=fields(
                epoch=epoch + 1,
                train_loss=train_loss,
                val_loss=val_loss,
                val_accuracy=val_accuracy,
            ),
        )
    if not best_epoch:
        raise InputError("the validation loss was never a number; try a lower learning rate")
    model.load_state_dict(best_state)
    model.eval()
    val_logits = predict(model, val_ids, settings.batch_tokens)
    temperature = fit_temperature(val_logits, val_labels)
    return Trained(
        model,
        temperature,
        {
            "num_val": len(val.texts),
            "best_epoch": best_epoch,
            "val_accuracy": _accuracy(val_logits, val_labels),
            "val_macro_f1": _macro_f1(val_logits, val_labels),
            "val_loss": F.cross_entropy(val_logits / temperature, val_labels).item(),
        },
    )


def predict(model: GPT2Classifier, texts: Sequence[Ids], batch_tokens: int) -> Tensor:
    """Logits [texts, C] on the CPU, in the order of the texts; leaves the model in eval mode.

    Args:
        model: the classifier.
        texts: token ids of each text, at least one and no more than the model reads.
        batch_tokens: the token budget of a batch, padding included.
    """
    model.eval()
    kept = [ids[: model.config.num_pooled_tokens(ids)] for ids in texts]
    logits = torch.empty(len(texts), model.config.num_labels)
    with torch.inference_mode():
        for batch in plan_batches([len(ids) for ids in kept], batch_tokens):
            logits[batch] = _forward(model, [kept[row] for row in batch]).cpu()
    return logits


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """What to divide logits by so that the softmax is as likely as can be.

    Golden-section search on the logarithm; the loss has one minimum in it. Source: Guo and others,
    "On Calibration of Modern Neural Networks" (2017).

    Args:
        logits: [examples, C].
        labels: [examples].
    """

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits.double() / math.exp(log_temperature), labels).item()

    golden = (math.sqrt(5) - 1) / 2
    low, high = (math.log(bound) for bound in _TEMPERATURES)
    for _ in range(_TEMPERATURE_STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def _tokenise(
    tokenizer: Tokenizer, examples: Examples, settings: TrainSettings, num_labels: int
) -> list[Ids]:
    for label in examples.labels:
        if not 0 <= label < num_labels:
            raise InputError(f"label {label} is none of the model's {num_labels}")
    texts = [normalise(text, settings.normalise) for text in examples.texts]
    texts_ids = [np.array(found.ids, np.int32) for found in tokenizer.encode_batch_fast(texts)]
    for row, ids in enumerate(texts_ids):
        if not len(ids):
            raise InputError(f"the text of example {row} is empty")
    return texts_ids


def _augment(
    texts: Sequence[Ids], settings: TrainSettings, vocab_size: int, rng: np.random.Generator
) -> list[Ids]:
    """The texts as one epoch sees them: cut, some at random places, and with random tokens."""
    seen = []
    for text in texts:
        ids = text
        if rng.random() < settings.crop_share:
            length = int(rng.integers(settings.max_length // 4, settings.max_length, endpoint=True))
            start = int(rng.integers(max(len(ids) - length, 0), endpoint=True))
            ids = ids[start : start + length]
        ids = ids[: settings.max_length]
        noise = rng.random(len(ids)) < settings.noise_share
        seen.append(np.where(noise, rng.integers(vocab_size, size=len(ids), dtype=np.int32), ids))
    return seen


def _shuffled_batches(
    texts: Sequence[Ids], batch_tokens: int, rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """Batches of similar lengths in random order, with random company among equal lengths."""
    order = rng.permutation(len(texts))
    planned = plan_batches([len(texts[row]) for row in order], batch_tokens)
    return [order[planned[place]] for place in rng.permutation(len(planned))]


def _schedule(progress: float, warmup_share: float) -> float:
    """The learning rate as a share of its top: linear to 1, then a half cosine down."""
    if progress < warmup_share:
        return progress / warmup_share
    rest = (progress - warmup_share) / (1 - warmup_share)
    return _LAST_LEARNING_RATE + (1 - _LAST_LEARNING_RATE) * (1 + math.cos(math.pi * rest)) / 2


def _parameter_groups(model: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith(("wte.weight", "wpe.weight"))
        (decayed if is_matrix else others).append(parameter)
    yield {"params": decayed, "weight_decay": weight_decay}
    yield {"params": others, "weight_decay": 0.0}


def _forward(model: GPT2Classifier, texts: Sequence[Ids]) -> Tensor:
    device = next(model.parameters()).device
    lengths = torch.tensor([len(ids) for ids in texts])
    ids_BT = nn.utils.rnn.pad_sequence([torch.from_numpy(ids) for ids in texts], batch_first=True)
    logits_BC: Tensor = model(ids_BT.to(device), lengths.to(device))
    return logits_BC


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def _macro_f1(logits: Tensor, labels: Tensor) -> float:
    """The mean over labels of F1; a label neither present nor predicted counts as 0."""
    predicted = F.one_hot(logits.argmax(1), logits.shape[1])
    actual = F.one_hot(labels, logits.shape[1])
    hits = (predicted * actual).sum(0)
    return (2 * hits / (predicted + actual).sum(0).clamp(min=1)).mean().item()
