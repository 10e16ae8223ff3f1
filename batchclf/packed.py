"""GPT-2's forward pass on a CPU, with weights packed for its matrix units.

The logits of `model._Transformer`, in less time:

- weights are packed once into the layout that oneDNN multiplies with; `F.linear` does it at every
  call. Biases, GELU and the residual are added while a product is still in the registers;
- no more than a few sizes of products occur. oneDNN compiles each one and keeps it: 1.6 MB for
  each of a layer's four products, measured on AMX in bfloat16. So tokens are filled up to a
  multiple of a few dozen;
- a small float32 model multiplies few tokens, not filled up, as torch does, with weights that are
  kept as they were besides: to look up a packed product costs more then than packing saves.

Shapes: B rows of a batch, T tokens of the longest row, M tokens that are multiplied at once (B x T
filled up), H hidden size, N attention heads, D size of a head.
"""
# ruff: noqa: N803, N806 - names of tensors end in their shape, in capitals

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from batchclf.attention import attend
from batchclf.model import ACTIVATIONS, GPT2Classifier

log = logging.getLogger(__name__)

TOKENS_GRAIN = 32  # of tokens that are multiplied at once
_TYPICAL_TOKENS = 1024  # that the layout is chosen for
# Measured on a core with AVX2: to look up a packed product takes 55 microseconds. With 128 x 512
# weights 32 tokens took 192 packed and 143 plain, 224 tokens 886 and 897. With 768 x 3072 weights
# packed ones are the faster from 16 tokens on.
_FEW_TOKENS = 64
_FEW_WEIGHTS = 1 << 18  # of a layer's largest product
_OPS = torch.ops.mkldnn  # what torch's own compiler calls for packed products
# Activation functions that oneDNN knows, as it is told: name and variant.
_FUSED = {
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
}
_PROBE_TOLERANCE = 0.05  # of products of unit size, in bfloat16


def pack(model: GPT2Classifier) -> GPT2Classifier:
    """Swap the transformer of a model for a packed one, where this CPU and torch can do it.

    For inference alone: the model has no gradients and no `hf_state` afterwards.

    Args:
        model: on the CPU, in eval mode.

    Returns:
        The same model.
    """
    dtype = model.transformer.wte.weight.dtype
    if not can_pack(dtype):
        log.info("this CPU or torch cannot pack weights in %s; computing without", dtype)
        return model
    model.add_module("transformer", _PackedTransformer(model))
    return model


