"""Which messages wait for which shards."""

import threading
from collections.abc import Sequence

from batchclf.errors import ErrorRateError
from batchclf.intake import ReadyArticle, ReadyShards
from batchclf.shards import Shard
from batchclf.worker import Arrived, Outcome

_SETS_AHEAD = 2


class UnderWay:
    """Which messages wait for which shards, from the first stage of the flow to its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sets: dict[Shard, Sequence[ReadyArticle]] = {}
        self._messages: dict[Shard, list[ReadyShards]] = {}
        self._again: list[ReadyArticle] = []  # whose set failed for another's sake

    def __bool__(self) -> bool:
        with self._lock:
            return bool(self._sets or self._messages or self._again)

    @property
    def is_hungry(self) -> bool:
        """Whether fewer sets are here than the one that is labelled and one to go on with."""
        return len(self._sets) < _SETS_AHEAD

    def begin(self, ready: ReadyShards) -> list[Shard]:
        """The shards of a message that are not under way for another one, in their order."""
        with self._lock:
            new = [shard for shard in ready.left if shard not in self._messages]
            for shard in ready.left:
                self._messages.setdefault(shard, []).append(ready)
        return sorted(new, key=lambda shard: (shard.source.uri, shard.start))

    def begin_set(self, articles: Sequence[ReadyArticle], arrived: Arrived) -> Arrived:
        with self._lock:
            self._sets[arrived.shard] = articles
        return arrived

    def take_again(self) -> list[ReadyArticle]:
        """Articles for another set."""
        with self._lock:
            taken, self._again = self._again, []
            return taken

    def end(self, outcome: Outcome) -> tuple[Sequence[ReadyArticle], list[ReadyShards]]:
        """The articles of a set that came out, and the messages whose last shard this was.

        Where a set failed for its rows with errors, those alone; the others stay under way until
        they are taken again.
        """
        with self._lock:
            articles = self._sets.pop(outcome.shard, ())
            if isinstance(outcome.error, ErrorRateError):
                failed = set(outcome.failed_rows)
                self._again += [each for i, each in enumerate(articles) if i not in failed]
                articles = [each for i, each in enumerate(articles) if i in failed]
            waiting = self._messages.pop(outcome.shard, [])
            for each in waiting:
                each.left.discard(outcome.shard)
                if outcome.error is not None:
                    each.errors.append(outcome.error)
            return articles, [each for each in waiting if not each.left]
