"""When a CPU cuts work up among its streams, and when one batch has all of its cores."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from batchclf import streams
from batchclf.streams import Streams

FLOPS, TOKENS = streams._STREAM_FLOPS, streams._STREAM_TOKENS
LARGE = streams.num_cores() * streams._CORE_FLOPS


@pytest.fixture
def four() -> Iterator[Streams]:
    made = Streams(4, lone_has_all_cores=True)
    yield made
    made.close()


@pytest.fixture
def never_joined() -> Iterator[Streams]:
    made = Streams(4, lone_has_all_cores=False)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("flops", "parts"),
    [
        pytest.param(0, 1, id="nothing"),
        pytest.param(2 * FLOPS - 1, 1, id="too little for two"),
        pytest.param(2 * FLOPS, 2, id="enough for two"),
        pytest.param(1000 * FLOPS, 4, id="enough for all"),
    ],
)
def test_each_part_is_worth_a_stream(four: Streams, flops: float, parts: int) -> None:
    assert four.num_parts(flops) == parts


def test_few_tokens_are_better_whole_where_they_are_worth_all_cores(four: Streams) -> None:
    assert four.is_better_whole(4 * TOKENS - 1, LARGE)


def test_many_tokens_are_better_in_parts(four: Streams) -> None:
    assert not four.is_better_whole(4 * TOKENS, LARGE)


def test_what_is_not_worth_all_cores_is_better_in_parts(four: Streams) -> None:
    assert not four.is_better_whole(2, 1.0)


def test_nothing_is_better_whole_where_no_batch_may_have_all_cores(never_joined: Streams) -> None:
    assert not never_joined.is_better_whole(2, LARGE)


def test_a_lone_batch_has_no_more_than_a_stream_where_none_may_have_all_cores(
    never_joined: Streams,
) -> None:
    submit = never_joined.submit_lone(LARGE)
    assert submit(_num_threads).result() == max(streams.num_cores() // 4, 1)


def test_a_large_lone_batch_of_a_settled_thread_has_all_cores(four: Streams) -> None:
    def predict() -> torch.Tensor:
        four.settle_here()
        return four.submit_lone(LARGE)(_num_threads).result()

    with ThreadPoolExecutor(1) as caller:
        assert caller.submit(predict).result() == streams.num_cores()


def _num_threads() -> torch.Tensor:
    return torch.tensor(torch.get_num_threads())
