from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from batchclf.errors import ConfigError
from batchclf.text import Normalisation

Schedule = Literal["cosine", "linear"]
ClassWeights = Literal["none", "balanced"]
Precision = Literal["auto", "float32", "bfloat16"]

_Rule = tuple[Callable[[Any], bool], str]
_AT_LEAST_1: _Rule = (lambda value: value >= 1, "at least 1")
_ABOVE_0: _Rule = (lambda value: value > 0, "above 0")
_NOT_BELOW_0: _Rule = (lambda value: value >= 0, "0 or more")
_SHARE: _Rule = (lambda value: 0 <= value < 1, "from 0 to below 1")


def _one_of(choices: Any) -> _Rule:
    known = get_args(choices)
    return (lambda value: value in known), f"one of {', '.join(known)}"


_RULES = {
    **dict.fromkeys(
        ("max_length", "epochs", "batch_tokens", "accumulate", "patience"), _AT_LEAST_1
    ),
    **dict.fromkeys(("learning_rate", "clip_norm"), _ABOVE_0),
    **dict.fromkeys(("weight_decay", "lm_weight", "freeze_layers", "seed"), _NOT_BELOW_0),
    **dict.fromkeys(("warmup_share", "crop_share", "noise_share"), _SHARE),
    **dict.fromkeys(("label_smoothing", "average", "dropout"), _SHARE),
    "schedule": _one_of(Schedule),
    "class_weights": _one_of(ClassWeights),
    "precision": _one_of(Precision),
}


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The defaults are for fine-tuning GPT-2.

    Attributes:
        max_length: tokens of a text that the model is given.
        normalise: what is done to a text before it is tokenised.
        batch_tokens: the token budget of a batch, padding included; over all processes together.
        accumulate: batches whose gradients make one step of the optimizer.
        learning_rate: its top, reached after the warm-up.
        schedule: how the learning rate falls after that.
        warmup_share: of all steps.
        weight_decay: of the matrices; embeddings, norms and biases have none.
        clip_norm: gradients are scaled down to this norm.
        label_smoothing: share of the probability that goes to all labels alike.
        dropout: in all places; None for what the model's configuration says.
        class_weights: `balanced` makes all labels count the same, however often they occur.
        lm_weight: weight of the language-model loss beside that of the labels. Source: section 3.2
            of "Improving Language Understanding by Generative Pre-Training" (2018).
        freeze_layers: the embeddings and so many lower layers stay as they are; 0 freezes nothing.
        patience: stop after so many epochs without a lower validation loss; None never does.
        average: decay of the moving average of the weights that is validated and kept; 0 for the
            weights themselves.
        crop_share: of the examples, in each epoch, that are read from a random place on and to a
            random length, as if the text were that piece alone.
        noise_share: of the tokens in training that are replaced by random ones.
        precision: of the matrix products; the weights are float32. `auto` is bfloat16 where the
            device is fast at it.
        gradient_checkpointing: compute layers again in the backward pass instead of keeping what
            they made: less memory, a third more work.
    """

    max_length: int
    normalise: Normalisation = "none"
    epochs: int = 3
    batch_tokens: int = 4096
    accumulate: int = 1
    learning_rate: float = 5e-5
    schedule: Schedule = "cosine"
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    dropout: float | None = None
    class_weights: ClassWeights = "none"
    lm_weight: float = 0.0
    freeze_layers: int = 0
    patience: int | None = None
    average: float = 0.0
    crop_share: float = 0.0
    noise_share: float = 0.0
    seed: int = 0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, (is_right, rule) in _RULES.items():
            value = getattr(self, name)
            if value is not None and not is_right(value):
                raise ConfigError(f"{name} must be {rule}, not {value}")
