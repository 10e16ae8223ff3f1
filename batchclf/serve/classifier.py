"""The model of a server: warmed up before anybody waits for it."""

import time
from dataclasses import dataclass

from batchclf.classifier import Classifier
from batchclf.config import ModelSettings
from batchclf.serve.extent import Extent

_SHORT_TEXT = "a short text"
_LONG_TEXT = "one word and then another " * 2048
_NUM_TIMED = 5


@dataclass(frozen=True)
class Pace:
    """How fast a warm model is.

    Attributes:
        smallest_s: what the smallest batch takes, and so what sharing a batch saves a request.
        tokens_per_s: of full batches, as many at once as the device computes side by side.
        batch_tokens: of one of them.
        num_streams: so many are computed side by side.
    """

    smallest_s: float
    tokens_per_s: float
    batch_tokens: int
    num_streams: int

    def tokens_within(self, seconds: float) -> int:
        """Tokens that take no longer; fewer than fill a batch are computed by one stream alone."""
        tokens = seconds * self.tokens_per_s
        by_one_stream = tokens / self.num_streams
        return int(tokens if by_one_stream >= self.batch_tokens else by_one_stream)


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

    @property
    def tokens_at_once(self) -> int:
        """Tokens that keep the device busy: on a CPU, batches that are computed side by side."""
        return self.max_batch_tokens * self._engine.num_streams

    def warm_up(self) -> Pace:
        """Compute what the first requests will need, before anybody waits for it."""
        num_rows = max(1, self.tokens_at_once // self.max_length)
        full = [f"{row} {_LONG_TEXT}" for row in range(num_rows)]
        self.predict(full)
        full_s = self._time(full)
        smallest_s = min(self._time([_SHORT_TEXT]) for _ in range(_NUM_TIMED))
        return Pace(
            smallest_s,
            num_rows * self.max_length / full_s,
            self.max_batch_tokens,
            self._engine.num_streams,
        )

    def _time(self, texts: list[str]) -> float:
        began = time.perf_counter()
        self.predict(texts)
        return time.perf_counter() - began
