"""What the shape and the arithmetic of a classifier depend on, and how `config.json` says it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from batchclf.errors import CheckpointError

Head = Literal["last_token", "flatten"]

# Activation functions, as Hugging Face names them.
ACTIVATION_NAMES = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "swish")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the shape and the arithmetic of the classifier depend on.

    Attributes:
        head: `last_token` is Hugging Face's `GPT2ForSequenceClassification`; `flatten` is the
            `SimpleGPT2SequenceClassifier` of https://github.com/haocai1992/GPT2-News-Classifier.
        head_length: positions that the flatten head reads; 0 for `last_token`.
        pad_token_id: what the flatten head's missing positions hold, and what `last_token` drops
            from the end of a text (see `num_pooled_tokens`).
    """

    vocab_size: int
    max_positions: int
    hidden_size: int
    num_layers: int
    num_heads: int
    inner_size: int
    num_labels: int
    head: Head = "last_token"
    head_length: int = 0
    activation: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    embd_dropout: float = 0.1
    attn_dropout: float = 0.1
    resid_dropout: float = 0.1
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"n_embd {self.hidden_size} is not a multiple of n_head {self.num_heads}"
            )
        if self.activation not in ACTIVATION_NAMES:
            raise CheckpointError(
                f"activation_function {self.activation!r} is not supported; "
                f"it must be one of {', '.join(ACTIVATION_NAMES)}"
            )
        if self.head == "last_token":
            if self.head_length:
                raise CheckpointError("the last_token head has no head_length")
            return
        if not 1 <= self.head_length <= self.max_positions:
            raise CheckpointError(
                f"head_length {self.head_length} of the flatten head must be between 1 and "
                f"n_positions {self.max_positions}"
            )
        if self.pad_token_id is None or not 0 <= self.pad_token_id < self.vocab_size:
            raise CheckpointError(
                f"the flatten head needs a pad_token_id below vocab_size {self.vocab_size}, "
                f"not {self.pad_token_id}; the original project pads with the end-of-text token"
            )

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        num_labels: int,
        *,
        head: Head = "last_token",
        head_length: int = 0,
    ) -> Self:
        """Read a Hugging Face `config.json`; absent keys have `GPT2Config`'s defaults.

        Raises:
            CheckpointError: it is not a GPT-2, or asks for something that would not be honoured.
        """
        _refuse_what_cannot_be_honoured(config, num_labels)
        hidden_size = _integer(config, "n_embd", "hidden_size", default=768)
        pad_token_id = config.get("pad_token_id")
        if pad_token_id is not None and type(pad_token_id) is not int:
            raise CheckpointError(f"pad_token_id {pad_token_id!r} is not a whole number")
        inner = {} if config.get("n_inner") is None else config
        return cls(
            vocab_size=_integer(config, "vocab_size", default=50257),
            max_positions=_integer(config, "n_positions", "max_position_embeddings", default=1024),
            hidden_size=hidden_size,
            num_layers=_integer(config, "n_layer", "num_hidden_layers", default=12),
            num_heads=_integer(config, "n_head", "num_attention_heads", default=12),
            inner_size=_integer(inner, "n_inner", default=4 * hidden_size),
            num_labels=num_labels,
            head=head,
            head_length=head_length,
            activation=str(config.get("activation_function", "gelu_new")),
            layer_norm_eps=_number(config, "layer_norm_epsilon", default=1e-5),
            scale_attn_weights=bool(config.get("scale_attn_weights", True)),
            scale_attn_by_inverse_layer_idx=bool(config.get("scale_attn_by_inverse_layer_idx")),
            embd_dropout=_number(config, "embd_pdrop", default=0.1),
            attn_dropout=_number(config, "attn_pdrop", default=0.1),
            resid_dropout=_number(config, "resid_pdrop", default=0.1),
            pad_token_id=pad_token_id,
        )

    def to_hf(self) -> dict[str, Any]:
        """The keys of a Hugging Face `config.json` that `from_hf` reads."""
        return {
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_positions": self.max_positions,
            "n_embd": self.hidden_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_inner": self.inner_size,
            "activation_function": self.activation,
            "layer_norm_epsilon": self.layer_norm_eps,
            "scale_attn_weights": self.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
            "embd_pdrop": self.embd_dropout,
            "attn_pdrop": self.attn_dropout,
            "resid_pdrop": self.resid_dropout,
            "pad_token_id": self.pad_token_id,
        }

    @property
    def flops_per_token(self) -> int:
        """Of the linear layers: 170 million for GPT-2 of 124M. Attention comes on top."""
        size = self.hidden_size
        return 2 * self.num_layers * (4 * size * size + 2 * size * self.inner_size)

    @property
    def longest(self) -> int:
        """The most tokens of a text that the model can read."""
        return self.head_length if self.head == "flatten" else self.max_positions

    def num_pooled_tokens(self, ids: npt.NDArray[np.int32]) -> int:
        """How many of a text's tokens, from the first, decide its logits.

        `GPT2ForSequenceClassification` pools the last token that is not `pad_token_id`, also where
        the text itself ends in that token, and the first token where there is no other. Tokens to
        the right of the pooled one are never seen. So a caller cuts a text to `max_length` first,
        then to this, and the last token left is the one to pool.

        The flatten head reads all tokens, pads inside the text included.

        Args:
            ids: token ids of one text, at least one.
        """
        if self.head == "flatten" or self.pad_token_id is None or ids[-1] != self.pad_token_id:
            return len(ids)
        others = np.flatnonzero(ids != self.pad_token_id)
        return int(others[-1]) + 1 if others.size else 1


def _refuse_what_cannot_be_honoured(config: Mapping[str, Any], num_labels: int) -> None:
    if config.get("model_type") != "gpt2":
        raise CheckpointError(
            f"model_type is {config.get('model_type')!r}; only 'gpt2' is supported"
        )
    problem_type = config.get("problem_type")
    if problem_type not in {None, "single_label_classification"}:
        raise CheckpointError(
            f"problem_type is {problem_type!r}; only single_label_classification is supported"
        )
    if num_labels < 2:  # noqa: PLR2004 - transformers takes one label for a regression
        raise CheckpointError(f"a classifier needs at least 2 labels, this model has {num_labels}")
    if config.get("add_cross_attention"):
        raise CheckpointError("add_cross_attention is set; a classifier has no encoder to attend")
    if config.get("is_causal", True) is not True:
        raise CheckpointError("is_causal is off; only causal attention is supported")
    if config.get("quantization_config"):
        raise CheckpointError(
            "the weights are quantized (quantization_config); use the original checkpoint"
        )


def _integer(config: Mapping[str, Any], *names: str, default: int) -> int:
    for name in names:
        value = config.get(name, None)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{name} {value!r} is not a whole number above 0")
        return value
    return default


def _number(config: Mapping[str, Any], name: str, *, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise CheckpointError(f"{name} {value!r} is not a number from 0 to below 1")
    return float(value)
