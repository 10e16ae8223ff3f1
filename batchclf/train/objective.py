"""What is made small: the loss of the labels, and that of the next tokens beside it.

Shapes: B rows of a batch, T tokens of its longest row, H hidden size, C labels, P tokens that have
a next one.
"""
# ruff: noqa: N803, N806, N815 - names of tensors end in their shape, in capitals

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torch.utils.checkpoint import checkpoint

from batchclf.model import GPT2Classifier
from batchclf.train.examples import Ids
from batchclf.train.settings import ClassWeights, TrainSettings

# Logits over a vocabulary of 50,257 take 200 KB a token: so many tokens are in memory at once.
_LM_CHUNK = 1024


@dataclass(frozen=True)
class PaddedBatch:
    """Rows on their device.

    Attributes:
        ids_BT: int32, filled up on the right.
        lengths_B: int64.
        labels_B: int64.
        is_counted: False for a row that only lets a process take part.
    """

    ids_BT: Tensor
    lengths_B: Tensor
    labels_B: Tensor
    is_counted: bool = True


def pad(
    texts: Sequence[Ids], model: GPT2Classifier, device: torch.device, grain: int = 1
) -> tuple[Tensor, Tensor]:
    """Texts as one batch: ids [B, T], and lengths [B] up to the token that inference pools.

    T is a multiple of `grain`, or the most that the model reads.
    """
    lengths = [model.config.num_pooled_tokens(ids) for ids in texts]
    num_columns = min(-(-max(lengths) // grain) * grain, model.config.longest)
    padded = torch.zeros(len(texts), num_columns, dtype=torch.int32)
    for row, ids in enumerate(texts):
        padded[row, : lengths[row]] = torch.from_numpy(ids[: lengths[row]])
    return padded.to(device), torch.tensor(lengths).to(device)


def label_weights(labels: Sequence[int], num_labels: int, weights: ClassWeights) -> Tensor | None:
    """The weight of each label's rows [C]: rows / (labels x rows of the label), or None for 1.

    Labels without rows have the weight of one row; nothing in training asks for it.
    """
    if weights == "none":
        return None
    counts = torch.bincount(torch.tensor(labels), minlength=num_labels)
    return len(labels) / (int((counts > 0).sum()) * counts.clamp(min=1))


class Objective(nn.Module):
    """A classifier with its loss, in one module, as DistributedDataParallel wants it.

    Attributes:
        weights_C: of the labels; None for 1.
        dtype: of the matrix products; the loss is computed in float32.
    """

    def __init__(
        self,
        model: GPT2Classifier,
        settings: TrainSettings,
        weights_C: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.model = model
        self.weights_C = weights_C
        self.dtype = dtype
        self._label_smoothing = settings.label_smoothing
        self._lm_weight = settings.lm_weight

    def forward(
        self, batch: PaddedBatch, label_share: float, lm_norm: float
    ) -> tuple[Tensor, Tensor]:
        """This batch's part in the loss of its step, and how many of its rows are labelled right.

        Args:
            batch: some of the rows of a step.
            label_share: weights of the labels of these rows, as a share of those of the step.
            lm_norm: tokens of all rows of the step that have a next one.
        """
        device_type = batch.ids_BT.device.type
        hidden_BTH: Tensor | None = None
        with torch.autocast(device_type, self.dtype, enabled=self.dtype != torch.float32):
            if self._lm_weight:
                logits_BC, hidden_BTH = self.model.forward_with_hidden(
                    batch.ids_BT, batch.lengths_B
                )
            else:
                logits_BC = self.model(batch.ids_BT, batch.lengths_B)
        loss: Tensor = label_share * F.cross_entropy(
            logits_BC,
            batch.labels_B,
            weight=self.weights_C,
            label_smoothing=self._label_smoothing,
        )
        if hidden_BTH is not None and lm_norm:
            loss = loss + self._lm_weight * self._lm_loss(hidden_BTH, batch) / lm_norm
        hits_B = logits_BC.detach().argmax(1) == batch.labels_B
        return loss, hits_B.sum() * batch.is_counted

    def _lm_loss(self, hidden_BTH: Tensor, batch: PaddedBatch) -> Tensor:
        """Cross-entropy of the next tokens, summed over the batch."""
        steps = torch.arange(1, hidden_BTH.shape[1], device=hidden_BTH.device)
        has_next_BT = steps < batch.lengths_B[:, None] * batch.is_counted
        hidden_PH = hidden_BTH[:, :-1][has_next_BT]
        next_P = batch.ids_BT[:, 1:][has_next_BT].long()
        total = hidden_PH.sum() * 0.0  # a batch may have no tokens to predict
        chunks = zip(torch.split(hidden_PH, _LM_CHUNK), torch.split(next_P, _LM_CHUNK), strict=True)
        for hidden, target in chunks:
            total = total + checkpoint(self._next_token_loss, hidden, target, use_reentrant=False)
        return total

    def _next_token_loss(self, hidden_PH: Tensor, next_P: Tensor) -> Tensor:
        device_type = hidden_PH.device.type
        with torch.autocast(device_type, self.dtype, enabled=self.dtype != torch.float32):
            logits = F.linear(hidden_PH, self.model.transformer.wte.weight)
        return F.cross_entropy(logits.float(), next_P, reduction="sum")
