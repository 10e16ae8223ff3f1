"""GPT-2's forward pass over texts that lie end to end: what a GPU computes.

All that is not attention works on one matrix of tokens and does not care whose they are. Only
attention has to know where a text begins, and there are two ways for it, with one and the same
forward around them:

- `VarlenAttention` is told the borders. No token is padding. CUDA in half precision alone.
- `PaddedAttention` reads the matrix as rows of one length, so texts are padded on the right, and
  causal attention never looks there. Any device and dtype.

What lies between two attentions is one function of tensors, which `torch.compile` may fuse: layer
norm, GELU and residuals cost reads and writes of memory, not arithmetic.

Shapes: B texts of a batch, M tokens of them all, T tokens of the longest, H hidden size, N
attention heads, D size of a head, C labels, L positions of the flatten head.
"""
# ruff: noqa: N802, N803, N806, N815 - names of tensors end in their shape, in capitals

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from batchclf.model import ACTIVATIONS, GPT2Classifier
from batchclf.model_config import ModelConfig

Backend = str | Callable[..., Any]  # of torch.compile

# What FlashAttention reads: https://github.com/Dao-AILab/flash-attention (its API checks them).
_FLASH_CAPABILITY = (8, 0)  # Ampere
_FLASH_HEAD_SIZES = range(8, 257, 8)


@dataclass(frozen=True)
class Batch:
    """Texts end to end, on the model's device.

    Attributes:
        ids_M: token ids.
        columns_M: int64, place of each token in its text; beyond the text's length it is padding.
        rows_M: int64, which text each token belongs to.
        starts_B1: int32 [B + 1], where each text begins and the last one ends, padding included.
        lengths_B: int64, tokens of each text, without padding.
        longest: the most tokens of a text, without padding.
    """

    ids_M: Tensor
    columns_M: Tensor
    rows_M: Tensor
    starts_B1: Tensor
    lengths_B: Tensor
    longest: int

    @property
    def last_B(self) -> Tensor:
        """Where in M the last token of each text is."""
        return self.starts_B1[:-1] + self.lengths_B - 1


def lay_out(
    ids: Tensor, starts_B: Tensor, lengths_B: Tensor, *, num_tokens: int, longest: int, pad: bool
) -> Batch:
    """Texts out of a longer run of tokens, one after the other; nothing waits for the device.

    Args:
        ids: token ids of many texts.
        starts_B: int64, where in `ids` each text begins.
        lengths_B: int64, tokens of each text, at least 1.
        num_tokens: how many that makes, padding included: the caller knows, and asking the device
            would mean to wait for it.
        longest: the largest of the lengths, known likewise.
        pad: give each text as many tokens as the longest one has.
    """
    device, batch = ids.device, len(lengths_B)
    steps_M = torch.arange(num_tokens, device=device)
    if pad:
        starts_B1 = torch.arange(batch + 1, device=device) * longest
        rows_M = steps_M // longest
    else:
        starts_B1 = F.pad(lengths_B.cumsum(0), (1, 0))
        rows_M = torch.searchsorted(starts_B1[1:], steps_M, right=True)
    columns_M = steps_M - starts_B1[rows_M]
    # Beyond a text's end any token will do: causal attention never looks there.
    places_M = (starts_B[rows_M] + columns_M).clamp(max=len(ids) - 1)
    return Batch(ids[places_M], columns_M, rows_M, starts_B1.to(torch.int32), lengths_B, longest)


