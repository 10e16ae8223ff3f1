from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from batchclf.batching import plan_batches
from batchclf.model import GPT2Classifier
from batchclf.train.examples import Ids
from batchclf.train.objective import pad

# In bfloat16, matrix units take whole blocks of rows, and oneDNN compiles every new shape.
_BFLOAT16_GRAIN = 8


def predict(
    model: GPT2Classifier,
    texts: Sequence[Ids],
    batch_tokens: int,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[], None] | None = None,
) -> Tensor:
    """Logits [texts, C] on the CPU, in the order of the texts; leaves the model in eval mode.

    Args:
        model: the classifier.
        texts: token ids of each text, at least one and no more than the model reads.
        batch_tokens: the token budget of a batch, padding included.
        dtype: of the matrix products.
        on_batch: called before each batch; may raise to stop.
    """
    model.eval()
    device = next(model.parameters()).device
    grain = length_grain(dtype)
    kept = [ids[: model.config.num_pooled_tokens(ids)] for ids in texts]
    logits = torch.empty(len(texts), model.config.num_labels)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), autocast:
        for batch in plan_batches([len(ids) for ids in kept], batch_tokens, grain):
            if on_batch is not None:
                on_batch()
            logits[batch] = model(*pad([kept[row] for row in batch], model, device, grain)).cpu()
    return logits


def length_grain(dtype: torch.dtype) -> int:
    """What lengths are rounded up to; see `plan_batches`."""
    return _BFLOAT16_GRAIN if dtype == torch.bfloat16 else 1
