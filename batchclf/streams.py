"""The cores of a CPU, shared among batches that are computed side by side."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

# More batches side by side would wait for Python's lock.
_MOST_STREAMS = 16
# FLOPs that half of the cores, but one at least, should have to do each before a lone batch is
# given to all of them: at each of its products they wait for each other, and to wake threads that
# sleep takes time too. On two cores with AVX512-BF16, with a pause of 2 ms before each, texts of
# 352 tokens in all took the small model 3.4 ms on one core and 4.0 ms on both, 2,048 tokens 17 ms
# and 13 ms.
_CORE_FLOPS = 800_000_000
# FLOPs that a stream should have to do before little work is cut up among them: they wait for each
# other only once. On two cores with AVX2 texts of 400 tokens took the small model 17.5 ms as one
# batch on one core and 12 ms as two, 170 tokens 9.4 and 9.0 ms.
_STREAM_FLOPS = 128_000_000
# Tokens that a stream should have before work is cut up that is worth all cores: each reads all the
# weights. There 124M parameters took 117 ms for two texts of 14 tokens together and 221 ms side by
# side; from so many on as long either way, or a little less.
_STREAM_TOKENS = 240


@functools.cache
def num_cores() -> int:
    """As many as torch would use. Asked once: it changes with what the streams are given."""
    return torch.get_num_threads()


def num_cpu_streams() -> int:
    """How many batches a CPU computes side by side, each on cores of its own."""
    return min(num_cores(), _MOST_STREAMS)


class Streams:
    """Threads that compute batches, each with its share of the cores; and one that has them all.

    None is started before it has something to do.

    Args:
        count: batches that are computed side by side.
        lone_has_all_cores: whether a batch with nothing beside it may be computed by all of them.
    """

    def __init__(self, count: int, *, lone_has_all_cores: bool) -> None:
        self.count = count
        self._lone_has_all_cores = lone_has_all_cores
        self._cores_each = max(num_cores() // count, 1)
        self._threads = _compute_threads(count, self._cores_each)
        self._whole = _compute_threads(1, num_cores())

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()
        self._whole.shutdown()

    def settle_here(self) -> None:
        """Give the calling thread a stream's cores, so that it can compute small batches itself."""
        _use_cores(self._cores_each)

    def num_parts(self, flops: float) -> int:
        """Into how many parts little work may be cut, so that each is worth a stream."""
        return max(min(int(flops // _STREAM_FLOPS), self.count), 1)

    def is_better_whole(self, num_tokens: int, flops: float) -> bool:
        """Whether one batch is computed sooner by all cores than in parts side by side."""
        return self._is_worth_all_cores(flops) and num_tokens < self.count * _STREAM_TOKENS

    def submit(self, function: Callable[..., torch.Tensor], *args: Any) -> Future[torch.Tensor]:
        """Compute one batch of several."""
        return self._threads.submit(function, *args)

    def submit_lone(self, flops: float) -> Callable[..., Future[torch.Tensor]]:
        """How to compute one batch with nothing beside it: on all cores, where it is worth them.

        In the caller's thread if torch uses as many cores there: to hand it to another thread, and
        its logits back, would take time for nothing. The number is not changed for a batch, since
        torch then forgets the kernels that it has ready.
        """
        if not self._lone_has_all_cores:
            return self.submit
        is_large = self._is_worth_all_cores(flops)
        if torch.get_num_threads() == (num_cores() if is_large else self._cores_each):
            return _run_here
        return self._whole.submit if is_large else self.submit

    def _is_worth_all_cores(self, flops: float) -> bool:
        return self._lone_has_all_cores and flops > max(num_cores() // 2, 1) * _CORE_FLOPS


def _compute_threads(count: int, cores_each: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        count,
        thread_name_prefix="compute",
        initializer=_use_cores,
        initargs=(cores_each,),
    )


def _use_cores(count: int) -> None:
    """Have torch use so many in this thread."""
    # Asked first: else the thread's first operation takes over what another one has set since.
    torch.get_num_threads()
    torch.set_num_threads(count)


def _run_here(function: Callable[..., torch.Tensor], *args: Any) -> Future[torch.Tensor]:
    """Like `submit` of a thread pool, in the caller's own thread."""
    future: Future[torch.Tensor] = Future()
    try:
        future.set_result(function(*args))
    except torch.OutOfMemoryError as error:
        future.set_exception(error)
    return future
