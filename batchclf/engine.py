"""Token ids to logits on a device: sorted batches under a token budget, and no padding mask.

Shape suffixes: N examples, U distinct examples, B rows of a batch, T tokens of its longest row,
C classes.
"""
# ruff: noqa: N803, N806, N815 - names of arrays end in their shape, in capitals

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from batchclf.batching import plan_batches, unique_rows
from batchclf.errors import ConfigError
from batchclf.model import GPT2Classifier

log = logging.getLogger(__name__)

# Tokens of a batch, longest row times rows. More is slower on a CPU, whose caches it leaves;
# on a GPU fewer would leave it waiting for launches.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
# On a CPU in bfloat16, every new shape of a batch costs 2 to 3 MB that stay (compiled kernels of
# oneDNN), so shapes are multiples of this. In float32 and on a GPU they cost nothing.
_CPU_BFLOAT16_GRAIN = 8
WINDOW_BATCHES = 64  # examples are sorted within about so many batches

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Processor features with which bfloat16 products are faster than float32 ones.
_CPU_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Compute:
    """Where and in which precision the model runs, resolved."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose_compute(device: str = "auto", dtype: str = "auto") -> Compute:
    """Resolve `auto`: CUDA where there is one; bfloat16 where the device is fast at it.

    Raises:
        ConfigError: no such device here, or one that does not know the dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device {device}: use auto, cpu, cuda or cuda:N") from None
    if chosen.type not in _BATCH_TOKENS:
        raise ConfigError(f"--device {device}: use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise ConfigError(f"--device {device}: torch sees {count} CUDA devices on this machine")
    if dtype == "auto":
        dtype = "bfloat16" if _is_fast_at_bfloat16(chosen) else "float32"
    return Compute(chosen, _DTYPES[dtype])


def _is_fast_at_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.system() != "Linux":
        return False
    words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    return bool(_CPU_BFLOAT16_FLAGS & set(words))


@dataclass(frozen=True)
class Logits:
    """What the model says of N examples.

    Attributes:
        logits_NC: float32, before temperature and softmax; zeros where `failed_N`.
        failed_N: rows that did not fit into the device's memory even alone.
        num_distinct: examples that were really computed; the others repeat one of them.
        num_padded_tokens: tokens computed, padding included.
    """

    logits_NC: FloatArray
    failed_N: npt.NDArray[np.bool_]
    num_distinct: int
    num_padded_tokens: int


class Engine:
    """A model on its device, with a token budget."""

    def __init__(
        self, model: GPT2Classifier, compute: Compute, max_batch_tokens: int | None = None
    ) -> None:
        self.compute = compute
        self.max_batch_tokens = max_batch_tokens or _BATCH_TOKENS[compute.device.type]
        self._model = model.eval()
        self._config = model.config
        is_cpu_bfloat16 = compute.device.type == "cpu" and compute.dtype == torch.bfloat16
        self._grain = _CPU_BFLOAT16_GRAIN if is_cpu_bfloat16 else 1

    @property
    def window_tokens(self) -> int:
        """How many tokens are worth sorting together."""
        return WINDOW_BATCHES * self.max_batch_tokens

    def predict(
        self,
        ids: npt.NDArray[np.int32],
        offsets: IntArray,
        on_batch: Callable[[int, int], None],
    ) -> Logits:
        """Logits of N examples in their own order, whatever order they are computed in.

        Args:
            ids: token ids of all examples, one after the other.
            offsets: [N + 1], where each example begins in `ids` and the last one ends; none is
                empty.
            on_batch: told the examples and tokens of each batch when it is done; may raise to
                stop.
        """
        starts, lengths = offsets[:-1], np.diff(offsets)
        lengths = self._without_trailing_pads(ids, starts, lengths)
        raw, size = ids.tobytes(), ids.itemsize
        ends = (starts + lengths) * size
        first_U, inverse_N = unique_rows(
            [raw[a:b] for a, b in zip((starts * size).tolist(), ends.tolist(), strict=True)]
        )
        starts_U, lengths_U = starts[first_U], lengths[first_U]
        counts_U = np.bincount(inverse_N, minlength=len(first_U))
        tokens_U = counts_U * lengths_U
        logits_UC = torch.zeros(
            (len(first_U), self._config.num_labels), dtype=torch.float32, device=self.compute.device
        )
        failed_U = np.zeros(len(first_U), dtype=np.bool_)
        num_padded_tokens = 0
        queue = plan_batches(lengths_U, self.max_batch_tokens, self._grain)[::-1]
        with torch.inference_mode():
            while queue:
                batch = queue.pop()
                try:
                    logits_UC[torch.as_tensor(batch, device=self.compute.device)] = self._forward(
                        ids, starts_U[batch], lengths_U[batch]
                    )
                except torch.OutOfMemoryError:
                    queue += self._halve(batch, lengths_U[batch], failed_U)
                    continue
                num_padded_tokens += self._num_columns(lengths_U[batch]) * len(batch)
                on_batch(int(counts_U[batch].sum()), int(tokens_U[batch].sum()))
        return Logits(
            logits_UC.cpu().numpy()[inverse_N],
            failed_U[inverse_N],
            len(first_U),
            num_padded_tokens,
        )

    def _forward(
        self, ids: npt.NDArray[np.int32], starts_B: IntArray, lengths_B: IntArray
    ) -> torch.Tensor:
        columns_T = np.arange(self._num_columns(lengths_B))
        # Beyond a row's end any token will do: causal attention never looks there.
        places_BT = np.minimum(starts_B[:, None] + columns_T, len(ids) - 1)
        ids_BT = torch.from_numpy(ids[places_BT].astype(np.int64))
        device = self.compute.device
        if device.type == "cuda":
            ids_BT = ids_BT.pin_memory()
        logits_BC: torch.Tensor = self._model(
            ids_BT.to(device, non_blocking=True),
            torch.from_numpy(lengths_B).to(device, non_blocking=True),
        )
        return logits_BC

    def _num_columns(self, lengths_B: IntArray) -> int:
        """Tokens that each row of a batch is padded to."""
        return min(-(-int(lengths_B.max()) // self._grain) * self._grain, self._config.longest)

    def _without_trailing_pads(
        self, ids: npt.NDArray[np.int32], starts: IntArray, lengths: IntArray
    ) -> IntArray:
        """Lengths up to the token that is pooled: the last one that is not the pad token."""
        pad = self._config.pad_token_id
        if self._config.head != "last_token" or pad is None or not len(lengths):
            return lengths
        lengths = lengths.copy()
        for row in np.flatnonzero(ids[starts + lengths - 1] == pad):
            row_ids = ids[starts[row] : starts[row] + lengths[row]]
            lengths[row] = self._config.num_pooled_tokens(row_ids)
        return lengths

    def _halve(
        self, batch: IntArray, lengths_B: IntArray, failed_U: npt.NDArray[np.bool_]
    ) -> list[IntArray]:
        """What to compute instead of a batch that did not fit; remembers a budget that will."""
        if len(batch) == 1:
            failed_U[batch] = True
            log.warning("one row of %d tokens does not fit into the device's memory", lengths_B[0])
            return []
        tokens = self._num_columns(lengths_B) * len(batch)
        self.max_batch_tokens = min(self.max_batch_tokens, max(tokens // 2, 1))
        log.warning("out of device memory: batches of at most %d tokens now", self.max_batch_tokens)
        middle = len(batch) // 2
        return [batch[middle:], batch[:middle]]
