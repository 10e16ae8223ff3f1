"""A report as a page: each plot with its numbers as a table."""

from collections.abc import Iterator, Sequence

import numpy as np

from batchclf import __version__, pages, plots
from batchclf.evaluation import shorten
from batchclf.evaluation_page import (
    agreement_sections,
    flatten,
    label_table,
)
from batchclf.model_card import ModelCard
from batchclf.pages import Html
from batchclf.report import LabelShare, Report, TruthReport, pooled
from batchclf.report_words import (
    count_of,
    is_well,
    plan_sentence,
    share_of,
    subtitle,
    title,
    truth_notes,
)
from batchclf.runs import Run
from batchclf.tally import SCORE_BINS
from batchclf.timeline import Periods

_MOST_BARS = 40
_MOST_PANELS = 12
_MOST_DATED_LABELS = 12  # columns of a table
_MOST_LABELS_LISTED = 15  # before a table is folded
_MOST_SOURCES = 200
_MOST_SOURCES_OPEN = 10
_MOST_RUNS_DRAWN = 12
_MOST_RUNS_LISTED = 50
_MOST_LABEL = 60  # characters
_SHOWN_SCORE_BINS = 20
_PANEL_BINS = 10
_TOKEN_BINS = 24
_DASH = "\N{EN DASH}"


def report_page(report: Report) -> bytes:
    """The page, as the bytes of its file."""
    return pages.page(title(report), subtitle(report), _sections(report), f"batchclf {__version__}")


def _sections(report: Report) -> Iterator[Html]:
    yield pages.section("In short", *_headline(report), wide=True)
    if report.labels and report.counts.num_labelled:
        yield pages.section("Labels", _labels(report.labels), wide=True)
    if report.dates is not None:
        yield pages.section("Labels over time", *_dates(report), wide=True)
    if any(each.mean_score is not None for each in report.labels):
        yield pages.section(
            "Scores", pages.beside(_scores(report), _label_scores(report)), wide=True
        )
    if report.truth is not None:
        yield from _truth(report.truth)
    if report.tokens is not None:
        yield pages.section("Tokens", *_tokens(report))
    yield pages.section("Is everything there?", *_plan(report), wide=report.tokens is None)
    if report.failures:
        yield pages.section("Rows that could not be labelled", *_failures(report), wide=True)
    if report.sources:
        yield pages.section("Inputs", *_sources(report), wide=True)
    if report.runs.found:
        yield pages.section("Runs", *_runs(report.runs.found), wide=True)
    yield from _details(report)


def _headline(report: Report) -> Iterator[Html]:
    counts = report.counts
    num_rows = counts.num_rows
    agreement = report.truth.agreement if report.truth else None
    entries = [
        ("articles", f"{num_rows:,}", count_of(len(report.sources), "input")),
        (
            "labelled",
            share_of(counts.num_labelled, num_rows),
            count_of(len(report.labels), "label"),
        ),
        (
            "abstained",
            share_of(counts.num_abstained, num_rows),
            count_of(counts.num_abstained, "row"),
        ),
        ("failed", share_of(counts.num_failed, num_rows), count_of(counts.num_failed, "row")),
        (
            "truncated",
            share_of(counts.num_truncated, num_rows),
            count_of(counts.num_truncated, "row"),
        ),
    ]
    if report.tokens is not None:
        entries.append(("tokens", f"{report.tokens.mean:,.0f}", "of an article on average"))
    if agreement is not None:
        entries.append(("accuracy", f"{agreement.accuracy:.4f}", "against kept labels"))
    if report.num_repeats:
        entries.append(("repeats", f"{report.num_repeats:,}", "rows left out"))
    yield pages.numbers(entries)
    yield pages.verdict(plan_sentence(report), good=is_well(report))
    yield pages.bullets(report.problems)
    yield pages.bullets(report.notes)


