"""One GPT-2 text classifier for training and inference, without padding masks.

A causal model's real tokens never see what stands to their right. So rows are padded on the right
with any valid token id and attention runs with `is_causal=True` and no mask.

Shapes: B rows of a batch, T tokens of the longest row, H hidden size, N attention heads, D size of
a head, C labels, L positions of the flatten head.
"""
# ruff: noqa: N803, N806 - names of tensors end in their shape, in capitals

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torch.utils.checkpoint import checkpoint

from batchclf.errors import CheckpointError
from batchclf.model_config import ModelConfig

_gelu_tanh = partial(F.gelu, approximate="tanh")
# By the names of `model_config.ACTIVATION_NAMES`.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
# Hugging Face stores these as Conv1D, [in, out]; a Linear is [out, in].
_CONV1D_NAMES = (
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)
# Causal masks that transformers before 4.30 kept among the weights.
_IGNORED_NAMES = (".attn.bias", ".attn.masked_bias")


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.resid_dropout = nn.Dropout(config.resid_dropout)
        self.dropout = config.attn_dropout
        self.num_heads = config.num_heads
        self.scale = (config.hidden_size // config.num_heads) ** -0.5
        if not config.scale_attn_weights:
            self.scale = 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        query, key, value = self._heads(self.c_attn(hidden_BTH), 3)
        return self._attend(query, key, value, mask=None, is_causal=True)

    def forward_pooled(self, hidden_BTH: Tensor, pooled_B1H: Tensor, seen_BT: Tensor) -> Tensor:
        """As `forward` at one token of each row, which sees the tokens that `seen_BT` marks."""
        size = hidden_BTH.shape[-1]
        weight, bias = self.c_attn.weight, self.c_attn.bias
        (query,) = self._heads(F.linear(pooled_B1H, weight[:size], bias[:size]), 1)
        key, value = self._heads(F.linear(hidden_BTH, weight[size:], bias[size:]), 2)
        return self._attend(query, key, value, mask=seen_BT[:, None, None, :], is_causal=False)

    def forward_alone(self, hidden_BTH: Tensor) -> Tensor:
        """As `forward` at tokens that attend to nothing: zeros go into the output projection."""
        projected: Tensor = self.resid_dropout(self.c_proj.bias.expand_as(hidden_BTH))
        return projected

    def _heads(self, joined: Tensor, count: int) -> tuple[Tensor, ...]:
        batch, tokens, _ = joined.shape
        split = joined.view(batch, tokens, count, self.num_heads, -1)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        attended_BNTD = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
        )
        projected: Tensor = self.c_proj(attended_BNTD.transpose(1, 2).flatten(2))
        dropped: Tensor = self.resid_dropout(projected)
        return dropped


class _MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.inner_size)
        self.c_proj = nn.Linear(config.inner_size, config.hidden_size)
        self.dropout = nn.Dropout(config.resid_dropout)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.dropout(self.c_proj(self.activation(self.c_fc(hidden))))
        return output


class _Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = _Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        return self._feed_forward(hidden_BTH + self.attn(self.ln_1(hidden_BTH)))

    def forward_pooled(self, hidden_BTH: Tensor, lengths_B: Tensor) -> Tensor:
        """The last token of each row alone, [B, 1, H]: all that a last layer is asked for."""
        batch, tokens, size = hidden_BTH.shape
        last_B11 = (lengths_B - 1).view(batch, 1, 1)
        last_B1H = last_B11.expand(batch, 1, size)
        seen_BT = torch.arange(tokens, device=lengths_B.device) < lengths_B[:, None]
        normed_BTH = self.ln_1(hidden_BTH)
        attended_B1H = self.attn.forward_pooled(normed_BTH, normed_BTH.gather(1, last_B1H), seen_BT)
        return self._feed_forward(hidden_BTH.gather(1, last_B1H) + attended_B1H)

    def forward_alone(self, hidden_BTH: Tensor) -> Tensor:
        return self._feed_forward(hidden_BTH + self.attn.forward_alone(hidden_BTH))

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = hidden + self.mlp(self.ln_2(hidden))
        return output