class Attention(Protocol):
    """Causal attention within each text of a batch."""

    name: str
    pads: bool  # whether texts must be padded to one length

    def all_tokens(
        self, query_MND: Tensor, key_MND: Tensor, value_MND: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        """[M, N, D]."""

    def last_tokens(
        self, query_BND: Tensor, key_MND: Tensor, value_MND: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        """The last token of each text alone, which sees the whole text: [B, N, D]."""


class PaddedAttention:
    """Rows of one length, without a mask: any fast kernel will do."""

    name = "padded"
    pads = True

    def all_tokens(
        self, query_MND: Tensor, key_MND: Tensor, value_MND: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        query, key, value = (
            _rows(tensor, batch.longest) for tensor in (query_MND, key_MND, value_MND)
        )
        attended_BNTD = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale
        )
        return attended_BNTD.transpose(1, 2).flatten(0, 1)

    def last_tokens(
        self, query_BND: Tensor, key_MND: Tensor, value_MND: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        key, value = (_rows(tensor, batch.longest) for tensor in (key_MND, value_MND))
        seen_BT = torch.arange(batch.longest, device=query_BND.device) < batch.lengths_B[:, None]
        attended_BN1D = F.scaled_dot_product_attention(
            query_BND[:, :, None], key, value, attn_mask=seen_BT[:, None, None], scale=scale
        )
        return attended_BN1D.squeeze(2)


def _rows(tensor_MND: Tensor, length: int) -> Tensor:
    """As rows of one length: [B, N, T, D], nothing is copied."""
    return tensor_MND.view(-1, length, *tensor_MND.shape[1:]).transpose(1, 2)


class VarlenAttention:
    """FlashAttention that is told where each text begins.

    Source: https://docs.pytorch.org/docs/2.11/nn.attention.varlen.html
    """

    name = "varlen"
    pads = False

    def __init__(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self._attend: Callable[..., Any] = varlen_attn

    def all_tokens(
        self, query_MND: Tensor, key_MND: Tensor, value_MND: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        borders, longest = batch.starts_B1, batch.longest
        attended_MND: Tensor = self._attend(
            query_MND,
            key_MND,
            value_MND,
            borders,
            borders,
            longest,
            longest,
            scale=scale,
            window_size=(-1, 0),  # causal
        )
        return attended_MND

    def last_tokens(
        self, query_BND: Tensor, key_MND: Tensor, value_MND: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        one_each = torch.arange(len(query_BND) + 1, dtype=torch.int32, device=query_BND.device)
        attended_BND: Tensor = self._attend(
            query_BND,
            key_MND,
            value_MND,
            one_each,
            batch.starts_B1,
            1,
            batch.longest,
            scale=scale,
            window_size=(-1, -1),
        )
        return attended_BND


def attentions(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Attention]:
    """Those that this device and torch have for a model; the one to use unmeasured comes first."""
    found: list[Attention] = [PaddedAttention()]
    if _has_varlen(config.hidden_size // config.num_heads, device, dtype):
        found.insert(0, VarlenAttention())
    return found


def _has_varlen(head_size: int, device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or dtype not in {torch.bfloat16, torch.float16}:
        return False
    if torch.version.hip or torch.cuda.get_device_capability(device) < _FLASH_CAPABILITY:
        return False
    if head_size not in _FLASH_HEAD_SIZES or not torch.backends.cuda.is_flash_attention_available():
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    # torch 2.10 had `is_causal` in its place
    return "window_size" in inspect.signature(varlen_attn).parameters


class _Entry(NamedTuple):
    """Into attention: a layer norm and the product that follows it."""

    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor


class _Exit(NamedTuple):
    """Out of attention, to the end of the layer."""

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    inner_weight: Tensor
    inner_bias: Tensor
    outer_weight: Tensor
    outer_bias: Tensor


def _enter(hidden_MH: Tensor, layer: _Entry, eps: float) -> Tensor:
    normed_MH = F.layer_norm(
        hidden_MH, layer.norm_weight.shape, layer.norm_weight, layer.norm_bias, eps
    )
    return F.linear(normed_MH, layer.weight, layer.bias)


def _leave(
    attended_MH: Tensor, hidden_MH: Tensor, layer: _Exit, eps: float, activation: str
) -> Tensor:
    hidden_MH = hidden_MH + F.linear(attended_MH, layer.weight, layer.bias)
    normed_MH = F.layer_norm(
        hidden_MH, layer.norm_weight.shape, layer.norm_weight, layer.norm_bias, eps
    )
    inner = ACTIVATIONS[activation](F.linear(normed_MH, layer.inner_weight, layer.inner_bias))
    return hidden_MH + F.linear(inner, layer.outer_weight, layer.outer_bias)


def _between(
    attended_MH: Tensor,
    hidden_MH: Tensor,
    layer: _Exit,
    following: _Entry,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """From one attention to the next: the residual stream, and what goes into the next."""
    hidden_MH = _leave(attended_MH, hidden_MH, layer, eps, activation)
    return hidden_MH, _enter(hidden_MH, following, eps)


def _constant(tensor: Tensor) -> Tensor:
    """A weight as `torch.compile` knows one: its shape never varies. Nothing is copied."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


class VarlenClassifier:
    """What `GPT2Classifier` computes, for texts that lie end to end. For inference alone.

    Args:
        model: in eval mode; its weights are shared.
        attention: from `attentions`.
        backend: of `torch.compile`, such as `inductor`; None runs operation by operation.
    """

    def __init__(
        self, model: GPT2Classifier, attention: Attention, backend: Backend | None = None
    ) -> None:
        self.attention = attention
        self.is_compiled = backend is not None
        self._model = model
        self._config = config = model.config
        self._eps, self._activation = config.layer_norm_eps, config.activation
        transformer: Any = model.transformer
        size = config.hidden_size
        self._entries: list[_Entry] = []
        self._exits: list[_Exit] = []
        self._scales: list[float] = []
        for block in transformer.h:
            norm, joined, mlp = block.ln_1, block.attn.c_attn, block.mlp
            into = (norm.weight, norm.bias, joined.weight, joined.bias)
            self._entries.append(_Entry(*map(_constant, into)))
            out = (
                *(block.attn.c_proj.weight, block.attn.c_proj.bias),
                *(block.ln_2.weight, block.ln_2.bias),
                *(mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias),
            )
            self._exits.append(_Exit(*map(_constant, out)))
            self._scales.append(block.attn.scale)
        self._last_query: _Entry | None = None
        if config.head == "last_token":
            # The last layer: keys and values of all tokens, but the query of the last one alone.
            last = self._entries[-1]
            norms = last.norm_weight, last.norm_bias
            query = _constant(last.weight[:size]), _constant(last.bias[:size])
            key_value = _constant(last.weight[size:]), _constant(last.bias[size:])
            self._last_query = _Entry(*norms, *query)
            self._entries[-1] = _Entry(*norms, *key_value)
        self._enter = _compiled(_enter, 1, backend)
        self._leave = _compiled(_leave, 2, backend)
        self._between = _compiled(_between, 2, backend)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        """Float32 logits [B, C]."""
        if self._config.head == "flatten":
            return self._flatten_logits(batch)
        hidden_MH, joined = self._before_last_attention(batch, batch.columns_M)
        last_B = batch.last_B
        pooled_BH = hidden_MH[last_B]
        asked = self._enter(pooled_BH, cast("_Entry", self._last_query), self._eps)
        (query,), (key, value) = self._heads(asked, 1), self._heads(joined, 2)
        attended = self.attention.last_tokens(query, key, value, batch, self._scales[-1])
        pooled_BH = self._leave(
            attended.flatten(1), pooled_BH, self._exits[-1], self._eps, self._activation
        )
        return F.linear(self._final(pooled_BH).float(), self._model.score.weight.float())

    def _before_last_attention(self, batch: Batch, positions_M: Tensor) -> tuple[Tensor, Tensor]:
        transformer: Any = self._model.transformer
        hidden_MH = transformer.embed(batch.ids_M, positions_M)
        joined = self._enter(hidden_MH, self._entries[0], self._eps)
        for layer, following in enumerate(self._entries[1:]):
            query, key, value = self._heads(joined, 3)
            attended = self.attention.all_tokens(query, key, value, batch, self._scales[layer])
            hidden_MH, joined = self._between(
                attended.flatten(1),
                hidden_MH,
                self._exits[layer],
                following,
                self._eps,
                self._activation,
            )
        return hidden_MH, joined

    def _flatten_logits(self, batch: Batch) -> Tensor:
        """As `GPT2Classifier._flatten_logits`: pads on the left are a table, positions count on."""
        length, size = self._config.head_length, self._config.hidden_size
        pads_B = length - batch.lengths_B
        positions_M = (pads_B[batch.rows_M] + batch.columns_M).clamp(max=length - 1)
        hidden_MH, joined = self._before_last_attention(batch, positions_M)
        query, key, value = self._heads(joined, 3)
        attended = self.attention.all_tokens(query, key, value, batch, self._scales[-1])
        hidden_MH = self._leave(
            attended.flatten(1), hidden_MH, self._exits[-1], self._eps, self._activation
        )
        # Each token at its position of its text, zeros before it; padding on the right is dropped
        # into a place behind all texts.
        num_texts = len(pads_B)
        is_real_M = batch.columns_M < batch.lengths_B[batch.rows_M]
        places_M = torch.where(is_real_M, batch.rows_M * length + positions_M, num_texts * length)
        placed = hidden_MH.new_zeros((num_texts * length + 1, size), dtype=torch.float32)
        placed.index_copy_(0, places_M, self._final(hidden_MH).float())
        logits_BC = F.linear(
            placed[:-1].view(num_texts, length * size),
            self._model.fc1.weight.float(),
            self._model.fc1.bias.float(),
        )
        return logits_BC + self._model.pad_table()[pads_B]

    def _heads(self, joined: Tensor, count: int) -> tuple[Tensor, ...]:
        return joined.view(len(joined), count, self._config.num_heads, -1).unbind(1)

    def _final(self, hidden: Tensor) -> Tensor:
        transformer: Any = self._model.transformer
        normed: Tensor = transformer.ln_f(hidden)
        return normed


def _compiled(
    function: Callable[..., Any], num_ragged: int, backend: Backend | None
) -> Callable[..., Any]:
    """A function whose first arguments have any number of tokens, compiled once for all numbers."""
    if backend is None:
        return function
    compiled = torch.compile(function, backend=backend, fullgraph=True)

    def call(*args: Any) -> Any:
        if len(args[0]) < 2:  # noqa: PLR2004 - 0 and 1 are numbers of their own to the compiler
            return function(*args)
        for ragged in args[:num_ragged]:
            torch._dynamo.mark_dynamic(ragged, 0)  # noqa: SLF001 - documented under this name
        return compiled(*args)

    return call
