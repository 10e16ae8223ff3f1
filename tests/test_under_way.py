"""What waits for which shard: a flow may end when nothing does."""

import pyarrow as pa
import pytest

from batchclf.errors import ErrorRateError, OutputError
from batchclf.intake import ReadyArticle, ReadyShards
from batchclf.shards import Shard
from batchclf.source import QueuedArticle
from batchclf.sqs import Delivery
from batchclf.store import Source
from batchclf.work.under_way import UnderWay
from batchclf.worker import Arrived, Outcome

SET = Shard(Source("sqs://1/news", "sha256:a", 0), 0, 3)
PARTS = [Shard(Source("s3://in/a.csv", '"e"', 9), start, start + 5) for start in (5, 0)]


def delivery(name: str) -> Delivery:
    return Delivery(name, name, "", 1, 0.0, 0.0, 60.0)


def articles(*names: str) -> list[ReadyArticle]:
    return [ReadyArticle(delivery(name), QueuedArticle({}, name, 1, 2)) for name in names]


def names(found: "list[ReadyArticle]") -> list[str]:
    return [each.delivery.message_id for each in found]


def test_of_a_set_that_failed_for_one_row_the_others_stay_under_way_until_they_are_taken() -> None:
    """Else the flow could end between the end of their set and their next one."""
    under_way = UnderWay()
    under_way.begin_set(articles("a", "bad", "c"), Arrived(SET, pa.schema([]), []))
    failed, _ = under_way.end(Outcome(SET, error=ErrorRateError("1 of 3"), failed_rows=(1,)))
    assert names(list(failed)) == ["bad"]
    assert under_way
    assert names(under_way.take_again()) == ["a", "c"]
    assert not under_way


@pytest.mark.parametrize("error", [None, OutputError("another content")])
def test_all_articles_of_another_set_end_with_it(error: OutputError | None) -> None:
    under_way = UnderWay()
    under_way.begin_set(articles("a", "b"), Arrived(SET, pa.schema([]), []))
    ended, _ = under_way.end(Outcome(SET, error=error, failed_rows=(1,)))
    assert names(list(ended)) == ["a", "b"]
    assert not under_way


def test_a_message_is_done_with_the_last_of_its_shards_and_two_may_wait_for_the_same() -> None:
    under_way = UnderWay()
    both, one = ReadyShards(delivery("both"), set(PARTS)), ReadyShards(delivery("one"), {PARTS[0]})
    assert under_way.begin(both) == sorted(PARTS, key=lambda shard: shard.start)
    assert under_way.begin(one) == []
    assert under_way.end(Outcome(PARTS[0])) == ((), [one])
    assert under_way.end(Outcome(PARTS[1])) == ((), [both])
    assert not under_way
