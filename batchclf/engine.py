"""Token ids to logits on a device: sorted batches under a token budget, and no padding mask.

Shape suffixes: N examples, U distinct examples, B rows of a batch, T tokens of its longest row,
C classes.
"""
# ruff: noqa: N803, N806, N815 - names of arrays end in their shape, in capitals

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batchclf.batching import plan_batches, split_evenly, unique_rows
from batchclf.checkpoint import Checkpoint
from batchclf.compute import Compute
from batchclf.lane import Lane, Loaded
from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig
from batchclf.openvino_model import hand_over
from batchclf.packed import pack
from batchclf.streams import Streams, num_cores, num_cpu_streams

log = logging.getLogger(__name__)

# Tokens of a batch, longest row times rows. On a GPU fewer would leave it waiting for launches.
_CUDA_BATCH_TOKENS = 65536
# On a CPU the widest activations of a batch, tokens x inner size, should stay near the caches of
# its core. Measured with 124M parameters in bfloat16, 128 tokens a row: on two cores with AMX 512,
# 1024 and 4096 tokens gave 1.63, 1.51 and 1.49 TFLOP/s; on two with AVX512-BF16 512, 1024 and 2048
# gave 2344, 2365 and 2362 tokens/s, and through OpenVINO in int8 512, 1024 and 4096 gave 4473, 4252
# and 4157. Beyond the bounds nothing was gained.
_CPU_ACTIVATION_BYTES = 3 << 20
_CPU_BATCH_TOKENS = (512, 8192)
# On a CPU in bfloat16, every new shape of a batch costs 2 to 3 MB that stay (compiled kernels of
# oneDNN), so shapes are multiples of this. In float32 and on a GPU they cost nothing.
_CPU_BFLOAT16_GRAIN = 8
# FLOPs a layer that are done in the time that starting one more batch takes.
_BATCH_FLOPS = 40_000_000
# Tokens for each real one in a batch that is left whole for all cores.
_MOST_PADDED = 1.25
# A GPU has so many batches to go on with. More would fill its queue of kernels, about a thousand,
# and whoever launches one more then waits with Python's lock in hand.
_MOST_LAUNCHED = 3
WINDOW_BATCHES = 64  # examples are sorted within about so many batches
_LEAST_WINDOW_TOKENS = 1 << 18  # and within as many tokens: sorting costs next to nothing
_FIRST_WINDOW_BATCHES = 2  # of each stream: the device begins with what is tokenised soon

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def build_model(checkpoint: Checkpoint, compute: Compute) -> GPT2Classifier:
    """The model of a checkpoint, ready for `Engine`.

    Raises:
        CheckpointError: a weight is too large for the dtype.
        ConfigError: the backend cannot compute it.
    """
    if compute.backend == "openvino":
        return hand_over(
            checkpoint.build_model(),
            "bfloat16" if compute.dtype == torch.bfloat16 else "float32",
            num_cpu_streams(),
            num_cores(),
            compute.build.graph if compute.build else None,
        )
    model = checkpoint.build_model(compute.dtype, compute.device)
    return pack(model) if compute.device.type == "cpu" else model


def _batch_tokens(compute: Compute, config: ModelConfig) -> int:
    if compute.device.type == "cuda":
        return _CUDA_BATCH_TOKENS
    fewest, most = _CPU_BATCH_TOKENS
    fitting = _CPU_ACTIVATION_BYTES // (config.inner_size * compute.dtype.itemsize)
    return max(fewest, min(fitting, most))


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


@dataclass(frozen=True)
class Prepared:
    """Examples without repeats, ready to be computed.

    Attributes:
        ids: token ids of all examples.
        starts_U, lengths_U: where in `ids` each distinct example begins, and its tokens.
        counts_U: examples that are equal to each.
        inverse_N: which of them each example is.
        batches: places in `starts_U` of what is computed together, in that order; none with
            `loaded`, whose lane cuts batches itself.
        loaded: the texts on the device, where it has a lane.
    """

    ids: npt.NDArray[np.int32]
    starts_U: IntArray
    lengths_U: IntArray
    counts_U: IntArray
    inverse_N: IntArray
    batches: Sequence[IntArray]
    loaded: Loaded | None


