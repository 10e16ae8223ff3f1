"""What a report counts in labelled rows, one record batch after the other; partial counts add up.

Memory depends on the number of labels, of codes of errors and of dates, not on that of rows.

Shape suffixes: N rows of a record batch, S steps of score.
"""
# ruff: noqa: N803, N806 - names of arrays end in their shape, in capitals

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchclf.calibration import NUM_BINS, Bin, reliability_bins
from batchclf.evaluation import MIN_SCORES, Agreement, Coverage, agree, shorten
from batchclf.sink import Counts
from batchclf.timeline import FIRST_DAY, LAST_DAY, Timeline

SCORE_BINS = 100
MOST_COUNTED_TOKENS = 1 << 16  # a row with more counts as one with so many
_MOST_EXAMPLES = 5  # of rows that failed, for each code
_MOST_CODES = 200
_MOST_UNKNOWN = 100  # true labels that the model does not have
_MOST_REASON = 200  # characters
_OTHER = "other"
_ISO_DATE = r"^\d{4}-\d{2}-\d{2}(?:$|[T ])"
_ISO_MONTH = r"^\d{4}-\d{2}$"

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Columns:
    """The kept columns that a report looks at.

    Attributes:
        date: when an article was published.
        truth: its true label.
    """

    date: str | None = None
    truth: str | None = None


@dataclass(frozen=True)
class Example:
    """A row that failed: where it stands, and why. Never its text."""

    source: str
    row: int
    reason: str


@dataclass
class Failure:
    """Rows that failed with one code."""

    count: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass
class Scores:
    """Scores of some rows.

    Attributes:
        count: rows with a score from 0 to 1.
        total: the sum of the scores.
        bins: rows in `SCORE_BINS` bins of equal width from 0 to 1.
    """

    count: int = 0
    total: float = 0.0
    bins: Int64s = field(default_factory=lambda: np.zeros(SCORE_BINS, np.int64))

    def add(self, other: "Scores") -> None:
        self.count += other.count
        self.total += other.total
        self.bins += other.bins


