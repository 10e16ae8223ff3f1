"""What a report says of an output, in plain values; page, Markdown and JSON are made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from batchclf.evaluation import Agreement
from batchclf.model_card import ModelCard
from batchclf.runs import Runs
from batchclf.sink import Counts
from batchclf.tally import SCORE_BINS, Columns, Failure, Scores, Tally
from batchclf.timeline import Periods


@dataclass(frozen=True)
class LabelShare:
    """One label, or what takes its place where a row has none.

    Attributes:
        share: of the rows that got a label.
        mean_score: None where none of its rows has a score.
        score_quantiles: the scores that a tenth, half and nine tenths of its rows do not exceed,
            to a hundredth.
    """

    label: str
    num_rows: int
    share: float
    mean_score: float | None
    score_quantiles: tuple[float, float, float] | None
    score_bins: tuple[int, ...]


@dataclass(frozen=True)
class SourceShare:
    """One input, and what of it is in the output."""

    name: str
    num_outputs: int
    num_rows: int
    num_failed: int


@dataclass(frozen=True)
class PlanState:
    """Whether everything that was planned is there.

    Attributes:
        complete: None where there is no plan: articles come from a queue as they come.
        num_planned, num_there: shards of the plan, and those of them that are whole outputs.
        missing: names of some that are not.
        num_extra: outputs of other inputs than the plan's.
        told_by: where the plan is from.
    """

    complete: bool | None
    num_planned: int | None
    num_there: int
    missing: Sequence[str]
    num_missing: int
    num_extra: int
    told_by: str


@dataclass(frozen=True)
class TruthReport:
    """Predictions held against a kept column of true labels.

    Attributes:
        agreement: None where no row has both.
        num_missing: rows without a true label.
        num_unlabelled: rows with one that failed or abstained.
        unknown: rows by true label that the model does not have.
    """

    column: str
    agreement: Agreement | None
    num_missing: int
    num_unlabelled: int
    unknown: Mapping[str, int]


@dataclass(frozen=True)
class DateReport:
    """Labels by the date of a kept column; `periods` is None where no row has one."""

    column: str
    periods: Periods | None
    num_undated: int


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens that the model saw of the rows that did not fail."""

    mean: float
    most: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """All that a page, a table or a script is told.

    Attributes:
        output: the folder `fp=...`.
        others: other fingerprints under the same output, which this report is not of.
        problems: what is broken, one sentence each.
        notes: what is worth knowing.
        counts: rows; one of a message that was delivered again counts once.
        num_repeats: rows left out for that.
        labels: the most frequent first; all of the model's, those without rows too.
        abstained: their scores.
        dates, truth: None where no such column is known.
        verify: the command that proves the output whole.
    """

    output: str
    fingerprint: str
    others: Sequence[str]
    problems: Sequence[str]
    notes: Sequence[str]
    num_outputs: int
    finished: tuple[str, str] | None
    versions: Sequence[str]
    counts: Counts
    num_repeats: int
    labels: Sequence[LabelShare]
    abstained: LabelShare | None
    tokens: Tokens | None
    failures: Mapping[str, Failure]
    sources: Sequence[SourceShare]
    kept: Sequence[str]
    dates: DateReport | None
    truth: TruthReport | None
    plan: PlanState
    runs: Runs
    card: ModelCard | None
    verify: str

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON takes it."""
        return asdict(self)


def label_shares(tally: Tally, labels: Sequence[str]) -> list[LabelShare]:
    """All labels, those of the model without rows too, the most frequent first."""
    total = max(tally.counts.num_labelled, 1)
    names = dict.fromkeys((*labels, *sorted(tally.labels)))
    shares = [
        _share(name, tally.labels[name], total, tally.scores.get(name, Scores())) for name in names
    ]
    return sorted(shares, key=lambda each: -each.num_rows)


def abstained_of(tally: Tally) -> LabelShare | None:
    """The rows that abstained; their share is of all rows. None where there are none."""
    num_rows = tally.counts.num_abstained
    if not num_rows:
        return None
    scores = tally.scores.get(None, Scores())
    return _share("abstained", num_rows, max(tally.counts.num_rows, 1), scores)


def _share(label: str, num_rows: int, total: int, scores: Scores) -> LabelShare:
    count = scores.count
    return LabelShare(
        label=label,
        num_rows=num_rows,
        share=num_rows / total,
        mean_score=scores.total / count if count else None,
        score_quantiles=_quantiles(scores) if count else None,
        score_bins=tuple(scores.bins.tolist()),
    )


def _quantiles(scores: Scores) -> tuple[float, float, float]:
    reached = np.cumsum(scores.bins) / scores.count
    low, middle, high = (int(np.searchsorted(reached, share)) + 1 for share in (0.1, 0.5, 0.9))
    return low / SCORE_BINS, middle / SCORE_BINS, high / SCORE_BINS


def tokens_of(tally: Tally) -> Tokens | None:
    """How long the rows are; None where the model saw none."""
    num_rows = int(tally.tokens.sum())
    if not num_rows:
        return None
    return Tokens(
        mean=tally.counts.num_tokens / num_rows,
        most=len(tally.tokens) - 1,
        counts=tuple(tally.tokens.tolist()),
    )


def date_report(columns: Columns, tally: Tally) -> DateReport | None:
    """Labels by date, where there is a date column."""
    if columns.date is None:
        return None
    periods = tally.dates.periods() if tally.dates else None
    return DateReport(columns.date, periods, tally.num_undated)


def truth_report(columns: Columns, tally: Tally, labels: Sequence[str]) -> TruthReport | None:
    """Predictions against true labels, where there is a column of them."""
    if columns.truth is None:
        return None
    truth = tally.truth
    return TruthReport(
        column=columns.truth,
        agreement=truth.agreement(labels),
        num_missing=truth.num_missing,
        num_unlabelled=truth.num_unlabelled,
        unknown=dict(truth.unknown.most_common()),
    )


def pooled(counts: Sequence[int], width: int) -> list[int]:
    """Sums over neighbouring bins, `width` at a time."""
    return [sum(counts[start : start + width]) for start in range(0, len(counts), width)]
