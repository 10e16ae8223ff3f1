"""The model of a server: warmed up before anybody waits for it."""

import time

from batchclf.classifier import Classifier
from batchclf.config import ModelSettings
from batchclf.serve.extent import Extent

_SHORT_TEXT = "a short text"
_LONG_TEXT = "one word and then another " * 2048
_NUM_TIMED = 5


class ServedClassifier(Classifier):
    """A loaded model, and what a server asks about texts besides.

    Attributes:
        extent: how far into a text the model reads.

    Raises:
        ConfigError, CheckpointError: the model cannot be loaded here.
    """

    def __init__(
        self, settings: ModelSettings, min_score: float, endpoint_url: str | None = None
    ) -> None:
        super().__init__(settings, min_score, endpoint_url)
        checkpoint = self.checkpoint
        self.extent = Extent(checkpoint.tokenizer, checkpoint.max_length, checkpoint.normalise)

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
