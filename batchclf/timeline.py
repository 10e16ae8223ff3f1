"""Counts by label and date, whatever the dates are: days while they are few, then months, years."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Unit = Literal["day", "week", "month", "year"]
Ints = npt.NDArray[np.integer]
Key = tuple[int, str | None]  # first day of a period, and label

# Days since 1970-01-01 of the years that ISO 8601 and Python's date can write: 1 to 9999.
FIRST_DAY, LAST_DAY = -719_162, 2_932_896

_MOST_ENTRIES = 100_000  # of one timeline before it becomes coarser
_MOST_PERIODS = 60  # that are shown
_STRAY_SHARE = 0.001  # of the rows, at each end, whose dates may be wrong
_DAYS_OF = {"day": 1, "week": 7, "month": 30.4, "year": 365.2}
_NUMPY_UNITS = {"day": "D", "month": "M", "year": "Y"}
_NUM_WEEKDAYS = 7
_THURSDAY = 3  # the weekday of 1970-01-01, counted from Monday


@dataclass(frozen=True)
class Periods:
    """Rows by label in periods that follow one another without a gap.

    Attributes:
        unit: of each period; a week begins on Monday.
        starts: first days, as `2024-01-31`.
        totals: rows of each period, those of every label and those without.
        by_label: rows of each period, for each label.
        num_before, num_after: rows of a few stray dates before the first and after the last period.
    """

    unit: Unit
    starts: tuple[str, ...]
    totals: tuple[int, ...]
    by_label: dict[str, tuple[int, ...]]
    num_before: int
    num_after: int


class Timeline:
    """Counts of rows by label and day. Memory is bounded: many days become months, then years."""

    def __init__(self) -> None:
        self._unit: Unit = "day"
        self._counts: Counter[Key] = Counter()

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, days: Ints, places: Ints, names: Sequence[str | None]) -> None:
        """Count rows.

        Args:
            days: of each row, since 1970-01-01, `FIRST_DAY` to `LAST_DAY`.
            places: of each row's label in `names`.
            names: labels; None stands for rows without one.
        """
        if not len(days):
            return
        starts = _starts_of(days.astype(np.int64), self._unit)
        first = int(starts.min())
        width = len(names)
        keys = (starts - first) * width + places
        span = (int(starts.max()) - first + 1) * width
        if span <= 4 * len(keys):
            counted = np.bincount(keys)
            found = np.flatnonzero(counted)
            numbers = counted[found]
        else:
            found, numbers = np.unique(keys, return_counts=True)
        for key, number in zip(found.tolist(), numbers.tolist(), strict=True):
            self._counts[key // width + first, names[key % width]] += number
        self._bound()

    def merge(self, other: "Timeline") -> None:
        """Add the counts of another."""
        while _UNITS.index(self._unit) < _UNITS.index(other._unit):  # noqa: SLF001 - of its class
            self._coarsen()
        self._counts.update(_rebin(other._counts, self._unit))  # noqa: SLF001 - of its class
        self._bound()

    def periods(self, most: int = _MOST_PERIODS) -> Periods:
        """The counts in at most `most` periods or so, of the finest unit that allows it.

        A few dates far from all others, which are mostly wrong, do not stretch them.
        """
        days = np.array(sorted({day for day, _ in self._counts}), np.int64)
        by_day: Counter[int] = Counter()
        for (day, _), number in self._counts.items():
            by_day[day] += number
        totals = np.array([by_day[day] for day in days.tolist()], np.int64)
        low, high = _without_strays(days, totals)
        unit = self._choose_unit(high - low + 1, most)
        starts = _starts_between(low, high, unit)
        place_of = {start: place for place, start in enumerate(starts)}
        all_labels = np.zeros(len(starts), np.int64)
        by_label: dict[str, npt.NDArray[np.int64]] = {}
        inside = {key: number for key, number in self._counts.items() if low <= key[0] <= high}
        for (start, name), number in _rebin(inside, unit).items():
            all_labels[place_of[start]] += number
            if name is not None:
                counts = by_label.setdefault(name, np.zeros(len(starts), np.int64))
                counts[place_of[start]] += number
        return Periods(
            unit=unit,
            starts=tuple(str(np.datetime64(start, "D")) for start in starts),
            totals=tuple(all_labels.tolist()),
            by_label={name: tuple(counts.tolist()) for name, counts in by_label.items()},
            num_before=int(totals[days < low].sum()),
            num_after=int(totals[days > high].sum()),
        )

    def _choose_unit(self, num_days: int, most: int) -> Unit:
        units: tuple[Unit, ...] = ("day", "week", "month", "year")
        if self._unit != "day":
            units = units[units.index(self._unit) :]
        return next((unit for unit in units if num_days / _DAYS_OF[unit] <= most), "year")

    def _bound(self) -> None:
        while len(self._counts) > _MOST_ENTRIES and self._unit != _UNITS[-1]:
            self._coarsen()

    def _coarsen(self) -> None:
        self._unit = _UNITS[_UNITS.index(self._unit) + 1]
        self._counts = _rebin(self._counts, self._unit)


_UNITS: tuple[Unit, ...] = ("day", "month", "year")  # of a timeline; weeks do not make months


def _starts_of(days: npt.NDArray[np.int64], unit: Unit) -> npt.NDArray[np.int64]:
    """The first day of the period that each day is in."""
    if unit == "day":
        return days
    if unit == "week":
        return days - (days + _THURSDAY) % _NUM_WEEKDAYS
    starts = days.astype("datetime64[D]").astype(f"datetime64[{_NUMPY_UNITS[unit]}]")
    return starts.astype("datetime64[D]").astype(np.int64)


def _rebin(counts: Mapping[Key, int], unit: Unit) -> Counter[Key]:
    """Counts of a unit that is at least as coarse."""
    starts = _starts_of(np.array([day for day, _ in counts], np.int64), unit).tolist()
    coarser: Counter[Key] = Counter()
    for start, ((_, name), number) in zip(starts, counts.items(), strict=True):
        coarser[start, name] += number
    return coarser


def _starts_between(low: int, high: int, unit: Unit) -> list[int]:
    first, last = _starts_of(np.array([low, high], np.int64), unit).tolist()
    if unit == "week":
        return list(range(first, last + 1, _NUM_WEEKDAYS))
    numpy_unit = f"datetime64[{_NUMPY_UNITS[unit]}]"
    begin, end = (np.datetime64(day, "D").astype(numpy_unit) for day in (first, last))
    starts: list[int] = np.arange(begin, end + 1).astype("datetime64[D]").astype(int).tolist()
    return starts


def _without_strays(days: Ints, totals: Ints) -> tuple[int, int]:
    """The first and the last day, without a few rows that would make the span twice as long."""
    before = np.cumsum(totals)
    allowed = int(before[-1] * _STRAY_SHARE)
    low = int(days[np.searchsorted(before, allowed, side="right")])
    high = int(days[np.searchsorted(before, before[-1] - allowed, side="left")])
    if 2 * (high - low + 1) <= days[-1] - days[0] + 1:
        return low, high
    return int(days[0]), int(days[-1])
