"""Counts by date: nothing is lost, whatever the dates are and however they are added up."""

from datetime import date

import numpy as np
from hypothesis import given, strategies as st

from batchclf.timeline import FIRST_DAY, LAST_DAY, Timeline

NAMES = ("business", None)
DAYS = st.lists(st.tuples(st.integers(FIRST_DAY, LAST_DAY), st.integers(0, 1)), min_size=1)
EPOCH = date(1970, 1, 1).toordinal()


def day(text: str) -> int:
    return date.fromisoformat(text).toordinal() - EPOCH


def timeline(rows: list[tuple[int, int]]) -> Timeline:
    found = Timeline()
    days, places = np.array(rows, np.int64).reshape(-1, 2).T
    found.add(days, places, NAMES)
    return found


@given(DAYS, DAYS)
def test_every_row_is_in_a_period_or_told_as_stray(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    merged = timeline(one)
    merged.merge(timeline(other))
    periods = merged.periods()
    assert sum(periods.totals) + periods.num_before + periods.num_after == len(one) + len(other)
    assert len(periods.starts) == len(periods.totals)
    assert list(periods.starts) == sorted(set(periods.starts))
    labelled = sum(1 - place for _, place in one + other)
    if not periods.num_before + periods.num_after:
        assert sum(map(sum, periods.by_label.values())) == labelled


@given(st.lists(st.tuples(st.integers(19_000, 19_400), st.integers(0, 1)), min_size=1))
def test_a_week_begins_on_monday_and_a_month_on_its_first(rows: list[tuple[int, int]]) -> None:
    periods = timeline(rows).periods(most=30)
    first = date.fromisoformat(periods.starts[0])
    if periods.unit == "week":
        assert first.weekday() == 0
    if periods.unit == "month":
        assert first.day == 1


def test_the_unit_fits_the_span() -> None:
    start = day("2024-01-01")
    for num_days, unit in ((10, "day"), (300, "week"), (1_500, "month"), (9_000, "year")):
        rows = [(start, 0), (start + num_days, 0)]
        assert timeline(rows).periods().unit == unit


def test_a_few_dates_far_away_do_not_stretch_the_others() -> None:
    start = day("2024-01-01")
    rows = [(start + row % 30, 0) for row in range(5_000)]
    periods = timeline([*rows, (0, 0), (LAST_DAY, 1)]).periods()
    assert (periods.unit, periods.starts[0], len(periods.starts)) == ("day", "2024-01-01", 30)
    assert (periods.num_before, periods.num_after) == (1, 1)


def test_very_many_dates_become_months_and_then_years() -> None:
    found = Timeline()
    days = np.arange(FIRST_DAY, LAST_DAY + 1)
    for part in np.array_split(days, 64):
        found.add(part, np.zeros(len(part), np.int64), NAMES)
    found.merge(timeline([(day("2024-02-29"), 1)]))
    periods = found.periods()
    assert periods.unit == "year"
    assert sum(periods.totals) == len(days) + 1
    place = periods.starts.index("2024-01-01")
    assert (periods.totals[place], periods.by_label["business"][place]) == (367, 366)
