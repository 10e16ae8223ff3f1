"""GPT-2's transformer as an OpenVINO graph, for any batch and length.

The graph computes what `model._Transformer` does: causal attention, no padding mask, and under
`last_token` a last layer that works on the pooled token of each row alone.

Shapes: B rows of a batch, T tokens of the longest row, H hidden size, N attention heads, D size of
a head, L positions of the flatten head.
"""
# ruff: noqa: N803, N806 - names of tensors end in their shape, in capitals

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import torch
from openvino import Type, opset13 as ops

from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig

SETTLE = "settle"  # how the name of the product begins that must not be quantized
_HIDDEN = np.float32(-1e30)  # what is added to the score of a token that is not to be seen


def build_graph(model: GPT2Classifier) -> ov.Model:
    """The graph of a model in float32.

    Args:
        model: in float32, on the CPU, with the layers of `model.GPT2Classifier`.

    Returns:
        Under `last_token`: `ids` int32 [B, T] and `lengths` int32 [B] to the final hidden state
        of each row's last token, float32 [B, H]. Under `flatten`: `ids` and `positions`, both
        int32 [B, T], to those of all tokens, [B, T, H].
    """
    return _Graph(model).build()


def inputs_of(
    ids: npt.NDArray[np.int32], config: ModelConfig, num_columns: int | None = None
) -> list[npt.NDArray[np.int32]]:
    """What the graph is given for one text alone.

    Args:
        ids: its tokens, at least one.
        config: of the model.
        num_columns: that it is filled up to; None: it is not.
    """
    ids_1T = np.zeros((1, num_columns or len(ids)), np.int32)
    ids_1T[0, : len(ids)] = ids
    if config.head == "last_token":
        return [ids_1T, np.array([len(ids)], np.int32)]
    last = config.head_length
    positions_1T = np.arange(last - len(ids), last - len(ids) + ids_1T.shape[1])[None]
    return [ids_1T, np.minimum(positions_1T, last - 1).astype(np.int32)]