class _Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = _embedding(config.vocab_size, config.hidden_size)
        self.wpe = _embedding(config.max_positions, config.hidden_size)
        self.drop = nn.Dropout(config.embd_dropout)
        self.h = nn.ModuleList(_Block(config, layer) for layer in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        # In training, keep what goes into a layer alone and compute the rest again: less memory.
        self.gradient_checkpointing = False

    def embed(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """Token plus position embeddings; positions are [T], or [B, T] where rows differ."""
        embedded: Tensor = self.drop(self.wte(ids_BT) + self.wpe(positions_T))
        return embedded

    def forward(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """The final hidden states of all tokens, [B, T, H]."""
        hidden_BTH = self.embed(ids_BT, positions_T)
        for block in self._blocks():
            hidden_BTH = self._pass(block, hidden_BTH)
        normed: Tensor = self.ln_f(hidden_BTH)
        return normed

    def forward_pooled(self, ids_BT: Tensor, positions_T: Tensor, lengths_B: Tensor) -> Tensor:
        """The final hidden state of each row's last token, [B, H]."""
        *blocks, last = self._blocks()
        hidden_BTH = self.embed(ids_BT, positions_T)
        for block in blocks:
            hidden_BTH = self._pass(block, hidden_BTH)
        normed_B1H: Tensor = self.ln_f(last.forward_pooled(hidden_BTH, lengths_B))
        return normed_B1H.squeeze(1)

    def forward_alone(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """As `forward`, for tokens that attend to nothing, not even to themselves."""
        hidden_BTH = self.embed(ids_BT, positions_T)
        for block in self._blocks():
            hidden_BTH = block.forward_alone(hidden_BTH)
        normed: Tensor = self.ln_f(hidden_BTH)
        return normed

    def _pass(self, block: _Block, hidden_BTH: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return cast("Tensor", checkpoint(block, hidden_BTH, use_reentrant=False))
        return cast("Tensor", block(hidden_BTH))

    def _blocks(self) -> Iterator[_Block]:
        return cast("Iterator[_Block]", iter(self.h))


def _embedding(count: int, size: int) -> nn.Embedding:
    """One without values yet."""
    # For random values of no device, `nn.Embedding` would have torch import its compiler first: a
    # second of every process that loads a model.
    values = torch.empty(count, size)
    return cast("nn.Embedding", nn.Embedding.from_pretrained(values, freeze=False))  # type: ignore[no-untyped-call]


class GPT2Classifier(nn.Module):
    """GPT-2 with a classification head, which computes in float32 whatever the dtype of the rest.

    Parameters carry their names in a checkpoint.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = _Transformer(config)
        if config.head == "last_token":
            self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        else:
            self.fc1 = nn.Linear(config.head_length * config.hidden_size, config.num_labels)
        self._pad_logits: Tensor | None = None

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Float32 logits [B, C].

        A row's logits do not depend on the other rows, nor on what fills it up on the right.

        Args:
            ids_BT: token ids, int32 or int64, padded on the right with any valid id; T is at most
                `config.longest`.
            lengths_B: int64, tokens in each row, at least 1, on the same device. Under `last_token`
                the last of them is pooled: see `ModelConfig.num_pooled_tokens`.
        """
        tokens = ids_BT.shape[1]
        if tokens > self.config.longest:
            raise ValueError(f"{tokens} tokens, but the model reads {self.config.longest}")
        if self.config.head == "flatten":
            return self._flatten_logits(ids_BT, lengths_B)
        positions_T = torch.arange(tokens, device=ids_BT.device)
        return self._score(self.transformer.forward_pooled(ids_BT, positions_T, lengths_B))

    def forward_with_hidden(self, ids_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward` under `last_token`, with the final hidden states of all tokens [B, T, H]."""
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        hidden_BTH = self.transformer(ids_BT, positions_T)
        rows_B = torch.arange(len(lengths_B), device=ids_BT.device)
        return self._score(hidden_BTH[rows_B, lengths_B - 1]), hidden_BTH

    def _score(self, pooled_BH: Tensor) -> Tensor:
        with _without_autocast(pooled_BH):
            return F.linear(pooled_BH.float(), self.score.weight.float())

    def _flatten_logits(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """The original pads on the left to L tokens; here the pads are a table.

        logits = bias + table[p] + sum over real tokens of W[position] . hidden, where p is
        L - length and positions count from the first pad.
        """
        tokens = ids_BT.shape[1]
        steps_T = torch.arange(tokens, device=ids_BT.device)
        pads_B = self.config.head_length - lengths_B
        positions_BT = (pads_B[:, None] + steps_T).clamp(max=self.config.head_length - 1)
        hidden_BTH = self.transformer(ids_BT, positions_BT).float()
        # Shifted right so that all rows end together, each token's position is its column's.
        sources_BT = steps_T - (tokens - lengths_B)[:, None]
        shifted_BTH = hidden_BTH.gather(
            1, sources_BT.clamp(min=0)[:, :, None].expand_as(hidden_BTH)
        ).masked_fill((sources_BT < 0)[:, :, None], 0.0)
        weight_CLH = self._weight_CLH()[:, -tokens:]
        with _without_autocast(shifted_BTH):
            real_BC = F.linear(shifted_BTH.flatten(1), weight_CLH.flatten(1), self.fc1.bias.float())
        return real_BC + self.pad_table()[pads_B]

    def _weight_CLH(self) -> Tensor:  # noqa: N802 - the suffix is a shape
        shape = (self.config.num_labels, self.config.head_length, self.config.hidden_size)
        return self.fc1.weight.float().view(shape)

    def pad_table(self) -> Tensor:
        """What p pads add to the logits, [L + 1, C] for p = 0 to L.

        Kept only between forwards without gradients: whatever trains the weights drops it.
        """
        if self.training or torch.is_grad_enabled():
            self._pad_logits = None
            return self._compute_pad_table()
        if self._pad_logits is None:
            self._pad_logits = self._compute_pad_table()
        return self._pad_logits

    def _compute_pad_table(self) -> Tensor:
        positions_L = torch.arange(self.config.head_length, device=self.fc1.weight.device)
        ids_1L = torch.full_like(positions_L, self.config.pad_token_id or 0)[None]
        hidden_LH = self.transformer.forward_alone(ids_1L, positions_L)[0].float()
        with _without_autocast(hidden_LH):
            logits_LC = torch.einsum("lh,clh->lc", hidden_LH, self._weight_CLH())
        return F.pad(logits_LC.cumsum(0), (0, 0, 1, 0))

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off. `eval()` also forgets what was computed from older weights."""
        self._pad_logits = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._pad_logits = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def set_dropout(self, share: float) -> None:
        """Drop this share in all places where GPT-2 has dropout, also according to `config`."""
        self.config = replace(
            self.config, embd_dropout=share, attn_dropout=share, resid_dropout=share
        )
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share
            elif isinstance(module, _Attention):
                module.dropout = share

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """GPT-2's initial weights, for training from scratch.

        Normal with the given deviation, divided by sqrt(2 x layers) where a layer adds to the
        residual stream; biases zero. Source: section 2.3 of "Language Models are Unsupervised
        Multitask Learners" (2019).
        """
        residual_std = std / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, residual_std if "c_proj" in name else std)
        self._pad_logits = None

    def load_hf_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights under their names in a checkpoint, cast to the dtypes of this model.

        A model on the meta device takes the tensors' device.

        Raises:
            CheckpointError: a tensor is missing, left over, of another shape, or not finite.
        """
        expected = dict(self.named_parameters())
        check_names_and_shapes(self.config, {name: tuple(t.shape) for name, t in state.items()})
        converted = {}
        for name, parameter in expected.items():
            tensor = state[name].detach()
            if name.endswith(_CONV1D_NAMES):
                tensor = tensor.t()
            device = tensor.device if parameter.is_meta else parameter.device
            # Always a copy: the tensors of a file are mapped, and change when the file does.
            own = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).copy_(tensor)
            if not is_finite(own):
                dtype_name = str(own.dtype).removeprefix("torch.")
                raise CheckpointError(f"tensor {name} holds NaN or infinite values as {dtype_name}")
            converted[name] = own
        self.load_state_dict(converted, assign=next(iter(expected.values())).is_meta)
        self._pad_logits = None

    def hf_state(self) -> dict[str, Tensor]:
        """The weights with the names and shapes of a checkpoint; nothing is copied."""
        return {
            name: parameter.detach().t() if name.endswith(_CONV1D_NAMES) else parameter.detach()
            for name, parameter in self.named_parameters()
        }


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """What keeps the head in float32 where training runs in mixed precision."""
    device_type = tensor.device.type
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; six times as fast as `torch.isfinite(...).all()`."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def is_ignored(name: str) -> bool:
    """Whether a tensor of a checkpoint is a constant that old files carry along."""
    return name.endswith(_IGNORED_NAMES)


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, by name."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in GPT2Classifier(config).hf_state().items()}


def check_names_and_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a checkpoint with those that its configuration calls for.

    Raises:
        CheckpointError: one is missing, left over, or of another shape.
    """
    expected = checkpoint_shapes(config)
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"no tensor {_some(missing)}")
    extra = [name for name in found if name not in expected and not is_ignored(name)]
    if extra:
        raise CheckpointError(f"unexpected tensor {_some(extra)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"tensor {name} has the shape {list(found[name])}, "
                f"but the configuration calls for {list(shape)}"
            )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
