"""Plots by matplotlib, as PNG files or as SVG that stands in a page and follows its colours.

Text in figures may come from strangers (labels), so nothing in it is read as mathematics, and the
SVG writer escapes it.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from batchclf.calibration import Bin
from batchclf.evaluation import Agreement, Measures, shorten

_WIDTH_IN = 3.9  # near a phone's width, so that the letters keep their size there
_HEIGHT_IN = 3.0
_PNG_DPI = 200
_MOST_NAMED_LABELS = 25  # of a confusion matrix; more names would cover each other
_MOST_COUNTED_LABELS = 10
_MOST_LABEL = 18  # characters
_MOST_TITLE = 16
_MOST_LINE = 1_000
_BAR_IN = 0.25
_ONE_PERCENT = 0.01
_SMOOTHED_STEPS = 50
_FEW_POINTS = 20  # that need a mark each to be seen

# Colours on paper. In a page each gives way to the variable of its name in the page's style sheet,
# which has a value for light and one for dark.
INK = "#1a1c20"
FAINT = "#8a909a"
ACCENT = "#1f5fbf"
SECOND = "#b4530a"
_VARIABLES = {INK: "--ink", FAINT: "--faint", ACCENT: "--accent", SECOND: "--second"}

_CLEAR_TO_ACCENT = LinearSegmentedColormap.from_list("accent", [f"{ACCENT}00", ACCENT])

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2,
    "svg.fonttype": "none",
    "svg.hashsalt": "batchclf",
    "figure.constrained_layout.use": True,
}
Draw = Callable[[Figure], None]


def to_png(draw: Draw) -> bytes:
    """The figure on white, for a file."""
    with _figure() as figure:
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_PNG_DPI, facecolor="white")
        return file.getvalue()


def to_svg(draw: Draw, name: str, description: str) -> str:
    """The figure as an `<svg>` element for a page that has the variables `--ink` and so on.

    Args:
        draw: one of this module.
        name: ASCII letters and hyphens; makes the ids of the element its own.
        description: what a reader who does not see it is told; plain text, escaped here.
    """
    with _figure() as figure:
        draw(figure)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    whole = file.getvalue()
    return re.sub(r"<[^>]*>", partial(_adapt_tag, name, description), whole[whole.index("<svg") :])


def training_curve(history: Mapping[str, Any]) -> Draw:
    """Losses and accuracies of the epochs, and which epoch was kept.

    Args:
        history: of `batchclf.train`: `epochs`, `best_epoch`, `step_losses`.
    """

    def draw(figure: Figure) -> None:
        figure.set_figheight(1.6 * _HEIGHT_IN)
        losses, accuracies = figure.subplots(2, 1, sharex=True)
        epochs = history["epochs"]
        numbers = [epoch["epoch"] for epoch in epochs]
        steps = _smoothed(history.get("step_losses", []))
        if steps:
            places = [(at + 1) / len(steps) * numbers[-1] for at in range(len(steps))]
            losses.plot(places, steps, color=FAINT, linewidth=1, alpha=0.7, label="each step")
        _two_lines(losses, numbers, epochs, "loss")
        _two_lines(accuracies, numbers, epochs, "accuracy")
        accuracies.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        accuracies.set_xlabel("epoch")
        accuracies.xaxis.set_major_locator(MaxNLocator(integer=True))
        losses.set_ylim(bottom=0)
        for axes in (losses, accuracies):
            axes.axvline(history["best_epoch"], color=INK, linewidth=1, linestyle=":", label="kept")
        _legend(figure, losses)

    return draw


def confusion_matrix(measures: Agreement) -> Draw:
    """Shares of each true label by predicted label, with counts while there is room for them."""

    def draw(figure: Figure) -> None:
        count = len(measures.labels)
        is_named = count <= _MOST_NAMED_LABELS
        side = max(_WIDTH_IN, 0.3 * count) if is_named else _WIDTH_IN
        figure.set_size_inches(side, 0.92 * side)
        axes = figure.subplots()
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if not is_named:
            shares = [[n / max(sum(row), 1) for n in row] for row in measures.confusion]
            axes.imshow(shares, cmap=_CLEAR_TO_ACCENT, vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            return
        for y, row in enumerate(measures.confusion):
            for x, number in enumerate(row):
                _cell(axes, x, y, number / max(sum(row), 1))
                if count <= _MOST_COUNTED_LABELS:
                    axes.text(x, y, f"{number:,}", ha="center", va="center", fontsize=9)
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_aspect("equal")
        names = [_clip(label, _MOST_LABEL) for label in measures.labels]
        axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), names)

    return draw


def reliability(measures: Agreement) -> Draw:
    """Accuracy against score in bins, before and after temperature, and how many are in each."""

    def draw(figure: Figure) -> None:
        figure.set_figheight(1.25 * _HEIGHT_IN)
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--", label="perfect")
        if isinstance(measures, Measures) and measures.temperature != 1:
            _bins(axes, measures.reliability_before, SECOND, ":", "temperature 1")
            _bins(
                axes, measures.reliability, ACCENT, "-", f"temperature {measures.temperature:.2f}"
            )
        else:
            _bins(axes, measures.reliability, ACCENT, "-", "model")
        axes.set_ylabel("accuracy")
        axes.set_ylim(-0.02, 1.02)
        _legend(figure, axes)
        bins = measures.reliability
        counts.bar(
            [each.lower for each in bins],
            [each.count for each in bins],
            width=[0.94 * (each.upper - each.lower) for each in bins],
            align="edge",
            color=ACCENT,
        )
        counts.set_ylabel("articles")
        counts.set_xlabel("score")
        counts.set_xlim(0, 1)
        counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))

    return draw


def risk_coverage(measures: Agreement) -> Draw:
    """Accuracy of the rows that are kept, against their share."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        curve = [each for each in measures.coverage_curve if each.accuracy is not None]
        kept = [each.share_kept for each in curve]
        right = [each.accuracy or 0.0 for each in curve]
        axes.plot(kept, right, ".-" if len(curve) < _FEW_POINTS else "-", color=ACCENT)
        axes.set_xlabel("share of articles kept")
        axes.set_ylabel("accuracy of those")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(min(*right, 0.9) - 0.01, 1.005)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=None))

    return draw