class _Graph:
    def __init__(self, model: GPT2Classifier) -> None:
        self._transformer: Any = model.transformer
        self._config: ModelConfig = model.config
        self._count = itertools.count()

    def build(self) -> ov.Model:
        """The whole graph: token ids, with lengths or positions, to logits."""
        ids_BT = ops.parameter([-1, -1], Type.i32, "ids")
        tokens_1 = ops.gather(ops.shape_of(ids_BT, "i32"), _integers([1]), _integers(0))
        self._columns_T = ops.range(
            _integers(0), ops.squeeze(tokens_1, _integers(0)), _integers(1), Type.i32
        )
        *blocks, last = self._transformer.h
        is_flatten = self._config.head == "flatten"
        table_PH = self._constant(_array(self._transformer.wpe.weight), "wpe")
        if is_flatten:
            second = ops.parameter([-1, -1], Type.i32, "positions")
            added = ops.gather(table_PH, second, _integers(0))
        else:
            second = ops.parameter([-1], Type.i32, "lengths")
            added = ops.gather(table_PH, self._columns_T, _integers(0))
        table_VH = self._constant(_array(self._transformer.wte.weight), "wte")
        hidden_BTH = ops.add(ops.gather(table_VH, ids_BT, _integers(0)), added)
        bias_TT = self._hide(ops.greater(_at(self._columns_T, 0), _at(self._columns_T, 1)))
        for number, block in enumerate(blocks):
            hidden_BTH = self._block(hidden_BTH, block, f"h.{number}", bias_TT)
        name = f"h.{len(blocks)}"
        if is_flatten:
            final = self._settle(self._block(hidden_BTH, last, name, bias_TT))
        else:
            final = self._pooled(hidden_BTH, last, name, second)
        result = self._norm(final, self._transformer.ln_f, "ln_f")
        result = result if is_flatten else ops.squeeze(result, _integers(1))
        return ov.Model([ops.result(result)], [ids_BT, second], "gpt2")

    def _block(self, hidden_BTH: Any, block: Any, name: str, bias_TT: Any) -> Any:
        normed_BTH = self._norm(hidden_BTH, block.ln_1, f"{name}.ln_1")
        query, key, value = self._project(normed_BTH, block.attn, name, "qkv")
        attended = self._attend(query, key, value, bias_TT)
        return self._rest(hidden_BTH, attended, block, name)

    def _pooled(self, hidden_BTH: Any, block: Any, name: str, lengths_B: Any) -> Any:
        """One token of each row, which sees the tokens up to itself: [B, 1, H]."""
        last_B1 = ops.subtract(_at(lengths_B, 1), _integers(1))
        pooled_B1H = self._settle(ops.gather(hidden_BTH, last_B1, _integers(1), 1))
        normed_BTH = self._norm(hidden_BTH, block.ln_1, f"{name}.ln_1")
        (query,) = self._project(
            ops.gather(normed_BTH, last_B1, _integers(1), 1), block.attn, name, "q"
        )
        key, value = self._project(normed_BTH, block.attn, name, "kv")
        unseen_BT = ops.greater(_at(self._columns_T, 0), last_B1)
        attended = self._attend(query, key, value, _at(self._hide(unseen_BT), [1, 2]))
        return self._rest(pooled_B1H, attended, block, name)

    def _project(self, hidden_BTH: Any, attention: Any, name: str, kinds: str) -> list[Any]:
        """Queries, keys, values, as `kinds` names them, each [B, N, T, D]; queries are scaled."""
        size = self._config.hidden_size
        weight, bias = _array(attention.c_attn.weight), _array(attention.c_attn.bias)
        weight[:size] *= attention.scale
        bias[:size] *= attention.scale
        first, last = "qkv".index(kinds[0]) * size, ("qkv".index(kinds[-1]) + 1) * size
        joined = self._linear(
            hidden_BTH, weight[first:last], bias[first:last], f"{name}.attn.{kinds}"
        )
        parts = ops.split(joined, _integers(-1), len(kinds)).outputs() if kinds != "q" else [joined]
        heads = self._config.num_heads
        shape = _integers([0, 0, heads, size // heads])
        return [
            ops.transpose(ops.reshape(part, shape, True), _integers([0, 2, 1, 3])) for part in parts
        ]

    def _attend(self, query: Any, key: Any, value: Any, bias: Any) -> Any:
        # Spelled out, not ScaledDotProductAttention: the CPU plug-in takes that apart into the
        # same products, with a mask of its own for each layer.
        scores_BNTT = ops.add(ops.matmul(query, key, False, True), bias)
        attended_BNTD = ops.matmul(ops.softmax(scores_BNTT, -1), value, False, False)
        swapped = ops.transpose(attended_BNTD, _integers([0, 2, 1, 3]))
        return ops.reshape(swapped, _integers([0, 0, self._config.hidden_size]), True)

    def _rest(self, hidden: Any, attended: Any, block: Any, name: str) -> Any:
        """What follows attention in a layer."""
        projection, mlp = block.attn.c_proj, block.mlp
        hidden = ops.add(hidden, self._layer(attended, projection, f"{name}.attn.c_proj"))
        inner = self._layer(
            self._norm(hidden, block.ln_2, f"{name}.ln_2"), mlp.c_fc, f"{name}.mlp.c_fc"
        )
        activated = _ACTIVATIONS[self._config.activation](inner)
        return ops.add(hidden, self._layer(activated, mlp.c_proj, f"{name}.mlp.c_proj"))

    def _layer(self, hidden: Any, linear: torch.nn.Linear, name: str) -> Any:
        return self._linear(hidden, _array(linear.weight), _array(linear.bias), name)

    def _linear(
        self, hidden: Any, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], name: str
    ) -> Any:
        product = ops.matmul(hidden, self._constant(weight, f"{name}.weight"), False, True)
        product.friendly_name = name
        return ops.add(product, self._constant(bias[None, None], f"{name}.bias"))

    def _norm(self, hidden: Any, norm: torch.nn.LayerNorm, name: str) -> Any:
        normed = ops.mvn(hidden, _integers([-1]), True, norm.eps, "inside_sqrt")
        weight = self._constant(_array(norm.weight)[None, None], f"{name}.weight")
        bias = self._constant(_array(norm.bias)[None, None], f"{name}.bias")
        return ops.add(ops.multiply(normed, weight), bias)

    def _settle(self, hidden: Any) -> Any:
        """The same values, by a product with the identity.

        In bfloat16 the CPU plug-in keeps in float32 whatever lies between the last product and
        the result. The sums of all layers lie there, as each is added to the one before, and are
        slower so. This product ends the chain below the last of them.
        """
        identity = np.eye(self._config.hidden_size, dtype=np.float32)
        product = ops.matmul(hidden, self._constant(identity, "identity"), False, True)
        product.friendly_name = f"{SETTLE}.{next(self._count)}"
        return product

    def _hide(self, hidden: Any) -> Any:
        """What to add to scores: nothing, or where `hidden` says so, next to minus infinity."""
        return ops.select(hidden, ops.constant(_HIDDEN), ops.constant(np.float32(0)))

    def _constant(self, values: npt.NDArray[np.float32], name: str) -> Any:
        constant = ops.constant(np.ascontiguousarray(values))
        constant.friendly_name = f"{name}.{next(self._count)}"  # names must differ
        return constant


_ACTIVATIONS = {
    "gelu_new": lambda inner: ops.gelu(inner, "tanh"),
    "gelu_pytorch_tanh": lambda inner: ops.gelu(inner, "tanh"),
    "gelu": lambda inner: ops.gelu(inner, "erf"),
    "relu": ops.relu,
    "silu": ops.swish,
    "swish": ops.swish,
}


def _array(parameter: torch.Tensor) -> npt.NDArray[np.float32]:
    """A copy, in float32."""
    return parameter.detach().to(torch.float32, copy=True).numpy()


def _integers(values: int | Sequence[int]) -> Any:
    return ops.constant(np.array(values, dtype=np.int32))


def _at(tensor: Any, axes: int | Sequence[int]) -> Any:
    """With axes of size 1 put in."""
    return ops.unsqueeze(tensor, _integers(axes))
