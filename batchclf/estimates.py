"""What a sample of rows says of all rows, and how far it may be off. Pure numbers.

All rows of a job, in input order, are cut into strata of equal size, and of each stratum one block
of neighbouring rows is read. Neighbours are alike (one day, one desk, one row group), so errors are
worked out from the blocks, not from the rows.

Source: W. G. Cochran, Sampling Techniques, 3rd ed., chapters 6 (ratios) and 9 (clusters).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_MOST_BLOCK_ROWS = 32  # more from one place tell little that is new
_LEAST_BLOCKS = 128
_SEED = 0  # the same input gives the same plan
_Z = 1.959964  # 95% of a normal distribution lie within so many standard deviations
_MOST_BINS = 14  # as many doublings as there are from the least bin to the longest text
_LEAST_BIN_TOKENS = 8
_TAIL = 0.02  # of the texts, at most, are longer than the last bin that has an end

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.bool_ | np.integer[Any] | np.floating[Any]]


@dataclass(frozen=True)
class Blocks:
    """Which rows of a job are read.

    Attributes:
        num_rows: of the whole job.
        starts, stops: int64 [blocks], rows of the job, ascending, without overlap.
        weights: float64 [blocks], rows of the job for which each row of a block stands.
    """

    num_rows: int
    starts: IntArray
    stops: IntArray
    weights: FloatArray

    @property
    def num_sampled(self) -> int:
        return int((self.stops - self.starts).sum())

    @property
    def is_whole(self) -> bool:
        """Whether every row is read, so that nothing is left to estimate."""
        return self.num_sampled == self.num_rows


def choose_blocks(num_rows: int, sample_rows: int) -> Blocks:
    """At most `sample_rows` rows in blocks spread evenly over all; all rows if there are no more.

    Args:
        num_rows: of the whole job.
        sample_rows: 2 or more, where not all rows are read.
    """
    if num_rows <= sample_rows:
        block_rows = _MOST_BLOCK_ROWS
        starts = np.arange(0, num_rows, block_rows, dtype=np.int64)
        stops = np.minimum(starts + block_rows, num_rows)
        return Blocks(num_rows, starts, stops, np.ones(len(starts)))
    block_rows = min(max(sample_rows // _LEAST_BLOCKS, 1), _MOST_BLOCK_ROWS)
    num_blocks = -(-num_rows // block_rows)
    num_strata = max(sample_rows // block_rows, 2)
    bounds = np.arange(num_strata + 1, dtype=np.int64) * num_blocks // num_strata
    chosen = np.random.default_rng(_SEED).integers(bounds[:-1], bounds[1:])
    starts = chosen * block_rows
    stops = np.minimum(starts + block_rows, num_rows)
    stratum_rows = np.diff(np.minimum(bounds * block_rows, num_rows))
    return Blocks(num_rows, starts, stops, stratum_rows / (stops - starts))


@dataclass(frozen=True)
class Estimate:
    """A number, and the 95% interval in which the number of all rows lies."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Estimate":
        """The estimate of a multiple, for factors of 0 or more."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Population:
    """The sampled rows, and what each stands for.

    Attributes:
        blocks: what was chosen.
        block_of: int64 [rows sampled], the block of each row. Blocks that could not be read are
            missing.
    """

    blocks: Blocks
    block_of: IntArray

    @property
    def weights(self) -> FloatArray:
        """Rows of the job for which each sampled row stands: float64 [rows sampled]."""
        return self.blocks.weights[self.block_of]

    def mean(self, values: Numbers) -> Estimate:
        """The mean over all rows of a number that is 0 or more: [rows sampled]."""
        return self.ratio(values, np.ones(len(self.block_of)))

    def ratio(self, numerators: Numbers, denominators: Numbers) -> Estimate:
        """Sum over all rows by sum over all rows, of numbers that are 0 or more."""
        value, error, num_blocks = self._ratio(numerators, denominators)
        half = _t(num_blocks - 1) * error
        return Estimate(value, max(value - half, 0.0), value + half)

    def share(self, numerators: Numbers, denominators: Numbers | None = None) -> Estimate:
        """A ratio that is at most 1, with Wilson's interval: never empty, and never beyond 0 or 1.

        As many independent rows are assumed as would have the standard error that the blocks have;
        where all rows of the sample agree, as many as there are blocks.
        """
        if denominators is None:
            denominators = np.ones(len(self.block_of))
        value, error, num_blocks = self._ratio(numerators, denominators)
        value = min(value, 1.0)
        left_out = 1 - self._fraction
        if left_out <= 0 or not num_blocks:
            return Estimate(value, value, value)
        num_independent = num_blocks / left_out
        if error > 0 and 0 < value < 1:
            most = len(self.block_of) / left_out
            num_independent = min(value * (1 - value) / error**2, most)
        t2 = _t(num_blocks - 1) ** 2
        middle = (value + t2 / (2 * num_independent)) / (1 + t2 / num_independent)
        half = math.sqrt(
            value * (1 - value) * t2 / num_independent + (t2 / (2 * num_independent)) ** 2
        ) / (1 + t2 / num_independent)
        return Estimate(
            value, min(max(middle - half, 0.0), value), max(min(middle + half, 1.0), value)
        )

    @property
    def _fraction(self) -> float:
        """Of the rows of the job that were read."""
        return len(self.block_of) / max(self.blocks.num_rows, 1)

    def _ratio(self, numerators: Numbers, denominators: Numbers) -> tuple[float, float, int]:
        """A ratio, its standard error, and the number of blocks that it is from."""
        num_blocks = len(self.blocks.starts)
        over = np.bincount(self.block_of, self.weights * numerators, num_blocks)
        under = np.bincount(self.block_of, self.weights * denominators, num_blocks)
        there = np.bincount(self.block_of, minlength=num_blocks) > 0
        over, under, num_read = over[there], under[there], int(there.sum())
        total = under.sum()
        if not total:
            return 0.0, 0.0, num_read
        value = float(over.sum() / total)
        left_out = max(1 - self._fraction, 0.0)
        if num_read < 2 or not left_out:  # noqa: PLR2004 - one block has no spread
            return value, 0.0, num_read
        residuals = over - value * under
        spread = num_read / (num_read - 1) * float(residuals @ residuals)
        return value, math.sqrt(left_out * spread) / float(total), num_read


def _t(degrees: int) -> float:
    """Student's t for 95%, by the expansion of Fisher and Cornish; off by 4% at two degrees."""
    n = max(degrees, 1)
    return (
        _Z
        + (_Z**3 + _Z) / (4 * n)
        + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * n**2)
        + (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / (384 * n**3)
    )