def _labels(labels: Sequence[LabelShare]) -> Html:
    drawn = list(labels[:_MOST_BARS])
    names = [each.label for each in drawn]
    shares = [each.share for each in drawn]
    rest = labels[_MOST_BARS:]
    if rest:
        names.append(f"{len(rest):,} others")
        shares.append(sum(each.share for each in rest))
    svg = plots.to_svg(
        plots.bars(names, shares, [f"{share:.1%}" for share in shares]),
        "labels",
        "Shares of the labels; the numbers stand in the table that follows",
    )
    figure = pages.figure(svg, "Shares of the articles that got a label.")
    table = pages.table(
        "Articles by label, and quantiles of scores",
        ["label", "articles", "share", "mean score", "10%", "50%", "90%"],
        (
            (
                _short(each.label),
                f"{each.num_rows:,}",
                f"{each.share:.2%}",
                _ratio(each.mean_score),
                *(f"{score:.2f}" for score in each.score_quantiles or ()),
                *([] if each.score_quantiles else [_DASH] * 3),
            )
            for each in labels
        ),
    )
    if len(labels) > _MOST_LABELS_LISTED:
        table = pages.folded("The labels as a table", table)
    return pages.beside(figure, table)


def _dates(report: Report) -> Iterator[Html]:
    dates = report.dates
    if dates is None or dates.periods is None:
        yield pages.paragraph(f"No row has a date in the column {dates.column if dates else ''}.")
        return
    periods = dates.periods
    names = [_period(start, periods.unit) for start in periods.starts]
    totals = plots.to_svg(
        plots.timeline(names, periods.totals),
        "dated",
        f"Articles of each {periods.unit}; the numbers stand in the table that follows",
    )
    chosen = sorted(periods.by_label, key=lambda name: -sum(periods.by_label[name]))
    labelled = [sum(column) for column in zip(*periods.by_label.values(), strict=True)]
    series = [
        (name, [n / max(of, 1) for n, of in zip(periods.by_label[name], labelled, strict=True)])
        for name in chosen[:_MOST_PANELS]
    ]
    left, out = periods.num_before + periods.num_after, dates.num_undated
    words = f"Articles of each {periods.unit}, by the kept column {_short(dates.column)}."
    if out:
        words += f" {out:,} have no date in it."
    if left:
        words += f" {left:,} with dates far from all others are left out."
    table = _date_table(periods, names, chosen)
    first = Html(
        f"<div>{pages.figure(totals, words)}{pages.folded('The numbers as a table', table)}</div>\n"
    )
    if not series:
        yield first
        return
    svg = plots.to_svg(
        plots.panels(series, names, shares=True),
        "shares",
        f"Share of each label by {periods.unit}; the numbers stand in the table that follows",
    )
    most = (
        f" The {_MOST_PANELS} most frequent of {len(chosen)}." if len(chosen) > _MOST_PANELS else ""
    )
    second = pages.figure(
        svg, f"Each label's share of the articles labelled, each on its own scale.{most}"
    )
    yield pages.beside(first, second)


def _date_table(periods: Periods, names: Sequence[str], chosen: Sequence[str]) -> Html:
    shown = chosen[:_MOST_DATED_LABELS]
    return pages.table(
        f"Articles of each {periods.unit}",
        [periods.unit, "articles", *map(_short, shown)],
        (
            (name, f"{total:,}", *(f"{periods.by_label[label][place]:,}" for label in shown))
            for place, (name, total) in enumerate(zip(names, periods.totals, strict=True))
        ),
    )


