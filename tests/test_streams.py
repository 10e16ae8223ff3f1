"""When a CPU cuts work up among its streams, and when one batch has all of its cores."""

from collections.abc import Iterator

import pytest
import torch

from batchclf import streams
from batchclf.streams import Streams

FLOPS = streams._STREAM_FLOPS
LARGE = 100 * streams._CORE_FLOPS


@pytest.fixture
def four() -> Iterator[Streams]:
    made = Streams(4, lone_has_all_cores=True)
    yield made
    made.close()


@pytest.fixture
def four_without_a_whole() -> Iterator[Streams]:
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


def test_nothing_is_worth_all_cores_where_no_batch_may_have_them(
    four_without_a_whole: Streams,
) -> None:
    assert not four_without_a_whole.is_worth_all_cores(LARGE)


def test_a_lone_batch_has_no_more_than_a_stream_where_none_may_have_all_cores(
    four_without_a_whole: Streams,
) -> None:
    submit = four_without_a_whole.submit_lone(LARGE)
    assert submit(_num_threads).result() == max(streams.num_cores() // 4, 1)


def test_a_large_lone_batch_has_all_cores(four: Streams) -> None:
    assert four.submit_lone(LARGE)(_num_threads).result() == streams.num_cores()


def _num_threads() -> torch.Tensor:
    return torch.tensor(torch.get_num_threads())
