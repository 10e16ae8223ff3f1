"""The model of a server: warmed up before anybody waits for it."""

import time
from dataclasses import dataclass

from batchclf.classifier import Classifier
from batchclf.config import ModelSettings
from batchclf.serve.extent import Extent

_SHORT_TEXT = "a short text"
_LONG_TEXT = "one word and then another " * 2048
_NUM_TIMED = 5
_CHARS_PER_TOKEN = 4
_SEEN_CHARS = 512  # of a text, of whose bytes an estimate is made


@dataclass(frozen=True)
class Pace:
    """How fast a warm model is.

    Attributes:
        smallest_s: what the smallest batch takes, and so what sharing a batch saves a request.
        batch_s, batch_tokens: of the texts of one full batch, computed alone.
        full_s, full_tokens: of as many at once as the device computes side by side.
    """

    smallest_s: float
    batch_s: float
    batch_tokens: int
    full_s: float
    full_tokens: int

    def tokens_within(self, seconds: float) -> int:
        """Tokens that take no longer."""
        if seconds < max(self.batch_s, self.full_s):
            return int(self.batch_tokens * min(seconds / self.batch_s, 1.0))
        return int(self.full_tokens * seconds / self.full_s)


def estimate_tokens(text: str) -> int:
    """About how many tokens GPT-2's vocabulary has for a text; at least 1.

    English has one in four characters. What is not ASCII has about one a character or more, the
    more bytes the more tokens: of sentences in Cyrillic, Arabic, Devanagari, Hangul, Han, Kana and
    Thai letters this finds 60 to 110%. A smaller vocabulary has up to twice as many.
    """
    seen = text[:_SEEN_CHARS]
    num_extra = 0 if seen.isascii() else len(seen.encode()) - len(seen)
    a_char = (1 + 3 * num_extra / max(len(seen), 1)) / _CHARS_PER_TOKEN
    return 1 + int(len(text) * a_char)


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
        if text is None:
            return 1
        return min(self.max_length, estimate_tokens(text))

    @property
    def tokens_at_once(self) -> int:
        """Tokens that keep the device busy: on a CPU, batches that are computed side by side."""
        return self.max_batch_tokens * self._engine.num_streams

    def settle_here(self) -> None:
        """Prepare the calling thread for small batches, which it then computes itself."""
        self._engine.settle_here()

    def warm_up(self) -> Pace:
        """Compute what the first requests will need, before anybody waits for it.

        The calling thread is settled, as the one that computes small batches later.
        """
        self.settle_here()
        full = self._long_texts(self.tokens_at_once)
        batch = self._long_texts(self.max_batch_tokens)
        full_s = self._time_warm(full)
        batch_s = self._time_warm(batch) if len(batch) < len(full) else full_s
        self.predict(self._long_texts(1))  # one alone may be computed otherwise
        smallest_s = min(self._time([_SHORT_TEXT]) for _ in range(_NUM_TIMED))
        return Pace(
            smallest_s, batch_s, len(batch) * self.max_length, full_s, len(full) * self.max_length
        )

    def _long_texts(self, num_tokens: int) -> list[str]:
        num_rows = max(1, num_tokens // self.max_length)
        return [f"{row} {_LONG_TEXT}" for row in range(num_rows)]

    def _time_warm(self, texts: list[str]) -> float:
        self.predict(texts)
        return self._time(texts)

    def _time(self, texts: list[str]) -> float:
        began = time.perf_counter()
        self.predict(texts)
        return time.perf_counter() - began