def bars(names: Sequence[str], values: Sequence[float], notes: Sequence[str]) -> Draw:
    """A bar for each name, from the top down, with a few words behind it."""

    def draw(figure: Figure) -> None:
        figure.set_figheight(_BAR_IN * len(names) + 0.3)
        axes = figure.subplots()
        places = range(len(names))
        axes.barh(places, values, height=0.72, color=ACCENT)
        most = max(*values, 0.0) or 1.0
        for place, value, note in zip(places, values, notes, strict=True):
            axes.text(value + 0.02 * most, place, note, va="center", fontsize=9)
        axes.set_yticks(places, [_clip(name, _MOST_LABEL) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.3 * most)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False)

    return draw


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    above: Sequence[int] = (),
    *,
    x: str,
    names: tuple[str, str] = ("", ""),
) -> Draw:
    """Articles in neighbouring bins.

    Args:
        edges: of the bins, one more than there are.
        counts: articles of each.
        above: other articles, drawn upon them in the second colour.
        x: what is binned.
        names: of both kinds, where there are two.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        widths = [after - before for before, after in pairwise(edges)]
        drawn = [0.92 * width for width in widths]
        axes.bar(edges[:-1], counts, drawn, align="edge", color=ACCENT, label=names[0])
        if above:
            axes.bar(edges[:-1], above, drawn, counts, align="edge", color=SECOND, label=names[1])
            _legend(figure, axes)
        axes.set_xlabel(x)
        axes.set_ylabel("articles")
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.grid(visible=False)
        _count_axis(axes)

    return draw


def timeline(starts: Sequence[str], totals: Sequence[int]) -> Draw:
    """Articles of periods that follow one another."""

    def draw(figure: Figure) -> None:
        figure.set_figheight(0.6 * _HEIGHT_IN)
        axes = figure.subplots()
        _steps(axes, totals)
        axes.set_ylabel("articles")
        axes.xaxis.grid(visible=False)
        axes.set_xlim(-0.6, len(starts) - 0.4)
        _count_axis(axes)
        _ends(axes, starts)

    return draw


def panels(
    series: Sequence[tuple[str, Sequence[float]]], ends: Sequence[str], *, shares: bool
) -> Draw:
    """A small plot for each name, each on its own scale from 0.

    Args:
        series: name and values; as many values for each.
        ends: what stands below the first and the last value; or one, where there is but one.
        shares: the values are shares of 1.
    """

    def draw(figure: Figure) -> None:
        num_rows = -(-len(series) // 2)
        figure.set_figheight(0.85 * num_rows + 0.35)
        grid = figure.subplots(num_rows, 2, squeeze=False).ravel()
        for place, axes in enumerate(grid):
            if place >= len(series):
                axes.set_visible(False)
                continue
            name, values = series[place]
            _steps(axes, values)
            axes.set_title(_clip(name, _MOST_TITLE), loc="left", fontsize=9, pad=3)
            most = max(*values, 0.0) or 1.0
            axes.set_ylim(0, most)
            axes.set_xlim(-0.6, len(values) - 0.4)
            top = f"{most:.0%}" if shares and most >= _ONE_PERCENT else f"{most:.1%}"
            axes.set_yticks([0, most], ["0", top if shares else _brief(most)], fontsize=8)
            axes.grid(visible=False)
            if place >= len(series) - 2:
                _ends(axes, ends, fontsize=8)
            else:
                axes.set_xticks([])

    return draw


@contextmanager
def _figure() -> Iterator[Figure]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A PNG shows a box for a letter that no font of this machine has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(_WIDTH_IN, _HEIGHT_IN))


def _adapt_tag(name: str, description: str, match: re.Match[str]) -> str:
    """Colours to variables, ids to this figure's own, and on the first tag what it shows."""
    tag = match[0]
    for colour, variable in _VARIABLES.items():
        tag = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var({variable})", tag)
    tag = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', tag)
    tag = re.sub(r'(url\(#|href="#)', rf"\1{name}-", tag)
    if tag.startswith("<svg"):
        tag = re.sub(r' (width|height)="[^"]*"', "", tag)
        tag = f'{tag[:-1]} role="img" aria-label="{escape(description)}">'
    return tag


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the plot, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)


