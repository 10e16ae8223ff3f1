"""Articles on their way from the queue to a set."""

import hashlib
import time
from collections.abc import Sequence

from batchclf.config import ReadSettings
from batchclf.intake import ReadyArticle
from batchclf.messages import ARTICLES
from batchclf.shards import Shard
from batchclf.source import QueuedArticle, article_batches, article_schema
from batchclf.store import Source
from batchclf.work.settings import QueueSettings
from batchclf.worker import Arrived

GATHERED_BYTES = 64 << 20  # of articles in one set
EARLY_ROWS = 512  # a set of so many is labelled as soon as the device would have nothing to do
WAIT_S = 0.2  # at most, so that the flow is looked at now and then


class Gathered:
    """Articles that wait to be labelled as one sorted set."""

    def __init__(self, settings: QueueSettings, queue_path: str, read: ReadSettings) -> None:
        self._settings = settings
        self._uri = f"{ARTICLES}{queue_path}"
        self._read = read
        self._articles: list[ReadyArticle] = []
        self._num_bytes = 0

    def add(self, ready: ReadyArticle) -> None:
        self._articles.append(ready)
        self._num_bytes += ready.article.size_bytes

    def take(self) -> list[ReadyArticle]:
        taken, self._articles, self._num_bytes = self._articles, [], 0
        return taken

    @property
    def is_full(self) -> bool:
        return (
            len(self._articles) >= self._settings.gather_rows or self._num_bytes >= GATHERED_BYTES
        )

    @property
    def is_worth_it(self) -> bool:
        """Whether a set may be closed before it is full, rather than let the device wait."""
        return len(self._articles) >= EARLY_ROWS

    @property
    def is_due(self) -> bool:
        return bool(self._articles) and self._left_s() <= 0

    def wait_s(self) -> float:
        """Until there is something to do here, or to look at the flow."""
        return min(max(self._left_s(), 0), WAIT_S) if self._articles else WAIT_S

    def _left_s(self) -> float:
        first = self._articles[0].delivery
        return first.received_s + self._settings.gather_s - time.monotonic()

    def make_set(self, ready: Sequence[ReadyArticle]) -> Arrived:
        """Known by its queue and its message ids; its rows are in the order of receipt."""
        articles = [each.article for each in ready]
        shard = Shard(Source(self._uri, _version(articles), 0), 0, len(articles))
        return Arrived(shard, article_schema(self._read), article_batches(articles, self._read))


def _version(articles: Sequence[QueuedArticle]) -> str:
    ids = "\n".join(article.message_id for article in articles)
    return f"sha256:{hashlib.sha256(ids.encode()).hexdigest()}"
