"""Texts -> predictions, with the same encoder and engine as `classify`."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from batchclf.checkpoint import load
from batchclf.config import ModelSettings
from batchclf.engine import Engine, build_model, choose_compute
from batchclf.predictions import Predictions, restore, softmax
from batchclf.serve.extent import Extent
from batchclf.text import TextEncoder

if TYPE_CHECKING:
    from batchclf.checkpoint import Checkpoint

_SHORT_TEXT = "a short text"
_LONG_TEXT = "one word and then another " * 2048
_NUM_TIMED = 5


class Classifier:
    """A loaded model. `predict` is for one thread at a time.

    Raises:
        ConfigError, CheckpointError: the model cannot be loaded here.
    """

    def __init__(self, settings: ModelSettings, min_score: float) -> None:
        self.compute = choose_compute(settings.device, settings.dtype)
        checkpoint: Checkpoint = load(settings.model, max_length=settings.max_length)
        self.labels = checkpoint.labels
        self.max_length = checkpoint.max_length
        self.name = checkpoint.path.resolve().name
        self.content_hash = checkpoint.content_hash
        self.extent = Extent(checkpoint.tokenizer, checkpoint.max_length, checkpoint.normalise)
        self._temperature = checkpoint.temperature
        self._min_score = min_score
        self._encoder = TextEncoder(
            checkpoint.tokenizer, checkpoint.max_length, checkpoint.normalise
        )
        model = build_model(checkpoint, self.compute)
        self._engine = Engine(model, self.compute, settings.max_batch_tokens)

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that the device computes at once."""
        return self._engine.max_batch_tokens

    def estimate_tokens(self, text: str | None) -> int:
        """About how many tokens a text costs, without tokenising it; at least 1."""
        return 1 if text is None else min(self.max_length, 1 + len(text) // 4)

    def warm_up(self) -> float:
        """Compute what the first requests will need, before anybody waits for it.

        Returns:
            Seconds that the smallest batch takes: what sharing a batch saves a request.
        """
        num_rows = max(1, self.max_batch_tokens // self.max_length)
        self.predict([f"{row} {_LONG_TEXT}" for row in range(num_rows)])
        return min(self._time(_SHORT_TEXT) for _ in range(_NUM_TIMED))

    def _time(self, text: str) -> float:
        began = time.perf_counter()
        self.predict([text])
        return time.perf_counter() - began

    def predict(self, texts: Sequence[str | None]) -> Predictions:
        """Predictions of N texts; one that is None has label -1 and no error of ours.

        Args:
            texts: [N] as from `join_text`.
        """
        encoded = self._encoder.encode(texts)
        lengths = encoded.num_tokens
        offsets = np.concatenate(([0], np.cumsum(lengths[lengths > 0], dtype=np.int64)))
        logits = self._engine.predict(encoded.ids, offsets, _ignore)
        return restore(
            softmax(logits.logits_NC / self._temperature),
            logits.failed_N,
            num_tokens=lengths,
            truncated=encoded.truncated,
            errors=encoded.errors,
            min_score=self._min_score,
        )


def _ignore(num_examples: int, num_tokens: int) -> None:
    """Nobody watches single batches here."""
