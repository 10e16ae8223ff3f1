"""What was measured, as the sections of a page: each plot with its numbers as a table beside it."""

from collections.abc import Iterator, Mapping, Sequence

from batchclf import pages, plots
from batchclf.calibration import Bin
from batchclf.evaluation import Agreement, Measures, Mistake, shorten
from batchclf.pages import Html

_MOST_LABELS_SQUARED = 25  # of a confusion table; beyond, the confused pairs are listed
_MOST_CONFUSIONS = 20
_MOST_LABEL = 60  # characters
_MOST_VALUE = 600


def measure_sections(measures: Measures) -> Iterator[Html]:
    """The sections that say how good a model is, without its mistakes."""
    yield pages.section("In short", _headline(measures), wide=True)
    yield pages.section("Labels", label_table(measures))
    yield from agreement_sections(measures)


def agreement_sections(agreement: Agreement) -> Iterator[Html]:
    """The sections with a plot of how far predictions agree with true labels."""
    yield pages.section("Confusion matrix", *_confusion(agreement))
    yield pages.section("Reliability", *_reliability(agreement))
    yield pages.section("Accuracy against share kept", *_coverage(agreement))


def mistakes_section(mistakes: Sequence[Mistake]) -> Html:
    """The wrong predictions that the model was most sure of, with their text."""
    if not mistakes:
        return pages.section("Mistakes", pages.paragraph("There are none."), wide=True)
    entries = (
        (
            f"{_short(each.label)}, taken for {_short(each.predicted)} with {each.score:.4f}",
            each.place,
            each.text,
        )
        for each in mistakes
    )
    return pages.section("Most confident mistakes", pages.articles(entries), wide=True)


def details_section(heading: str, details: Mapping[str, object]) -> Html:
    """Plain values by name; those of a nested mapping as `a.b`."""
    table = pages.table(heading, ["name", "value"], flatten(details), num_texts=2, seen=False)
    return pages.section(heading, table, wide=True)


def _headline(measures: Measures) -> Html:
    error, loss = f"{measures.ece:.4f}", f"{measures.log_loss:.4f}"
    before = ("", "")
    if measures.temperature != 1:
        before = (
            f"{measures.ece_before:.4f} before temperature",
            f"{measures.log_loss_before:.4f} before temperature",
        )
    return pages.numbers(
        [
            ("accuracy", f"{measures.accuracy:.4f}", ""),
            ("macro-F1", f"{measures.macro_f1:.4f}", ""),
            ("calibration error", error, before[0]),
            ("log loss", loss, before[1]),
            ("articles", f"{measures.num_examples:,}", f"{len(measures.labels):,} labels"),
            ("temperature", f"{measures.temperature:.4f}", ""),
        ]
    )


def label_table(measures: Agreement) -> Html:
    """Precision, recall and F1 of each label."""
    return pages.table(
        "Precision, recall and F1 of each label",
        ["label", "precision", "recall", "F1", "articles", "predicted"],
        (
            (
                _short(each.label),
                f"{each.precision:.4f}",
                f"{each.recall:.4f}",
                f"{each.f1:.4f}",
                f"{each.support:,}",
                f"{each.num_predicted:,}",
            )
            for each in measures.per_label
        ),
    )


def _confusion(measures: Agreement) -> Iterator[Html]:
    svg = plots.to_svg(
        plots.confusion_matrix(measures),
        "confusion",
        "Confusion matrix: a row for each true label, a column for each predicted one; "
        "the numbers stand in the table that follows",
    )
    yield pages.figure(
        svg, "The deeper a square, the larger its share of the row; blue is right, orange wrong."
    )
    pairs = measures.confusions()
    if len(measures.labels) <= _MOST_LABELS_SQUARED:
        header = ["true \N{RIGHTWARDS ARROW} predicted", *map(_short, measures.labels)]
        rows = (
            (_short(label), *(f"{count:,}" for count in row))
            for label, row in zip(measures.labels, measures.confusion, strict=True)
        )
        squared = pages.table("Articles by true label (rows) and predicted label", header, rows)
        yield pages.folded("The matrix as a table", squared)
    elif pairs:
        yield pages.table(
            f"Confused most often ({min(len(pairs), _MOST_CONFUSIONS)} of {len(pairs):,} pairs)",
            ["true", "predicted", "articles"],
            (
                (_short(true), _short(predicted), f"{n:,}")
                for true, predicted, n in pairs[:_MOST_CONFUSIONS]
            ),
            num_texts=2,
        )


def _reliability(measures: Agreement) -> Iterator[Html]:
    svg = plots.to_svg(
        plots.reliability(measures),
        "reliability",
        "Reliability diagram: accuracy of the articles by their score, and how many there are; "
        "the numbers stand in the table that follows",
    )
    yield pages.figure(
        svg,
        "Accuracy of the articles in bins by their score. On the dashed line a score of 0.9 is "
        "right nine times in ten; below it the model is too sure of itself.",
    )
    table = pages.table(
        "Articles by score",
        ["score", "articles", "mean score", "accuracy"],
        (_bin_row(each) for each in measures.reliability if each.count),
        num_texts=0,
    )
    yield pages.folded("The bins as a table", table)


def _bin_row(each: Bin) -> tuple[str, str, str, str]:
    return (
        f"{each.lower:.3f} to {each.upper:.3f}",
        f"{each.count:,}",
        _ratio(each.mean_score),
        _ratio(each.accuracy),
    )


def _coverage(measures: Agreement) -> Iterator[Html]:
    svg = plots.to_svg(
        plots.risk_coverage(measures),
        "coverage",
        "Accuracy of the articles with the highest scores against their share of all; "
        "the numbers stand in the table that follows",
    )
    yield pages.figure(svg, "What is gained when the least certain articles get no label.")
    yield pages.table(
        "What --min-score leaves",
        ["--min-score", "kept", "share", "accuracy"],
        (
            (
                f"{each.min_score:g}",
                f"{each.num_kept:,}",
                f"{each.share_kept:.1%}",
                _ratio(each.accuracy),
            )
            for each in measures.risk_coverage
        ),
        num_texts=0,
    )


def _ratio(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.4f}"


def _short(label: str) -> str:
    return shorten(label, _MOST_LABEL)


def flatten(details: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Plain values by name, those of a nested mapping as `a.b`, none of them long."""
    for name, value in details.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
            continue
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if isinstance(value, float):
            shown = f"{value:.6g}"
        yield _short(f"{prefix}{name}"), shorten(shown, _MOST_VALUE)
