"""Lengths -> batches. Pure integers: nothing here knows what a token or a device is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from batchclf.errors import ConfigError

# What starting one more batch costs at least, as a share of the token budget. A batch may end
# before its budget is full when that saves more padding than this. On lognormal article lengths
# (mean 450, cut at 1024, budget 4096, windows of 64 batches) full batches waste 1.3 to 1.9%; this
# share wastes 1.0 to 1.2% with one batch in eight more, 1/32 wastes 1.1 to 1.5% with one in
# sixteen.
_BATCH_COST = 1 / 64


def plan_batches(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]],
    max_tokens: int,
    grain: int = 1,
    *,
    batch_cost: float = 0.0,
) -> list[npt.NDArray[np.int64]]:
    """Cut examples, sorted by length, into batches under a token budget.

    The longest come first, so that a device that is too small shows at once; examples of one
    length stay in their order. Each example is in exactly one batch, no batch is empty, and
    longest x count <= max_tokens, except where a single example is longer than that. Within the
    budget, a batch ends where (batch cost + longest x count) / real tokens is least.

    Args:
        lengths: [examples] tokens of each example, 0 or more.
        max_tokens: the token budget of one batch, padding included.
        grain: lengths count as their next multiple of this, and large batches hold a multiple of
            it, so that few different shapes occur.
        batch_cost: tokens that are computed in the time that starting one more batch takes; never
            taken for less than a small share of the budget.

    Returns:
        One array of positions in `lengths` for each batch.

    Raises:
        ConfigError: the budget is below one token.
    """
    if max_tokens < 1:
        raise ConfigError(f"the token budget of a batch must be at least 1, not {max_tokens}")
    lengths = -(-np.asarray(lengths, dtype=np.int64) // grain) * grain
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    real_tokens = np.concatenate(([0], np.cumsum(descending)))
    longest_first = descending.tolist()
    batches: list[npt.NDArray[np.int64]] = []
    cost = max(batch_cost, max_tokens * _BATCH_COST)
    start = 0
    while start < len(order):
        longest = longest_first[start]
        end = min(start + max(1, max_tokens // max(1, longest)), len(order))
        if longest_first[end - 1] != longest:
            computed = longest * np.arange(end - start, 0, -1)
            real = real_tokens[end:start:-1] - real_tokens[start]
            # Counted from the full batch down: of equally good ends the last one is taken.
            end -= int(np.argmin((cost + computed) / real))
        if end - start > 2 * grain:
            end -= (end - start) % grain
        batches.append(order[start:end])
        start = end
    return batches


def split_evenly(lengths: npt.NDArray[np.int64], count: int) -> list[npt.NDArray[np.int64]]:
    """Part examples, sorted by length, into shares with about as many tokens each.

    Args:
        lengths: [examples] tokens of each example, 0 or more.
        count: of shares; there are fewer where examples are few or of very unequal lengths.

    Returns:
        Positions in `lengths` for each share, the longest first; none is empty.
    """
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    if not len(order) or not ends[-1]:
        return [order] if len(order) else []
    middles = ends - lengths[order] / 2
    share = np.minimum(middles * count / ends[-1], count - 1).astype(np.int64)
    return np.split(order, np.flatnonzero(np.diff(share)) + 1)


def pack_batches(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]], max_tokens: int
) -> list[int]:
    """Cut examples that lie end to end, without padding, into batches of neighbours.

    Each batch takes as many as fit into the token budget, and at least one.

    Args:
        lengths: [examples] tokens of each example, 0 or more.
        max_tokens: tokens of one batch.

    Returns:
        How many examples each batch has; together they are all.

    Raises:
        ConfigError: the budget is below one token.
    """
    if max_tokens < 1:
        raise ConfigError(f"the token budget of a batch must be at least 1, not {max_tokens}")
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    counts: list[int] = []
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        end = max(int(np.searchsorted(ends, before + max_tokens, side="right")), start + 1)
        counts.append(end - start)
        start = end
    return counts


def padding_waste(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]],
    batches: Sequence[npt.NDArray[np.int64]],
) -> float:
    """The share of computed tokens that are padding, from 0 to below 1.

    Args:
        lengths: [examples] tokens of each example.
        batches: positions in `lengths`, as from `plan_batches`: no batch is empty.
    """
    if not batches:
        return 0.0
    counts = np.array([len(batch) for batch in batches])
    batched = np.asarray(lengths, dtype=np.int64)[np.concatenate(batches)]
    longest = np.maximum.reduceat(batched, np.cumsum(counts) - counts)
    computed = int(longest @ counts)
    return 1 - int(batched.sum()) / computed if computed else 0.0


def spread(count: int, most: int) -> npt.NDArray[np.int64]:
    """`most` places of `count`, evenly over the whole, both ends among them; or all, if fewer."""
    return np.linspace(0, count - 1, min(count, max(most, 1))).astype(np.int64)


def unique_rows(
    rows: Sequence[bytes | memoryview | npt.NDArray[Any]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find equal rows, so that each is classified once and its result fanned out.

    Args:
        rows: the token ids of each example; equal means the same bytes, so of one dtype.

    Returns:
        The positions of the first of each kind, ascending, and for every row the place of its
        kind among those: `result[inverse]` is the result of every row.
    """
    kinds: dict[bytes, int] = {}
    first: list[int] = []
    inverse = np.empty(len(rows), dtype=np.int64)
    for position, row in enumerate(rows):
        key = row if isinstance(row, bytes) else row.tobytes()
        kind = kinds.setdefault(key, len(first))
        if kind == len(first):
            first.append(position)
        inverse[position] = kind
    return np.array(first, dtype=np.int64), inverse