class Engine:
    """A model on its device, with a token budget.

    On a CPU several batches are computed side by side, each by a thread with cores of its own.
    Little work is cut up among them, and with torch, one batch that is alone has all cores where it
    is worth them. On a GPU one batch follows the other, launched ahead: see `lane`.

    Args:
        model: from `build_model`.
        compute: where it is.
        max_batch_tokens: longest row times rows of a batch; None: what suits device and model.
        num_streams: batches that are computed side by side; None: as suits the device.
        lane: for a device that is launched ahead; None: made for a GPU.
    """

    def __init__(
        self,
        model: GPT2Classifier,
        compute: Compute,
        max_batch_tokens: int | None = None,
        num_streams: int | None = None,
        lane: Lane | None = None,
    ) -> None:
        self.compute = compute
        self._model = model.eval()
        self._config = model.config
        self.max_batch_tokens = max_batch_tokens or _batch_tokens(compute, self._config)
        # Whoever chose a small budget wants little memory.
        self._least_window_tokens = 0 if max_batch_tokens else _LEAST_WINDOW_TOKENS
        is_cpu = compute.device.type == "cpu"
        self.grain = _CPU_BFLOAT16_GRAIN if is_cpu and compute.dtype == torch.bfloat16 else 1
        self.lane = lane if is_cpu or lane else Lane(self._model)
        self._streams = Streams(
            num_streams or (num_cpu_streams() if is_cpu else 1),
            # each of OpenVINO's requests has a stream's cores
            lone_has_all_cores=compute.backend != "openvino",
        )

    @property
    def num_streams(self) -> int:
        """Batches that are computed side by side."""
        return self._streams.count

    @property
    def window_tokens(self) -> int:
        """How many tokens are worth sorting together."""
        return max(WINDOW_BATCHES * self.max_batch_tokens, self._least_window_tokens)

    @property
    def first_window_tokens(self) -> int:
        """How many tokens are worth waiting for while there is nothing else to do."""
        return _FIRST_WINDOW_BATCHES * self.num_streams * self.max_batch_tokens

    def close(self) -> None:
        """End the threads; nothing can be predicted any more."""
        self._streams.close()

    def settle_here(self) -> None:
        """Prepare the calling thread for small batches, which it then computes itself."""
        if self.lane is None:
            self._streams.settle_here()

    def plan(self, lengths: IntArray) -> list[IntArray]:
        """Batches of examples, as they are computed together; about those of a lane, if there is.

        Args:
            lengths: [examples] tokens of each.

        Returns:
            Positions in `lengths` for each batch.
        """
        if self._is_better_whole(lengths):
            return [np.argsort(-lengths, kind="stable")]
        batch_cost = _BATCH_FLOPS * self._config.num_layers / self._config.flops_per_token
        parts = self._parts(lengths)
        batches = [
            part[batch]
            for part in parts
            for batch in plan_batches(
                lengths[part], self.max_batch_tokens, self.grain, batch_cost=batch_cost
            )
        ]
        if len(parts) > 1:  # the last one to begin should be the first to end
            batches.sort(key=lambda batch: -self.num_padded(lengths[batch]))
        return batches

    def num_padded(self, lengths_B: IntArray) -> int:
        """Tokens that are computed for one batch of texts of these lengths, padding included."""
        return self._num_columns(lengths_B) * len(lengths_B)

    def _is_better_whole(self, lengths: IntArray) -> bool:
        """Whether one batch of all, on all cores, is computed soonest."""
        if not len(lengths):
            return False
        num_tokens, num_padded = int(lengths.sum()), self.num_padded(lengths)
        is_one_batch = num_padded <= self.max_batch_tokens
        is_mostly_text = num_padded <= _MOST_PADDED * num_tokens
        flops = self._flops(lengths)
        return is_one_batch and is_mostly_text and self._streams.is_better_whole(num_tokens, flops)

    def _parts(self, lengths: IntArray) -> list[IntArray]:
        """Shares of the streams, where full batches would leave one of them without any."""
        if int(lengths.sum()) < self.num_streams * self.max_batch_tokens:
            return split_evenly(lengths, self._streams.num_parts(self._flops(lengths)))
        return [np.arange(len(lengths))]

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
        return self.predict_prepared(self.prepare(ids, offsets), on_batch)

    def prepare(self, ids: npt.NDArray[np.int32], offsets: IntArray) -> Prepared:
        """What `predict` does before it computes; may run ahead, in another thread.

        Args:
            ids: token ids of all examples, one after the other.
            offsets: [N + 1], where each example begins in `ids` and the last one ends; none is
                empty.
        """
        starts, lengths = offsets[:-1], np.diff(offsets)
        lengths = self._without_trailing_pads(ids, starts, lengths)
        raw, size = ids.tobytes(), ids.itemsize
        ends = (starts + lengths) * size
        first_U, inverse_N = unique_rows(
            [raw[a:b] for a, b in zip((starts * size).tolist(), ends.tolist(), strict=True)]
        )
        loaded = None
        batches: list[IntArray] = []
        if self.lane is None:
            batches = self.plan(lengths[first_U])
        else:
            # A lane computes its texts as they lie, so they are sorted here.
            order_U = np.argsort(-lengths[first_U], kind="stable")
            places_U = np.empty_like(order_U)
            places_U[order_U] = np.arange(len(order_U))
            first_U, inverse_N = first_U[order_U], places_U[inverse_N]
            loaded = self.lane.load(ids, starts[first_U], lengths[first_U])
        return Prepared(
            ids,
            starts[first_U],
            lengths[first_U],
            np.bincount(inverse_N, minlength=len(first_U)),
            inverse_N,
            batches,
            loaded,
        )

    def predict_prepared(self, prepared: Prepared, on_batch: Callable[[int, int], None]) -> Logits:
        """What `predict` does with what is prepared."""
        lengths_U, counts_U = prepared.lengths_U, prepared.counts_U
        tokens_U = counts_U * lengths_U
        logits_UC = np.zeros((len(lengths_U), self._config.num_labels), dtype=np.float32)
        failed_U = np.zeros(len(lengths_U), dtype=np.bool_)
        num_padded_tokens = 0
        if self.lane is not None and prepared.loaded is not None:
            for launched, num_tokens in self._launch(self.lane, prepared.loaded):
                num_padded_tokens += num_tokens
                if num_tokens:
                    on_batch(int(counts_U[launched].sum()), int(tokens_U[launched].sum()))
                else:
                    failed_U[launched] = True
            logits_UC = self.lane.fetch(prepared.loaded)
            logits_UC[failed_U] = 0
        else:
            with closing(self._compute(prepared)) as computed:
                for batch, logits_BC in computed:
                    if logits_BC is None:
                        failed_U[batch] = True
                        continue
                    logits_UC[batch] = logits_BC.numpy()
                    num_padded_tokens += self.num_padded(lengths_U[batch])
                    on_batch(int(counts_U[batch].sum()), int(tokens_U[batch].sum()))
        return Logits(
            logits_UC[prepared.inverse_N],
            failed_U[prepared.inverse_N],
            len(lengths_U),
            num_padded_tokens,
        )

    def _launch(self, lane: Lane, loaded: Loaded) -> Generator[tuple[slice, int], None, None]:
        """Batches that are done, with the tokens computed; none for a row that does not fit."""
        lengths = loaded.host_lengths
        counts = lane.plan(lengths, self.max_batch_tokens)[::-1]
        first = 0
        launched: deque[tuple[slice, int, Any]] = deque()
        while counts or launched:
            if not counts or len(launched) == _MOST_LAUNCHED:
                batch, num_tokens, event = launched.popleft()
                event.synchronize()
                yield batch, num_tokens
                continue
            last = first + counts.pop()
            num_tokens = lane.num_tokens(lengths[first:last])
            event = lane.launch(loaded, first, last)
            if event is not None:
                launched.append((slice(first, last), num_tokens, event))
            elif last - first > 1:
                self._lower_budget(num_tokens)
                counts = lane.plan(lengths[first:], self.max_batch_tokens)[::-1]
                continue
            else:
                _tell_too_long(int(lengths[first]))
                yield slice(first, last), 0
            first = last

    def _compute(
        self, prepared: Prepared
    ) -> Generator[tuple[IntArray, torch.Tensor | None], None, None]:
        """Batches with their logits; None for a row that does not fit even alone."""
        ids, starts_U, lengths_U = prepared.ids, prepared.starts_U, prepared.lengths_U
        queue = list(reversed(prepared.batches))
        is_lone = len(queue) == 1
        submit = self._streams.submit
        if is_lone:
            submit = self._streams.submit_lone(self._flops(lengths_U))
        pending: deque[tuple[IntArray, Future[torch.Tensor]]] = deque()
        try:
            while queue or pending:
                # one more than there are streams, so that none waits for its next batch
                while queue and len(pending) <= self.num_streams:
                    batch = queue.pop()
                    future = submit(self._forward, ids, starts_U[batch], lengths_U[batch])
                    pending.append((batch, future))
                batch, future = pending.popleft()
                if not isinstance(future.exception(), torch.OutOfMemoryError):
                    yield batch, future.result()
                elif len(batch) > 1:
                    queue += self._halve(batch, lengths_U[batch])
                else:
                    _tell_too_long(int(lengths_U[batch[0]]))
                    yield batch, None
        finally:
            for _, future in pending:
                future.cancel()
            wait([future for _, future in pending])

    def _flops(self, lengths: IntArray) -> float:
        return float(lengths.sum()) * self._config.flops_per_token

    @torch.inference_mode()
    def _forward(
        self, ids: npt.NDArray[np.int32], starts_B: IntArray, lengths_B: IntArray
    ) -> torch.Tensor:
        columns_T = np.arange(self._num_columns(lengths_B))
        # Beyond a row's end any token will do: causal attention never looks there.
        places_BT = np.minimum(starts_B[:, None] + columns_T, len(ids) - 1)
        ids_BT = torch.from_numpy(ids[places_BT].astype(np.int64))
        logits_BC: torch.Tensor = self._model(ids_BT, torch.from_numpy(lengths_B))
        return logits_BC

    def _num_columns(self, lengths_B: IntArray) -> int:
        """Tokens that each row of a batch is padded to."""
        return min(-(-int(lengths_B.max()) // self.grain) * self.grain, self._config.longest)

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

    def _halve(self, batch: IntArray, lengths_B: IntArray) -> list[IntArray]:
        """What to compute instead of a batch that did not fit; remembers a budget that will."""
        self._lower_budget(self.num_padded(lengths_B))
        middle = len(batch) // 2
        return [batch[middle:], batch[:middle]]

    def _lower_budget(self, num_tokens: int) -> None:
        """Remember that a batch of so many tokens did not fit."""
        self.max_batch_tokens = min(self.max_batch_tokens, max(num_tokens // 2, 1))
        log.warning("out of device memory: batches of at most %d tokens now", self.max_batch_tokens)


def _tell_too_long(num_tokens: int) -> None:
    log.warning("one row of %d tokens does not fit into the device's memory", num_tokens)