def _clip(name: str, most: int) -> str:
    """A name on one line; of a long one both ends, since many may begin in the same way."""
    line = shorten(name, _MOST_LINE)
    if len(line) <= most:
        return line
    behind = (most - 1) // 2
    return f"{line[: most - 1 - behind].rstrip()}\N{HORIZONTAL ELLIPSIS}{line[-behind:].lstrip()}"


def _count_axis(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _brief(value)))


def _brief(number: float) -> str:
    """`950`, `12k`, `1.5M`: as short as an axis wants it."""
    for size, unit in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _steps(axes: Axes, values: Sequence[float]) -> None:
    """A bar for each value; as one area where they are many, without hairs between them."""
    if len(values) <= _FEW_POINTS:
        axes.bar(range(len(values)), values, width=0.85, color=ACCENT)
    else:
        edges = [place - 0.5 for place in range(len(values) + 1)]
        axes.stairs(values, edges, fill=True, color=ACCENT)


def _ends(axes: Axes, names: Sequence[str], fontsize: int = 9) -> None:
    """The first and the last name below the axis, each within it."""
    low, high = axes.get_xlim()
    if len(names) == 1:
        axes.set_xticks([(low + high) / 2], names, fontsize=fontsize)
        return
    axes.set_xticks([low, high], [names[0], names[-1]], fontsize=fontsize)
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def _two_lines(axes: Axes, numbers: Sequence[float], epochs: Sequence[Any], kind: str) -> None:
    for split, colour, marks in (("train", SECOND, "s--"), ("val", ACCENT, "o-")):
        values = [epoch[f"{split}_{kind}"] for epoch in epochs]
        name = "training" if split == "train" else "validation"
        axes.plot(numbers, values, marks, color=colour, markersize=4, label=name)
    axes.set_ylabel(kind)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over neighbours, few enough to draw."""
    width = max(len(values) // (4 * _SMOOTHED_STEPS), 1)
    pieces = [values[start : start + width] for start in range(0, len(values), width)]
    return [sum(piece) / len(piece) for piece in pieces]


def _cell(axes: Axes, x: int, y: int, share: float) -> None:
    """A square of a confusion matrix: the deeper, the more of its row; never too deep for ink."""
    colour = ACCENT if x == y else SECOND
    corner, size, alpha = (x - 0.48, y - 0.48), 0.96, 0.06 + 0.44 * share
    axes.add_patch(Rectangle(corner, size, size, facecolor=colour, alpha=alpha, linewidth=0))


def _bins(axes: Axes, bins: Sequence[Bin], colour: str, line: str, label: str) -> None:
    """Accuracies by mean score; the larger a dot, the more articles stand behind it."""
    filled = [each for each in bins if each.count]
    most = max((each.count for each in filled), default=1)
    scores = [each.mean_score or 0.0 for each in filled]
    accuracies = [each.accuracy or 0.0 for each in filled]
    sizes = [8 + 100 * each.count / most for each in filled]
    axes.plot(scores, accuracies, line, color=colour, linewidth=1.2, label=label)
    axes.scatter(
        scores, accuracies, sizes, color=colour, alpha=0.8, linewidth=0, zorder=3, clip_on=False
    )