def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed products exist here, and are right."""
    if dtype not in {torch.float32, torch.bfloat16}:
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16 and not _OPS._is_mkldnn_bf16_supported():  # noqa: SLF001
        return False
    linear = nn.Linear(64, 64, dtype=dtype)
    input_MH = torch.linspace(-1, 1, 32 * 64).view(32, 64).to(dtype)
    with torch.inference_mode():
        try:
            packed = PackedLinear(linear.weight, linear.bias)
            found = packed.added(packed.activated(input_MH, "gelu_new"), input_MH)
        except (AttributeError, RuntimeError, NotImplementedError):
            return False
        wanted = linear(F.gelu(linear(input_MH), approximate="tanh")) + input_MH
    return bool((found - wanted).abs().max() < _PROBE_TOLERANCE)


class PackedLinear:
    """A linear layer with its weight in oneDNN's layout.

    Args:
        weight, bias: as of `nn.Linear`.
        few_tokens: up to so many are multiplied with the weight as it was.
    """

    def __init__(self, weight: Tensor, bias: Tensor, few_tokens: int = 0) -> None:
        with torch.inference_mode():
            own = weight.detach().contiguous()
            self._weight = _OPS._reorder_linear_weight(own, _TYPICAL_TOKENS)  # noqa: SLF001
        self._plain = own.clone() if few_tokens else None
        self._few_tokens = few_tokens
        self._bias = bias.detach().clone()

    def __call__(self, input_MH: Tensor) -> Tensor:
        """The product."""
        if (plain := self._plain_for(input_MH)) is not None:
            return F.linear(input_MH, plain, self._bias)
        output: Tensor = _OPS._linear_pointwise(  # noqa: SLF001
            input_MH, self._weight, self._bias, "none", [], ""
        )
        return output

    def activated(self, input_MH: Tensor, activation: str) -> Tensor:
        """The activation function of the product."""
        if (plain := self._plain_for(input_MH)) is not None:
            return ACTIVATIONS[activation](F.linear(input_MH, plain, self._bias))
        name, variant = _FUSED[activation]
        output: Tensor = _OPS._linear_pointwise(  # noqa: SLF001
            input_MH, self._weight, self._bias, name, [], variant
        )
        return output

    def added(self, input_MH: Tensor, residual_MH: Tensor) -> Tensor:
        """The product plus a residual."""
        if (plain := self._plain_for(input_MH)) is not None:
            return F.linear(input_MH, plain, self._bias).add_(residual_MH)
        output: Tensor = _OPS._linear_pointwise.binary(  # noqa: SLF001
            input_MH, residual_MH, self._weight, self._bias, "add"
        )
        return output

    def _plain_for(self, input_MH: Tensor) -> Tensor | None:
        return self._plain if len(input_MH) <= self._few_tokens else None


class _PackedBlock:
    """One layer: what `model._Block` computes."""

    def __init__(self, block: Any, activation: str, few_tokens: int, *, is_last: bool) -> None:
        def packed(weight: Tensor, bias: Tensor) -> PackedLinear:
            return PackedLinear(weight, bias, few_tokens)

        attention, mlp = block.attn, block.mlp
        self._few_tokens = few_tokens
        self._activation = activation
        self._num_heads, self._scale = attention.num_heads, attention.scale
        self._ln_1, self._ln_2 = block.ln_1, block.ln_2
        joined, size = attention.c_attn, attention.c_attn.in_features
        self._query_key_value = packed(joined.weight, joined.bias)
        # The last layer may be asked for the query of one token of each row.
        self._query = packed(joined.weight[:size], joined.bias[:size]) if is_last else None
        self._key_value = packed(joined.weight[size:], joined.bias[size:]) if is_last else None
        self._attention_output = packed(attention.c_proj.weight, attention.c_proj.bias)
        self._inner = packed(mlp.c_fc.weight, mlp.c_fc.bias)
        self._outer = packed(mlp.c_proj.weight, mlp.c_proj.bias)

    def __call__(self, hidden_MH: Tensor, batch: int, tokens: int) -> Tensor:
        joined_MH = self._query_key_value(self._ln_1(hidden_MH))
        query, key, value = self._heads(joined_MH, batch, tokens, 3)
        attended_MH = self._fill_up(attend(query, key, value, self._scale))
        return self._feed_forward(self._attention_output.added(attended_MH, hidden_MH))

    def pooled(self, hidden_MH: Tensor, batch: int, tokens: int, lengths_B: Tensor) -> Tensor:
        """The last token of each row alone, filled up: [M of B, H]."""
        if self._query is None or self._key_value is None:
            raise ValueError("only the last layer is packed for one token of each row")
        normed_MH = self._ln_1(hidden_MH)
        last_B = torch.arange(batch) * tokens + lengths_B - 1
        (query,) = self._heads(self._query(self._fill_up(normed_MH[last_B])), batch, 1, 1)
        key, value = self._heads(self._key_value(normed_MH), batch, tokens, 2)
        seen_BT = torch.arange(tokens) < lengths_B[:, None]
        attended_BN1D = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen_BT[:, None, None, :], scale=self._scale
        )
        attended_MH = self._fill_up(attended_BN1D.flatten(1))
        return self._feed_forward(
            self._attention_output.added(attended_MH, self._fill_up(hidden_MH[last_B]))
        )

    def alone(self, hidden_MH: Tensor) -> Tensor:
        """Tokens that attend to nothing: zeros go into the output projection."""
        nothing_MH = torch.zeros_like(hidden_MH)
        return self._feed_forward(self._attention_output.added(nothing_MH, hidden_MH))

    def _fill_up(self, hidden_MH: Tensor) -> Tensor:
        return _fill_up(hidden_MH, self._few_tokens)

    def _heads(self, joined_MH: Tensor, batch: int, tokens: int, count: int) -> tuple[Tensor, ...]:
        real = joined_MH[: batch * tokens]
        split = real.view(batch, tokens, count, self._num_heads, -1)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _feed_forward(self, hidden_MH: Tensor) -> Tensor:
        inner = self._inner.activated(self._ln_2(hidden_MH), self._activation)
        return self._outer.added(inner, hidden_MH)


class _PackedTransformer(nn.Module):
    """What `model._Transformer` computes."""

    def __init__(self, model: GPT2Classifier) -> None:
        super().__init__()
        original = model.transformer
        self.wte, self.wpe, self.ln_f = original.wte, original.wpe, original.ln_f
        self._few_tokens = _few_tokens(model)
        self._layers: list[_PackedBlock] = []
        # One after the other, so that no more than one layer is here twice.
        while len(original.h):
            block = original.h.pop(0)
            is_last = not len(original.h)
            self._layers.append(
                _PackedBlock(block, model.config.activation, self._few_tokens, is_last=is_last)
            )

    def forward(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """The final hidden states of all tokens, [B, T, H]."""
        batch, tokens = ids_BT.shape
        hidden_MH = self._embed(ids_BT, positions_T)
        for layer in self._layers:
            hidden_MH = layer(hidden_MH, batch, tokens)
        return self._final(hidden_MH[: batch * tokens]).view(batch, tokens, -1)

    def forward_pooled(self, ids_BT: Tensor, positions_T: Tensor, lengths_B: Tensor) -> Tensor:
        """The final hidden state of each row's last token, [B, H]."""
        batch, tokens = ids_BT.shape
        hidden_MH = self._embed(ids_BT, positions_T)
        for layer in self._layers[:-1]:
            hidden_MH = layer(hidden_MH, batch, tokens)
        pooled_MH = self._layers[-1].pooled(hidden_MH, batch, tokens, lengths_B)
        return self._final(pooled_MH[:batch])

    def forward_alone(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """As `forward`, for tokens that attend to nothing, not even to themselves."""
        batch, tokens = ids_BT.shape
        hidden_MH = self._embed(ids_BT, positions_T)
        for layer in self._layers:
            hidden_MH = layer.alone(hidden_MH)
        return self._final(hidden_MH[: batch * tokens]).view(batch, tokens, -1)

    def _embed(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        hidden_BTH = self.wte(ids_BT) + self.wpe(positions_T)
        return _fill_up(hidden_BTH.flatten(0, 1), self._few_tokens)

    def _final(self, hidden_MH: Tensor) -> Tensor:
        normed_MH: Tensor = self.ln_f(hidden_MH)
        return normed_MH


def _few_tokens(model: GPT2Classifier) -> int:
    """Up to how many tokens are multiplied with weights that are not packed."""
    is_float32 = model.transformer.wte.weight.dtype == torch.float32
    hidden, inner = model.config.hidden_size, model.config.inner_size
    is_small = hidden * max(3 * hidden, inner) <= _FEW_WEIGHTS
    return _FEW_TOKENS if is_float32 and is_small else 0


def _fill_up(hidden_MH: Tensor, few_tokens: int) -> Tensor:
    """Rows of zeros at the end, up to a multiple of the grain; none where they are so few."""
    missing = -len(hidden_MH) % TOKENS_GRAIN if len(hidden_MH) > few_tokens else 0
    return F.pad(hidden_MH, (0, 0, 0, missing)) if missing else hidden_MH
