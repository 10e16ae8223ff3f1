"""What a report counts, against plain slow counting, and however the rows come in batches."""

from collections import Counter
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batchclf.evaluation import MIN_SCORES
from batchclf.tally import Columns, Tally, encode, parse_days

LABELS = ("business", "sport", "tech")
COLUMNS = Columns("published", "category")
SCHEMA = pa.schema(
    {
        "published": pa.string(),
        "category": pa.string(),
        "row": pa.int64(),
        "label": pa.string(),
        "score": pa.float32(),
        "n_tokens": pa.int32(),
        "truncated": pa.bool_(),
        "error": pa.string(),
    }
)


def rows(count: int = 400) -> list[dict[str, Any]]:
    chance = np.random.default_rng(7)
    made = []
    for number in range(count):
        failed, abstained = number % 11 == 0, number % 7 == 0
        error = ("null_text: no text", "unparseable: line 3", "empty_text")[number % 3]
        made.append(
            {
                "published": ("2024-01-02", "2024-02-03T04:05:06Z", "soon", None)[number % 4],
                "category": (*LABELS, f" {LABELS[1]} ", "weather", None, " ")[number % 7],
                "row": number,
                "label": None if failed or abstained else LABELS[chance.integers(3)],
                "score": None if failed else float(np.float32(chance.uniform(0.2, 1))),
                "n_tokens": 0 if failed else int(chance.integers(1, 65)),
                "truncated": bool(chance.integers(2)),
                "error": error if failed else None,
            }
        )
    return made


def tally(made: list[dict[str, Any]], batch_rows: int) -> Tally:
    total = Tally()
    for start in range(0, len(made), batch_rows):
        part = Tally()
        batch = pa.RecordBatch.from_pylist(made[start : start + batch_rows], SCHEMA)
        part.add(batch, COLUMNS, "news.csv", frozenset(LABELS))
        total.merge(part)
    return total


@pytest.fixture(scope="module", params=[400, 37, 1])
def counted(request: pytest.FixtureRequest) -> Tally:
    return tally(rows(), request.param)


def test_rows_are_counted_by_what_became_of_them(counted: Tally) -> None:
    made = rows()
    failed = sum(row["error"] is not None for row in made)
    labelled = sum(row["label"] is not None for row in made)
    counts = counted.counts
    assert (counts.num_rows, counts.num_failed, counts.num_labelled) == (400, failed, labelled)
    assert counts.num_abstained == 400 - failed - labelled
    assert counts.num_truncated == sum(row["truncated"] for row in made)
    assert counts.num_tokens == sum(row["n_tokens"] for row in made)
    assert counted.labels == Counter(row["label"] for row in made if row["label"])


def test_scores_are_counted_by_label_in_steps_of_a_hundredth(counted: Tally) -> None:
    for label in (*LABELS, None):
        scores = [r["score"] for r in rows() if r["label"] == label and r["score"] is not None]
        assert counted.scores[label].total == pytest.approx(sum(scores))
        expected = Counter(min(int(score * 100), 99) for score in scores)
        bins = counted.scores[label].bins
        assert {step: int(bins[step]) for step in np.flatnonzero(bins)} == expected


def test_tokens_are_counted_of_the_rows_that_did_not_fail(counted: Tally) -> None:
    expected = Counter(row["n_tokens"] for row in rows() if row["error"] is None)
    found = {n: int(counted.tokens[n]) for n in np.flatnonzero(counted.tokens)}
    assert found == expected


def test_errors_are_counted_by_code_with_their_first_rows(counted: Tally) -> None:
    expected = Counter(row["error"].partition(":")[0] for row in rows() if row["error"])
    assert {code: failure.count for code, failure in counted.failures.items()} == expected
    example = counted.failures["null_text"].examples[0]
    assert (example.source, example.row, example.reason) == ("news.csv", 0, "no text")


