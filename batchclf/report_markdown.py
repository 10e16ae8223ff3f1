"""A report as Markdown: tables of the numbers, for a pull request or a ticket."""

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from batchclf import __version__
from batchclf.evaluation import shorten
from batchclf.report import Report
from batchclf.report_words import (
    count_of,
    plan_sentence,
    share_of,
    subtitle,
    title,
    truth_notes,
)

_MOST_CELL = 200  # characters
_MOST_SOURCES = 50
_MOST_RUNS = 20
_MOST_CONFUSIONS = 20
_DASH = "\N{EN DASH}"
# What Markdown, and GitHub's dialect of it, gives a meaning to: https://spec.github.com/gfm/
_MARKS = re.compile(r"([\\`*_\[\]|~$]|^[#+-])")


def report_markdown(report: Report) -> str:
    """The report as one text; whatever came from users is escaped."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {_plain(title(report))}"
    yield ""
    yield _plain(subtitle(report))
    yield ""
    yield _plain(plan_sentence(report))
    yield ""
    lines = (*report.problems, *report.notes)
    yield from (f"- {_plain(line)}" for line in lines)
    if lines:
        yield ""
    counts = report.counts
    numbers = [
        ("articles", counts.num_rows),
        ("labelled", counts.num_labelled),
        ("abstained", counts.num_abstained),
        ("failed", counts.num_failed),
        ("truncated", counts.num_truncated),
    ]
    yield from _table(
        ["", "rows", "share"],
        ((name, f"{n:,}", share_of(n, counts.num_rows)) for name, n in numbers),
    )
    yield from _section("Labels", _labels(report))
    if report.dates is not None and report.dates.periods is not None:
        yield from _section("Labels over time", _dates(report))
    if report.truth is not None:
        yield from _section("Against the true labels", _truth(report))
    if report.failures:
        yield from _section("Rows that could not be labelled", _failures(report))
    if report.runs.found:
        yield from _section("Runs", _runs(report))
    if report.sources:
        yield from _section("Inputs", _sources(report))
    yield "## Proof"
    yield ""
    yield f"    {shorten(report.verify, 4 * _MOST_CELL)}"
    yield ""
    yield f"batchclf {__version__}"


def _section(heading: str, lines: Iterable[str]) -> Iterator[str]:
    yield f"## {heading}"
    yield ""
    yield from lines


def _labels(report: Report) -> Iterator[str]:
    yield from _table(
        ["label", "articles", "share", "mean score"],
        (
            (
                each.label,
                f"{each.num_rows:,}",
                f"{each.share:.2%}",
                _DASH if each.mean_score is None else f"{each.mean_score:.4f}",
            )
            for each in report.labels
        ),
    )


def _dates(report: Report) -> Iterator[str]:
    if report.dates is None or report.dates.periods is None:
        return
    periods = report.dates.periods
    names = sorted(periods.by_label, key=lambda name: -sum(periods.by_label[name]))
    yield from _table(
        [f"{periods.unit} of {report.dates.column}", "articles", *names],
        (
            (start, f"{total:,}", *(f"{periods.by_label[name][place]:,}" for name in names))
            for place, (start, total) in enumerate(zip(periods.starts, periods.totals, strict=True))
        ),
    )


def _truth(report: Report) -> Iterator[str]:
    if report.truth is None:
        return
    for note in truth_notes(report.truth):
        yield f"- {_plain(note)}"
    yield ""
    agreement = report.truth.agreement
    if agreement is None:
        return
    yield (
        f"Accuracy {agreement.accuracy:.4f}, macro-F1 {agreement.macro_f1:.4f}, calibration error "
        f"{agreement.ece:.4f}, {count_of(agreement.num_examples, 'article')}."
    )
    yield ""
    yield from _table(
        ["label", "precision", "recall", "F1", "articles", "predicted"],
        (
            (
                each.label,
                f"{each.precision:.4f}",
                f"{each.recall:.4f}",
                f"{each.f1:.4f}",
                f"{each.support:,}",
                f"{each.num_predicted:,}",
            )
            for each in agreement.per_label
        ),
    )
    pairs = agreement.confusions()[:_MOST_CONFUSIONS]
    if pairs:
        yield from _table(
            ["true", "predicted", "articles"],
            ((true, predicted, f"{number:,}") for true, predicted, number in pairs),
            num_texts=2,
        )


def _failures(report: Report) -> Iterator[str]:
    yield from _table(
        ["code", "rows", "for example"],
        (
            (
                code,
                f"{failure.count:,}",
                "; ".join(
                    f"{e.source} row {e.row} {e.reason}".strip() for e in failure.examples[:2]
                ),
            )
            for code, failure in report.failures.items()
        ),
        num_texts=3,
    )


def _runs(report: Report) -> Iterator[str]:
    shown = list(reversed(report.runs.found[-_MOST_RUNS:]))
    yield from _table(
        ["ended", "command", "device", "rows", "seconds", "articles/s", "tokens/s"],
        (
            (
                run.finished_at,
                run.command,
                f"{run.device} {run.dtype}",
                f"{run.num_rows:,}",
                f"{run.seconds:,.1f}",
                f"{run.articles_per_s:,.1f}",
                f"{run.tokens_per_s:,.0f}",
            )
            for run in shown
        ),
        num_texts=3,
    )


def _sources(report: Report) -> Iterator[str]:
    shown = report.sources[:_MOST_SOURCES]
    yield from _table(
        ["input", "rows", "failed", "outputs"],
        (
            (each.name, f"{each.num_rows:,}", f"{each.num_failed:,}", f"{each.num_outputs:,}")
            for each in shown
        ),
    )
    if len(shown) < len(report.sources):
        yield f"and {len(report.sources) - len(shown):,} more"
        yield ""


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], num_texts: int = 1
) -> Iterator[str]:
    sides = ["---" if place < num_texts else "---:" for place in range(len(header))]
    yield f"| {' | '.join(map(_plain, header))} |"
    yield f"| {' | '.join(sides)} |"
    for row in rows:
        yield f"| {' | '.join(map(_plain, row))} |"
    yield ""


def _plain(text: str) -> str:
    """A text on one line that Markdown shows as it is."""
    return _MARKS.sub(r"\\\1", escape(shorten(text, _MOST_CELL), quote=False))