@dataclass(frozen=True)
class Histogram:
    """How many texts have how many tokens.

    Attributes:
        ends: the longest of each bin, ascending; the first bin begins at 1.
        shares: of all texts, by bin; where some are longer than the last end, one more for them.
    """

    ends: tuple[int, ...]
    shares: tuple[float, ...]

    def bounds(self) -> list[tuple[int, int | None]]:
        """First and last length of each bin; a bin for what is longer has no end."""
        firsts = (1, *(end + 1 for end in self.ends))
        return list(zip(firsts, (*self.ends, None), strict=True))[: len(self.shares)]


def histogram(lengths: IntArray, weights: FloatArray) -> Histogram:
    """Bins that grow with the lengths, so that a few long texts do not press all others into one.

    Each doubling of the length is cut into 4 equal parts, or 2, or 1, as there is room for. What
    is shorter or longer than nearly all goes into the first and the last bin.

    Args:
        lengths: [texts] tokens, 1 or more.
        weights: [texts] for how many texts each stands.
    """
    if not len(lengths):
        return Histogram((), ())
    order = np.argsort(lengths, kind="stable")
    until = np.cumsum(weights[order]) / weights.sum()
    places = np.searchsorted(until, [_TAIL, 1 - _TAIL]).clip(max=len(order) - 1)
    short, long = lengths[order[places]].tolist()
    for parts in (4, 2, 1):
        ends = _bin_ends(short, long, parts)
        if len(ends) <= _MOST_BINS:
            break
    shares = np.bincount(np.searchsorted(ends, lengths), weights) / weights.sum()
    return Histogram(tuple(ends), tuple(shares.tolist()))


def _bin_ends(short: int, long: int, parts: int) -> list[int]:
    """From the first end that reaches `short` to the first that reaches `long`."""
    end = _LEAST_BIN_TOKENS
    ends = [end] if end >= short else []
    octave = end
    while end < long:
        if end == 2 * octave:
            octave = end
        end += octave // parts
        if end >= short:
            ends.append(end)
    return ends


@dataclass(frozen=True)
class Windows:
    """What is sorted and computed together.

    Attributes:
        lengths: of the distinct texts of each window.
        num_texts: in all windows, repeats included.
    """

    lengths: tuple[IntArray, ...]
    num_texts: int


def make_windows(
    lengths: IntArray, digests: Sequence[bytes], window_tokens: int, num_texts: int
) -> Windows:
    """The windows that texts fall into, in input order.

    Args:
        lengths: [texts] tokens that the model sees, 1 or more.
        digests: [texts] equal exactly where the tokens are.
        window_tokens: a window ends with the text that brings it to so many.
        num_texts: of the whole job. Where the sample is smaller than both that and a window, it
            is taken several times, as other texts of the same lengths.
    """
    if not len(lengths):
        return Windows((), 0)
    copies = max(min(window_tokens // int(lengths.sum()), num_texts // len(lengths)), 1)
    if copies > 1:
        window = np.tile(_distinct(lengths, digests), copies)
        return Windows((window,), copies * len(lengths))
    ends = np.cumsum(lengths)
    windows = []
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = min(int(np.searchsorted(ends, before + window_tokens)) + 1, len(lengths))
        windows.append(_distinct(lengths[start:stop], digests[start:stop]))
        start = stop
    return Windows(tuple(windows), len(lengths))


def _distinct(lengths: IntArray, digests: Sequence[bytes]) -> IntArray:
    first = {digest: row for row, digest in reversed(list(enumerate(digests)))}
    return lengths[sorted(first.values())]