def _scores(report: Report) -> Html:
    labelled = np.sum([each.score_bins for each in report.labels], axis=0).tolist()
    shown = pooled(labelled, SCORE_BINS // _SHOWN_SCORE_BINS)
    abstained: Sequence[int] = ()
    if report.abstained is not None:
        abstained = pooled(report.abstained.score_bins, SCORE_BINS // _SHOWN_SCORE_BINS)
    edges = [place / _SHOWN_SCORE_BINS for place in range(_SHOWN_SCORE_BINS + 1)]
    svg = plots.to_svg(
        plots.histogram(edges, shown, abstained, x="score", names=("labelled", "abstained")),
        "scores",
        "Articles by score; the numbers stand in the table that follows",
    )
    table = pages.table(
        "Articles by score",
        ["score", "labelled", *(["abstained"] if abstained else [])],
        (
            (
                f"{edges[place]:.2f} to {edges[place + 1]:.2f}",
                f"{number:,}",
                *([f"{abstained[place]:,}"] if abstained else []),
            )
            for place, number in enumerate(shown)
            if number or (abstained and abstained[place])
        ),
        num_texts=0,
    )
    figure = pages.figure(svg, "The score is the probability of the best label.")
    return Html(f"<div>{figure}{pages.folded('The bins as a table', table)}</div>\n")


def _label_scores(report: Report) -> Html:
    chosen = [each for each in report.labels if each.mean_score is not None][:_MOST_PANELS]
    series = [(each.label, pooled(each.score_bins, SCORE_BINS // _PANEL_BINS)) for each in chosen]
    svg = plots.to_svg(
        plots.panels(series, ("0", "1"), shares=False),
        "label-scores",
        "Articles by score for each label; quantiles stand in the table of labels",
    )
    return pages.figure(svg, "Articles by score, 0 to 1, for each label on its own scale.")


def _truth(truth: TruthReport) -> Iterator[Html]:
    notes = pages.bullets(truth_notes(truth))
    if truth.agreement is None:
        yield pages.section("True labels", notes, wide=True)
        return
    numbers = pages.numbers(
        [
            ("accuracy", f"{truth.agreement.accuracy:.4f}", ""),
            ("macro-F1", f"{truth.agreement.macro_f1:.4f}", ""),
            ("calibration error", f"{truth.agreement.ece:.4f}", ""),
            ("articles", f"{truth.agreement.num_examples:,}", "with both labels"),
        ]
    )
    table = label_table(truth.agreement)
    if len(truth.agreement.labels) > _MOST_LABELS_LISTED:
        table = pages.folded("Precision, recall and F1 of each label", table)
    yield pages.section("Against the true labels", numbers, notes, table)
    yield from agreement_sections(truth.agreement)


def _tokens(report: Report) -> Iterator[Html]:
    tokens = report.tokens
    if tokens is None:
        return
    width = max(-(-tokens.most // _TOKEN_BINS), 1)
    counts = pooled(tokens.counts[1:], width)  # a row that was read has at least one
    edges = [place * width for place in range(len(counts) + 1)]
    svg = plots.to_svg(
        plots.histogram(edges, counts, x="tokens that the model saw"),
        "tokens",
        "Articles by number of tokens; the numbers stand in the table that follows",
    )
    truncated = report.counts.num_truncated
    yield pages.figure(
        svg,
        f"{truncated:,} articles ({share_of(truncated, report.counts.num_rows)}) go on beyond what "
        "the model saw.",
    )
    table = pages.table(
        "Articles by number of tokens",
        ["tokens", "articles"],
        (
            (f"{edges[place] + 1:,} to {min(edges[place + 1], tokens.most):,}", f"{number:,}")
            for place, number in enumerate(counts)
            if number
        ),
        num_texts=0,
    )
    yield pages.folded("The bins as a table", table)


def _failures(report: Report) -> Iterator[Html]:
    yield pages.table(
        "Rows by code",
        ["code", "rows", "share"],
        (
            (code, f"{failure.count:,}", share_of(failure.count, report.counts.num_rows))
            for code, failure in report.failures.items()
        ),
    )
    examples = pages.table(
        "Some of the rows that failed",
        ["code", "input", "row", "reason"],
        (
            (code, each.source, f"{each.row:,}", each.reason)
            for code, failure in report.failures.items()
            for each in failure.examples
        ),
        num_texts=4,
    )
    yield pages.folded("Some of them", examples)


def _plan(report: Report) -> Iterator[Html]:
    plan = report.plan
    yield pages.verdict(plan_sentence(report), good=is_well(report))
    if plan.missing:
        missing = pages.bullets(plan.missing)
        more = plan.num_missing - len(plan.missing)
        rest = pages.paragraph(f"and {more:,} more") if more else Html("")
        yield pages.folded(f"What is missing ({plan.num_missing:,})", missing, rest)
    if plan.num_extra:
        yield pages.paragraph(
            f"{count_of(plan.num_extra, 'output')} of other inputs than the plan's."
        )
    yield pages.paragraph("To prove that every byte and every row is there, run")
    yield pages.command(report.verify)


def _sources(report: Report) -> Iterator[Html]:
    shown = report.sources[:_MOST_SOURCES]
    table = pages.table(
        f"{len(shown):,} of {count_of(len(report.sources), 'input')}",
        ["input", "rows", "failed", "outputs"],
        (
            (each.name, f"{each.num_rows:,}", f"{each.num_failed:,}", f"{each.num_outputs:,}")
            for each in shown
        ),
    )
    if len(shown) <= _MOST_SOURCES_OPEN:
        yield table
    else:
        yield pages.paragraph(count_of(len(report.sources), "input"))
        yield pages.folded("The inputs as a table", table)


def _runs(runs: Sequence[Run]) -> Iterator[Html]:
    worked = [run for run in runs if run.busy][-_MOST_RUNS_DRAWN:]
    if worked:
        latest = worked[-1]
        stages = list(latest.busy)
        svg = plots.to_svg(
            plots.bars(
                stages,
                [latest.busy[stage] for stage in stages],
                [f"{latest.busy[stage]:.0%}" for stage in stages],
            ),
            "stages",
            "How busy each stage of the latest run was; the numbers stand in the table of runs",
        )
        figures = [
            pages.figure(
                svg,
                "Share of the latest run's time in which each stage worked. They work at the same "
                "time; the busiest sets the pace.",
            )
        ]
        if len(worked) > 1:
            svg = plots.to_svg(
                plots.bars(
                    [_when(run)[5:16] for run in worked],  # without year and seconds
                    [run.articles_per_s for run in worked],
                    [f"{run.articles_per_s:,.1f}" for run in worked],
                ),
                "speed",
                "Articles per second of the latest runs; the numbers stand in the table of runs",
            )
            figures.append(pages.figure(svg, "Articles per second of each run."))
        yield pages.beside(*figures)
    shown = list(reversed(runs[-_MOST_RUNS_LISTED:]))
    yield pages.table(
        f"{len(shown):,} of {count_of(len(runs), 'run')}, the latest first",
        [
            *("ended", "command", "device", "rows", "failed", "shards", "seconds"),
            *("articles/s", "tokens/s", "memory, MiB"),
        ],
        (
            (
                _when(run),
                run.command,
                f"{run.device} {run.dtype}",
                f"{run.num_rows:,}",
                f"{run.num_failed:,}",
                f"{run.num_committed:,}",
                f"{run.seconds:,.1f}",
                f"{run.articles_per_s:,.1f}",
                f"{run.tokens_per_s:,.0f}",
                f"{run.peak_rss_mib:,}",
            )
            for run in shown
        ),
        num_texts=3,
    )
    stages = list(dict.fromkeys(stage for run in shown for stage in run.busy))
    if stages:
        shares = pages.table(
            "Of each stage, the share of the time in which it worked",
            ["ended", *stages],
            (
                (
                    _when(run),
                    *(f"{run.busy[stage]:.1%}" if stage in run.busy else _DASH for stage in stages),
                )
                for run in shown
            ),
        )
        yield pages.folded("The stages as a table", shares)
    errors = [f"{_when(run)}: {error}" for run in shown for error in run.errors]
    if errors:
        yield pages.folded(
            f"What went wrong in runs ({len(errors):,})", pages.bullets(errors[:_MOST_RUNS_LISTED])
        )
    messages = [run for run in shown if run.messages]
    if messages:
        names = list(messages[0].messages)
        table = pages.table(
            "Messages of the queue",
            ["ended", *names],
            ((_when(run), *(f"{run.messages.get(n, 0):,}" for n in names)) for run in messages),
        )
        yield pages.folded("What became of the messages", table)


def _details(report: Report) -> Iterator[Html]:
    if report.card is not None:
        yield pages.section("The model", *_card(report.card), wide=True)
    latest = report.runs.latest
    if latest is not None:
        details = {"model": latest.model, **latest.settings, "versions": latest.versions}
        table = pages.table(
            "Settings of the latest run",
            ["name", "value"],
            flatten(details),
            num_texts=2,
            seen=False,
        )
        yield pages.section(
            "Settings of the latest run", pages.folded("All of them", table), wide=True
        )


def _card(card: ModelCard) -> Iterator[Html]:
    known = {"path": card.path, "labels": list(card.labels), **card.reading}
    yield pages.table(
        "The model as it is there now",
        ["name", "value"],
        flatten({**known, **card.shape, "metrics": card.metrics}),
        num_texts=2,
    )
    if card.training:
        trained = {**card.training, "versions": card.versions}
        table = pages.table(
            "How it was trained", ["name", "value"], flatten(trained), num_texts=2, seen=False
        )
        yield pages.folded("How it was trained", table)


def _period(start: str, unit: str) -> str:
    return start[: {"month": 7, "year": 4}.get(unit, 10)]


def _when(run: Run) -> str:
    return run.finished_at.partition("+")[0].replace("T", " ")


def _ratio(value: float | None) -> str:
    return _DASH if value is None else f"{value:.4f}"


def _short(label: str) -> str:
    return shorten(label, _MOST_LABEL)