class Truth:
    """Predicted labels held against the true ones that stand beside them.

    Attributes:
        num_missing: rows whose true label is null or blank.
        num_unlabelled: rows that have one but got no label: they failed, or abstained.
        unknown: true labels that the model does not have, and their rows.
    """

    _LEAST_SCORES = np.unique(
        np.concatenate((MIN_SCORES, np.linspace(0, 1, 101), 1 - np.logspace(-2, -5, 31)))
    ).astype(np.float32)

    def __init__(self) -> None:
        self.num_missing = 0
        self.num_unlabelled = 0
        self.unknown: Counter[str] = Counter()
        self._confusion: Counter[tuple[str, str]] = Counter()
        self._bins = np.zeros((NUM_BINS, 3))  # rows, sum of scores, right ones
        self._by_score = np.zeros((len(self._LEAST_SCORES), 2), np.int64)  # rows, right ones

    def add(
        self,
        labels: "Encoded",
        scores_N: npt.NDArray[np.float32],
        truth: "Encoded",
        known: Collection[str],
    ) -> None:
        """Count rows. With no labels known, every true label is taken for one of them."""
        is_known = np.array([not known or name in known for name in truth.names], np.bool_)
        has_truth_N = truth.places >= 0
        self.num_missing += int((~has_truth_N).sum())
        known_N = has_truth_N & is_known[truth.places] if len(is_known) else has_truth_N
        counted = np.bincount(truth.places[has_truth_N & ~known_N], minlength=len(truth.names))
        for place in np.flatnonzero(counted).tolist():
            name = shorten(truth.names[place], _MOST_REASON)
            if name not in self.unknown and len(self.unknown) >= _MOST_UNKNOWN:
                name = _OTHER
            self.unknown[name] += int(counted[place])
        both_N = known_N & (labels.places >= 0) & (scores_N >= 0) & (scores_N <= 1)
        self.num_unlabelled += int((known_N & ~both_N).sum())
        self._add_pairs(labels, truth, both_N, scores_N)

    def _add_pairs(
        self,
        labels: "Encoded",
        truth: "Encoded",
        both_N: npt.NDArray[np.bool_],
        scores_N: npt.NDArray[np.float32],
    ) -> None:
        if not both_N.any():
            return
        true, predicted = truth.places[both_N], labels.places[both_N]
        width = len(labels.names)
        pairs, numbers = np.unique(true * width + predicted, return_counts=True)
        right = np.zeros((len(truth.names), width), np.bool_)
        place_of = {name: place for place, name in enumerate(labels.names)}
        for pair, number in zip(pairs.tolist(), numbers.tolist(), strict=True):
            names = truth.names[pair // width], labels.names[pair % width]
            self._confusion[names] += number
        for place, name in enumerate(truth.names):
            if name in place_of:
                right[place, place_of[name]] = True
        correct, scores = right[true, predicted], scores_N[both_N]
        for place, each in enumerate(reliability_bins(scores, correct)):
            if each.mean_score is not None and each.accuracy is not None:
                sums = (each.count, each.count * each.mean_score, each.count * each.accuracy)
                self._bins[place] += sums
        steps = np.searchsorted(self._LEAST_SCORES, scores, side="right") - 1
        num_steps = len(self._LEAST_SCORES)
        self._by_score[:, 0] += np.bincount(steps, minlength=num_steps)
        self._by_score[:, 1] += np.bincount(steps[correct], minlength=num_steps)

    def merge(self, other: "Truth") -> None:
        """Add the counts of another."""
        self.num_missing += other.num_missing
        self.num_unlabelled += other.num_unlabelled
        for name, number in other.unknown.items():
            is_new = name not in self.unknown and len(self.unknown) >= _MOST_UNKNOWN
            self.unknown[_OTHER if is_new else name] += number
        self._confusion.update(other._confusion)  # noqa: SLF001 - of the same class
        self._bins += other._bins  # noqa: SLF001 - of the same class
        self._by_score += other._by_score  # noqa: SLF001 - of the same class

    def agreement(self, labels: Sequence[str]) -> Agreement | None:
        """How far the labels are the true ones; None where no row has both.

        Args:
            labels: in the order in which they are shown; those that occur besides come last.
        """
        if not self._confusion:
            return None
        occurring = sorted({name for pair in self._confusion for name in pair} - set(labels))
        names = (*labels, *occurring)
        place_of = {name: place for place, name in enumerate(names)}
        confusion = np.zeros((len(names), len(names)), np.int64)
        for (true, predicted), number in self._confusion.items():
            confusion[place_of[true], place_of[predicted]] = number
        return agree(
            confusion,
            names,
            reliability=[_bin(place, *sums) for place, sums in enumerate(self._bins.tolist())],
            risk_coverage=self._coverage(MIN_SCORES),
            coverage_curve=self._coverage(self._LEAST_SCORES[::-1].tolist()),
        )

    def _coverage(self, least_scores: Sequence[float]) -> list[Coverage]:
        kept_S, right_S = self._by_score[::-1].cumsum(axis=0)[::-1].T.tolist()
        found = []
        for least in least_scores:
            step = int(np.searchsorted(self._LEAST_SCORES, np.float32(least)))
            kept = kept_S[step]
            accuracy = right_S[step] / kept if kept else None
            found.append(Coverage(float(least), kept, kept / kept_S[0], accuracy))
        return found


def _bin(place: int, count: float, scores: float, right: float) -> Bin:
    return Bin(
        lower=place / NUM_BINS,
        upper=(place + 1) / NUM_BINS,
        count=round(count),
        mean_score=scores / count if count else None,
        accuracy=right / count if count else None,
    )


class Tally:
    """Counts over labelled rows.

    Attributes:
        labels: rows by label.
        scores: by label; None stands for rows that abstained.
        tokens: rows by number of tokens, of the rows that did not fail.
        failures: by code.
        num_undated: rows whose date is null or no date; counted where a date column is asked for.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self.labels: Counter[str] = Counter()
        self.scores: dict[str | None, Scores] = {}
        self.tokens: Int64s = np.zeros(0, np.int64)
        self.failures: dict[str, Failure] = {}
        self.dates = Timeline()
        self.num_undated = 0
        self.truth = Truth()

    def add(
        self, batch: pa.RecordBatch, columns: Columns, source: str, known: Collection[str] = ()
    ) -> None:
        """Count the rows of a record batch.

        Args:
            batch: has the columns of predictions but `probs`, and may lack those of `columns`.
            columns: which kept columns to look at.
            source: what the rows are of, for people.
            known: the model's labels.
        """
        labels = encode(batch.column("label"))
        scores_N = batch.column("score").to_numpy(zero_copy_only=False).astype(np.float32)
        failed_N = batch.column("error").is_valid().to_numpy(zero_copy_only=False)
        tokens_N = batch.column("n_tokens").to_numpy(zero_copy_only=False)
        num_failed = int(failed_N.sum())
        num_labelled = int((labels.places >= 0).sum())
        self.counts += Counts(
            num_rows=batch.num_rows,
            num_labelled=num_labelled,
            num_abstained=batch.num_rows - num_labelled - num_failed,
            num_failed=num_failed,
            num_truncated=batch.column("truncated").sum().as_py() or 0,
            num_tokens=int(tokens_N.sum(dtype=np.int64)),
        )
        self._add_scores(labels, scores_N)
        fine = np.clip(tokens_N[~failed_N].astype(np.int64), 0, MOST_COUNTED_TOKENS)
        self.tokens = _sum(self.tokens, np.bincount(fine))
        if num_failed:
            self._add_failures(batch, source)
        if columns.date is not None:
            self._add_dates(_column(batch, columns.date), labels)
        if columns.truth is not None:
            found = _column(batch, columns.truth)
            if found is None:
                self.truth.num_missing += batch.num_rows
            else:
                self.truth.add(labels, scores_N, encode(found, strip=True), known)

    def merge(self, other: "Tally") -> None:
        """Add the counts of another, whose rows come after these."""
        self.counts += other.counts
        self.labels.update(other.labels)
        for name, scores in other.scores.items():
            self.scores.setdefault(name, Scores()).add(scores)
        self.tokens = _sum(self.tokens, other.tokens)
        for code, failure in other.failures.items():
            own = self._failure(code)
            own.count += failure.count
            own.examples += failure.examples[: _MOST_EXAMPLES - len(own.examples)]
        self.dates.merge(other.dates)
        self.num_undated += other.num_undated
        self.truth.merge(other.truth)

    def _add_scores(self, labels: "Encoded", scores_N: npt.NDArray[np.float32]) -> None:
        valid_N = (scores_N >= 0) & (scores_N <= 1)  # neither null nor NaN
        names: list[str | None] = [*labels.names, None]
        places = labels.places[valid_N] % len(names)  # no label: the last
        scores = scores_N[valid_N].astype(np.float64)
        steps = np.minimum((scores * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)
        shape = (len(names), SCORE_BINS)
        bins = np.bincount(places * SCORE_BINS + steps, minlength=shape[0] * shape[1])
        sums = np.bincount(places, weights=scores, minlength=len(names)).tolist()
        counts = np.bincount(labels.places[labels.places >= 0], minlength=len(names)).tolist()
        for name, row, total, count in zip(names, bins.reshape(shape), sums, counts, strict=True):
            if name is not None:
                self.labels[name] += count
            if row.any():
                found = Scores(int(row.sum()), total, row)
                self.scores.setdefault(name, Scores()).add(found)

    def _add_failures(self, batch: pa.RecordBatch, source: str) -> None:
        errors = encode(batch.column("error"))
        reasons, firsts = np.unique(errors.places, return_index=True)
        numbers = np.bincount(errors.places + 1)
        for reason, first in sorted(zip(reasons.tolist(), firsts.tolist(), strict=True), key=_last):
            if reason < 0:
                continue
            code, _, why = errors.names[reason].partition(":")
            failure = self._failure(shorten(code, _MOST_REASON))
            failure.count += int(numbers[reason + 1])
            if len(failure.examples) < _MOST_EXAMPLES:
                row = batch.column("row")[first].as_py()
                failure.examples.append(Example(source, row, shorten(why, _MOST_REASON)))

    def _failure(self, code: str) -> Failure:
        if code not in self.failures and len(self.failures) >= _MOST_CODES:
            code = _OTHER
        return self.failures.setdefault(code, Failure())

    def _add_dates(self, column: pa.Array | None, labels: "Encoded") -> None:
        if column is None:
            self.num_undated += len(labels.places)
            return
        days, valid_N = parse_days(column)
        self.num_undated += int((~valid_N).sum())
        names: list[str | None] = [*labels.names, None]
        self.dates.add(days[valid_N], labels.places[valid_N] % len(names), names)


@dataclass(frozen=True)
class Encoded:
    """A column of strings: int64 [N] places in `names`, -1 for null."""

    places: Int64s
    names: list[str]


def encode(column: pa.Array, *, strip: bool = False) -> Encoded:
    """Strings as places in the list of those that occur.

    Args:
        column: of a type that can be cast to strings.
        strip: drop stray spaces; what has nothing else is null.
    """
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    given = column.dictionary.cast(pa.string()).to_pylist()
    names: dict[str, int] = {}
    place_of = []
    for value in given:
        name = value.strip() if strip and value is not None else value
        is_null = name is None or (strip and not name)
        place_of.append(-1 if is_null else names.setdefault(name, len(names)))
    indices = column.indices.cast(pa.int64()).fill_null(len(given)).to_numpy()
    places = np.array([*place_of, -1], np.int64)[indices]
    return Encoded(places, list(names))


def parse_days(column: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Dates as days since 1970-01-01, and which of them are dates of the years 1 to 9999.

    Args:
        column: dates, timestamps (with a time zone: the day in UTC), or strings of ISO 8601 that
            begin with a year, a month and perhaps a day, which are taken as they are written.
    """
    if pa.types.is_dictionary(column.type):
        days, are_valid = parse_days(column.dictionary)
        places = column.indices.cast(pa.int64()).fill_null(len(days)).to_numpy()
        return np.append(days, 0)[places], np.append(are_valid, False)[places]
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        stripped = pc.utf8_trim_whitespace(column.cast(pa.string()))
        is_month = pc.match_substring_regex(stripped, _ISO_MONTH)
        is_date = pc.match_substring_regex(stripped, _ISO_DATE)
        # an array of months only has no tenth character to cut at
        texts = pc.if_else(
            is_month,
            pc.binary_join_element_wise(stripped, "01", "-"),
            pc.utf8_slice_codeunits(stripped, 0, 10),
        )
        texts = pc.if_else(pc.or_(is_month, is_date), texts, None)
        column = pc.strptime(texts, format="%Y-%m-%d", unit="s", error_is_null=True)
    elif not (pa.types.is_date(kind) or pa.types.is_timestamp(kind)):
        return np.zeros(len(column), np.int64), np.zeros(len(column), np.bool_)
    if pa.types.is_timestamp(column.type):
        per_day = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}[column.type.unit]
        ticks = column.cast(pa.int64()).fill_null(0).to_numpy()
        days = ticks // (per_day * 86_400)
    elif pa.types.is_date64(column.type):
        days = column.cast(pa.int64()).fill_null(0).to_numpy() // 86_400_000
    else:
        days = column.cast(pa.int32()).fill_null(0).to_numpy().astype(np.int64)
    is_valid = column.is_valid().to_numpy(zero_copy_only=False)
    return days, is_valid & (days >= FIRST_DAY) & (days <= LAST_DAY)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    return batch.column(name) if name in batch.schema.names else None


def _sum(one: Int64s, other: Int64s) -> Int64s:
    """Counts by number, whose ends need not be the same."""
    if len(one) < len(other):
        one, other = other, one
    total = one.copy()
    total[: len(other)] += other
    return total


def _last(pair: tuple[int, int]) -> int:
    return pair[1]