def test_dates_are_counted_by_label(counted: Tally) -> None:
    dated = [r for r in rows() if r["published"] and r["published"].startswith("2024")]
    periods = counted.dates.periods()
    assert sum(periods.totals) == len(dated)
    assert counted.num_undated == 400 - len(dated)
    for label in LABELS:
        assert sum(periods.by_label[label]) == sum(row["label"] == label for row in dated)


def test_predictions_are_held_against_the_true_labels(counted: Tally) -> None:
    agreement = counted.truth.agreement(LABELS)
    assert agreement is not None
    pairs = [
        (row["category"].strip(), row["label"], np.float32(row["score"]))
        for row in rows()
        if row["label"] and row["category"] and row["category"].strip() in LABELS
    ]
    expected = Counter((LABELS.index(true), LABELS.index(label)) for true, label, _ in pairs)
    assert (
        Counter(
            {
                (t, p): n
                for t, line in enumerate(agreement.confusion)
                for p, n in enumerate(line)
                if n
            }
        )
        == expected
    )
    assert agreement.accuracy == pytest.approx(np.mean([true == label for true, label, _ in pairs]))
    assert [each.min_score for each in agreement.risk_coverage] == list(MIN_SCORES)
    for each in agreement.risk_coverage:
        kept = [
            true == label for true, label, score in pairs if score >= np.float32(each.min_score)
        ]
        assert each.num_kept == len(kept)
        assert each.accuracy == (pytest.approx(np.mean(kept)) if kept else None)
    assert sum(each.count for each in agreement.reliability) == len(pairs)


def test_what_cannot_be_compared_is_counted(counted: Tally) -> None:
    made = rows()
    blank = sum(not (row["category"] or "").strip() for row in made)
    assert counted.truth.num_missing == blank
    assert counted.truth.unknown == {"weather": sum(row["category"] == "weather" for row in made)}
    known = [row for row in made if (row["category"] or "").strip() in LABELS]
    assert counted.truth.num_unlabelled == sum(row["label"] is None for row in known)


def test_scores_that_are_no_scores_are_left_out() -> None:
    made = rows(3)
    for row, score in zip(made, (float("nan"), 7.0, -1.0), strict=True):
        row |= {"score": score, "label": "tech", "error": None, "category": "tech"}
    counted = tally(made, 3)
    assert counted.labels == {"tech": 3}
    assert counted.scores == {}
    assert counted.truth.agreement(LABELS) is None


@pytest.mark.parametrize(
    "column",
    [
        pa.array([date(2024, 2, 29), None]),
        pa.array([date(2024, 2, 29), None], pa.date64()),
        pa.array([datetime(2024, 2, 29, 23, tzinfo=UTC), None], pa.timestamp("us", "UTC")),
        pa.array([datetime(2024, 2, 29, 23), None], pa.timestamp("ns")),  # noqa: DTZ001 - has none
        pa.array(["2024-02-29", "2024-2-29"]),
        pa.array([" 2024-02-29T23:59:59+02:00", "29.2.2024"], pa.large_string()),
        pa.array(["2024-02-29 10:00", "2024-13-01"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_a_date_is_read_from_every_type(column: pa.Array) -> None:
    days, are_valid = parse_days(column)
    assert are_valid.tolist() == [True, False]
    assert date(1970, 1, 1).toordinal() + days[0] == date(2024, 2, 29).toordinal()


def test_a_month_is_its_first_day_and_a_number_is_no_date() -> None:
    days, are_valid = parse_days(pa.array(["2024-02"]))
    assert are_valid.tolist() == [True]
    assert date(1970, 1, 1).toordinal() + days[0] == date(2024, 2, 1).toordinal()
    assert parse_days(pa.array([20240201]))[1].tolist() == [False]


def test_dates_before_christ_are_no_dates() -> None:
    ticks = pa.array([-(2**62), 2**62], pa.int64()).cast(pa.timestamp("s"))
    assert parse_days(ticks)[1].tolist() == [False, False]


def test_spaces_around_a_true_label_are_dropped() -> None:
    encoded = encode(pa.array(["a", " a ", None, "  "]), strip=True)
    assert (encoded.places.tolist(), encoded.names) == ([0, 0, -1, -1], ["a"])
