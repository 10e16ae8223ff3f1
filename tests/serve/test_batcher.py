import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from batchclf.predictions import Predictions
from batchclf.serve.batcher import Batch, Batcher
from batchclf.serve.refusal import Refusal

Texts = Sequence[str | None]


class Model:
    """Predicts the length of each text as its number of tokens; waits where a test says so.

    Attributes:
        meanwhile: called while each batch is computed, by who computes it.
    """

    def __init__(self) -> None:
        self.meanwhile: Callable[[], None] = lambda: None
        self.batches: list[list[str | None]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_computing = threading.Event()

    def __call__(self, texts: Texts) -> Predictions:
        self.is_computing.set()
        self.meanwhile()
        assert self.may_go_on.wait(30)
        self.batches.append(list(texts))
        return predictions_of(texts)


def predictions_of(texts: Texts) -> Predictions:
    count = len(texts)
    lengths = np.array([len(text or "") for text in texts], np.int32)
    errors = {row: f"short: {text}" for row, text in enumerate(texts) if text == "!"}
    flags = np.zeros(count, np.bool_)
    return Predictions(
        np.zeros(count, np.int64), np.ones((count, 1), np.float32), flags, lengths, flags, errors
    )


def run(
    work: Callable[[Batcher, Model], Awaitable[Any]], *, on_batch: Any = None, **settings: Any
) -> Any:
    """Run `work` with a batcher of a fake model."""
    model = Model()

    async def main() -> Any:
        batcher = Batcher(
            model,
            lambda text: len(text or "."),
            **{"batch_tokens": 100, "max_wait_s": 30.0, "max_queue_rows": 1000} | settings,
            on_batch=on_batch or ignore,
        )
        running = asyncio.create_task(batcher.run())
        try:
            return await work(batcher, model)
        finally:
            model.may_go_on.set()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return asyncio.run(asyncio.wait_for(main(), 60))


async def while_computing(model: Model) -> None:
    await asyncio.to_thread(model.is_computing.wait, 30)
    model.is_computing.clear()


def ignore(batch: Batch) -> None:
    """Nobody counts."""


@given(
    st.lists(
        st.lists(st.text("ab!", min_size=1, max_size=30) | st.none(), min_size=1, max_size=40),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 120),
)
def test_every_request_gets_the_predictions_of_its_own_texts(
    requests: list[list[str | None]], batch_tokens: int
) -> None:
    async def work(batcher: Batcher, model: Model) -> list[Predictions]:
        answers = await asyncio.gather(*(batcher.classify(texts) for texts in requests))
        assert batcher.num_waiting_rows == 0
        return answers

    answers = run(work, batch_tokens=batch_tokens, max_wait_s=0.0)
    for texts, answer in zip(requests, answers, strict=True):
        assert answer.num_tokens.tolist() == [len(text or "") for text in texts]
        assert dict(answer.errors) == dict(predictions_of(texts).errors)


def test_a_lone_request_does_not_wait() -> None:
    async def work(batcher: Batcher, model: Model) -> list[list[str | None]]:
        await batcher.classify(["a"])  # would take a quarter of an hour otherwise
        return model.batches

    assert run(work, max_wait_s=1000.0) == [["a"]]


def test_companions_that_do_not_come_are_not_waited_for() -> None:
    async def work(batcher: Batcher, model: Model) -> list[list[str | None]]:
        await asyncio.gather(*(batcher.classify([name]) for name in "abc"))
        await batcher.classify(["d"])  # would take a quarter of an hour otherwise
        return model.batches

    assert run(work, max_wait_s=1000.0) == [["a", "b", "c"], ["d"]]


def test_requests_that_arrive_during_a_batch_share_the_next_one() -> None:
    async def work(batcher: Batcher, model: Model) -> list[list[str | None]]:
        model.may_go_on.clear()
        first = batcher.classify(["a"])
        await while_computing(model)
        others = [batcher.classify([name]) for name in "bcd"]
        await asyncio.sleep(0)
        model.may_go_on.set()
        await asyncio.gather(first, *others)
        return model.batches

    assert run(work) == [["a"], ["b", "c", "d"]]


def test_a_batch_begins_when_it_is_full() -> None:
    batches: list[Batch] = []

    async def work(batcher: Batcher, model: Model) -> None:
        await asyncio.gather(*(batcher.classify(["a" * 60]) for _ in range(4)))

    run(work, batch_tokens=100, on_batch=batches.append)
    assert [len(batch.predictions) for batch in batches] == [2, 2]


def test_an_article_does_not_wait_behind_a_file() -> None:
    async def work(batcher: Batcher, model: Model) -> int:
        model.may_go_on.clear()
        file = batcher.classify(["a" * 10] * 200)
        await while_computing(model)
        article = batcher.classify(["article"])
        await asyncio.sleep(0)
        model.may_go_on.set()
        await article
        assert not file.done()
        await file
        return next(n for n, batch in enumerate(model.batches) if "article" in batch)

    assert run(work) == 1


def test_rows_beyond_the_bound_are_refused_with_a_time_to_come_back() -> None:
    async def work(batcher: Batcher, model: Model) -> Refusal:
        model.may_go_on.clear()
        first = batcher.classify(["a"])
        await while_computing(model)
        waiting = batcher.classify(["b"] * 8)
        await asyncio.sleep(0)
        with pytest.raises(Refusal) as refused:
            await batcher.classify(["c"] * 3)
        model.may_go_on.set()
        await asyncio.gather(first, waiting)
        return refused.value

    refusal = run(work, max_queue_rows=10)
    assert refusal.status == 429
    assert refusal.retry_after_s is not None
    assert 1 <= refusal.retry_after_s <= 60


def test_an_empty_queue_takes_a_request_of_any_size() -> None:
    async def work(batcher: Batcher, model: Model) -> int:
        return len(await batcher.classify(["a"] * 50))

    assert run(work, max_queue_rows=10) == 50


def test_a_request_that_was_given_up_is_not_computed() -> None:
    async def work(batcher: Batcher, model: Model) -> list[list[str | None]]:
        model.may_go_on.clear()
        first = batcher.classify(["a"])
        await while_computing(model)
        gone = batcher.classify(["gone"] * 5)
        other = batcher.classify(["b"])
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert batcher.num_waiting_rows == 1
        model.may_go_on.set()
        await asyncio.gather(first, other)
        assert batcher.num_waiting_rows == 0
        return model.batches

    assert run(work, max_wait_s=0.0) == [["a"], ["b"]]


def test_a_small_batch_is_computed_in_the_event_loop() -> None:
    async def work(batcher: Batcher, model: Model) -> list[bool]:
        here: list[bool] = []
        model.meanwhile = lambda: here.append(threading.current_thread() is threading.main_thread())
        for text in ("four", "two"):
            await batcher.classify([text])
        return here

    assert run(work, max_wait_s=0.0, inline_tokens=3) == [False, True]


def test_requests_that_came_while_a_small_batch_was_computed_share_the_next() -> None:
    async def work(batcher: Batcher, model: Model) -> list[list[str | None]]:
        others: list[asyncio.Task[Predictions]] = []

        async def ask(text: str, turns: int) -> Predictions:
            for _ in range(turns):
                await asyncio.sleep(0)
            return await batcher.classify([text])

        def begin_others() -> None:
            model.meanwhile = lambda: None
            others.append(asyncio.create_task(ask("soon", 0)))
            others.append(asyncio.create_task(ask("after three turns", 3)))

        model.meanwhile = begin_others
        await batcher.classify(["first"])
        await asyncio.gather(*others)
        return model.batches

    found = run(work, max_wait_s=0.0, inline_tokens=100)
    assert found == [["first"], ["soon", "after three turns"]]


def test_what_breaks_the_model_ends_the_batcher_and_answers_its_requests() -> None:
    def broken(texts: Texts) -> Predictions:
        raise MemoryError("no more")

    async def main() -> None:
        batcher = Batcher(
            broken,
            lambda text: len(text or ""),
            batch_tokens=10,
            max_wait_s=0.0,
            max_queue_rows=10,
            on_batch=ignore,
        )
        running = asyncio.create_task(batcher.run())
        with pytest.raises(Refusal) as refused:
            await batcher.classify(["a"])
        assert refused.value.status == 503
        with pytest.raises(MemoryError):
            await running

    asyncio.run(main())
