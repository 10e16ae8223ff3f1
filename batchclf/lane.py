"""A GPU that never waits: batches are launched ahead of each other, results come back at the end.

    load (any thread, beside the computing) -> launch, launch, ... -> fetch

Token ids of many batches travel at once, through pinned memory and on a stream of their own, while
the batches before them are computed. Each batch is cut out of them on the device. An event behind
each batch tells when it is done, and nothing waits for the whole device.

Shape suffixes: U texts, C classes.
"""
# ruff: noqa: N803, N806, N815 - names of tensors end in their shape, in capitals

import contextlib
import functools
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchclf.batching import pack_batches, plan_batches
from batchclf.model import GPT2Classifier
from batchclf.varlen import Backend, Batch, VarlenClassifier, attentions, lay_out

log = logging.getLogger(__name__)

COMPILED = ", compiled"


@dataclass(frozen=True)
class Loaded:
    """Texts on the device, in the order in which they are computed: the longest come first.

    Attributes:
        ids: int32, token ids of all texts in any order.
        starts_U, lengths_U: int64, where in `ids` each text begins, and its tokens.
        logits_UC: float32, zeros until they are computed.
        host_lengths: `lengths_U`, on this side.
        ready: passed when all of this has arrived.
    """

    ids: Tensor
    starts_U: Tensor
    lengths_U: Tensor
    logits_UC: Tensor
    host_lengths: npt.NDArray[np.int64]
    ready: "torch.cuda.Event | _Passed"


class _Passed:
    """An event of a device that works at once."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""


class Lane:
    """A model on a device, and the ways in which that device can compute it.

    Args:
        model: on the device, in eval mode.
        backend: of `torch.compile`.

    Attributes:
        ways: names of the ways to compute; the first is used until another is chosen.
    """

    def __init__(self, model: GPT2Classifier, backend: Backend = "inductor") -> None:
        weight: Tensor = model.transformer.wte.weight
        self.device, dtype = weight.device, weight.dtype
        self._model = model
        self._backend = backend
        self._is_cuda = self.device.type == "cuda"
        found = attentions(model.config, self.device, dtype)
        self._attentions = {attention.name: attention for attention in found}
        self.ways = (*self._attentions, *(name + COMPILED for name in self._attentions))
        self._feeder: Any = None
        if self._is_cuda:
            self._feeder = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.use(self.ways[0])

    def use(self, way: str) -> None:
        """Compute in one of `ways` from now on."""
        name, comma, _ = way.partition(COMPILED)
        attention = self._attentions[name]
        self.way = way
        self._classifier = VarlenClassifier(
            self._model, attention, self._backend if comma else None
        )

    def plan(self, lengths: npt.NDArray[np.int64], max_tokens: int) -> list[int]:
        """How many texts each batch has.

        Args:
            lengths: of texts that follow one another, the longest first.
            max_tokens: of one batch, padding included.
        """
        if self._classifier.attention.pads:
            return [len(batch) for batch in plan_batches(lengths, max_tokens)]
        return pack_batches(lengths, max_tokens)

    def num_tokens(self, lengths: npt.NDArray[np.int64]) -> int:
        """Tokens that are computed for the texts of one batch, padding included."""
        if self._classifier.attention.pads:
            return int(lengths.max()) * len(lengths)
        return int(lengths.sum())

    def load(
        self,
        ids: npt.NDArray[np.int32],
        starts_U: npt.NDArray[np.int64],
        lengths_U: npt.NDArray[np.int64],
    ) -> Loaded:
        """Send texts to the device, beside whatever it computes.

        Args:
            ids: token ids of all texts.
            starts_U: where in `ids` each text begins.
            lengths_U: its tokens, at least 1; the longest text comes first.
        """
        num_labels = self._model.config.num_labels
        with self._feeding():
            sent = (
                self._send(ids, torch.int32),
                self._send(starts_U, torch.int64),
                self._send(lengths_U, torch.int64),
            )
            logits_UC = torch.zeros(
                (len(lengths_U), num_labels), dtype=torch.float32, device=self.device
            )
            loaded = Loaded(*sent, logits_UC, lengths_U, self._event())
        if self._is_cuda:
            # They are freed by this thread, and may then still be in use by the other stream.
            computing = torch.cuda.default_stream(self.device)
            for tensor in (*sent, logits_UC):
                tensor.record_stream(computing)
        return loaded

    @torch.inference_mode()
    def launch(self, loaded: Loaded, first: int, last: int) -> "torch.cuda.Event | _Passed | None":
        """Have texts `first` to `last` (exclusive) computed as one batch.

        Returns:
            An event to wait for; None where the device has not enough memory.
        """
        lengths = loaded.host_lengths[first:last]
        try:
            with self._computing():
                if isinstance(loaded.ready, torch.cuda.Event):
                    torch.cuda.current_stream().wait_event(loaded.ready)
                batch = lay_out(
                    loaded.ids,
                    loaded.starts_U[first:last],
                    loaded.lengths_U[first:last],
                    num_tokens=self.num_tokens(lengths),
                    longest=int(lengths.max()),
                    pad=self._classifier.attention.pads,
                )
                loaded.logits_UC[first:last] = self._logits(batch)
                return self._event()
        except torch.OutOfMemoryError:
            return None

    def fetch(self, loaded: Loaded) -> npt.NDArray[np.float32]:
        """The logits, [U, C], when all that was launched is done."""
        if not self._is_cuda:
            return loaded.logits_UC.numpy()
        with self._computing():
            host_UC = torch.empty_like(loaded.logits_UC, device="cpu", pin_memory=True)
            host_UC.copy_(loaded.logits_UC, non_blocking=True)
            self._event().synchronize()
        return host_UC.numpy()

    def _logits(self, batch: Batch) -> Tensor:
        if not self._classifier.is_compiled:
            return self._classifier(batch)
        try:
            return self._classifier(batch)
        except _compile_errors() as error:
            reason = " ".join(str(error).split("\n")[:2])  # a backend's own error is on the second
            log.warning(
                "torch.compile failed, so operations run one by one: %s: %s",
                type(error).__name__,
                reason,
            )
        self.use(self._classifier.attention.name)
        return self._classifier(batch)

    def _send(self, values: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
        # torch keeps pinned memory until the device has read it.
        host = torch.empty(values.shape, dtype=dtype, pin_memory=self._is_cuda)
        host.numpy()[:] = values
        return host.to(self.device, non_blocking=True)

    def _event(self) -> "torch.cuda.Event | _Passed":
        """Passed when all that was launched on the current stream is done."""
        if not self._is_cuda:
            return _Passed()
        # Whoever waits for it sleeps, and leaves its core to the tokeniser.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _feeding(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._feeder) if self._feeder else contextlib.nullcontext()

    def _computing(self) -> AbstractContextManager[Any]:
        if not self._is_cuda:
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.default_stream(self.device))


@functools.cache
def _compile_errors() -> tuple[type[Exception], ...]:
    """What `torch.compile` raises when it cannot compile here, all of it worth going on without."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    return (
        TorchDynamoException,  # among them BackendCompilerFailed, InductorError, TritonMissing
        FailOnRecompileLimitHit,
        ConstraintViolationError,
        CppCompileError,
        InvalidCxxCompiler,
    )
