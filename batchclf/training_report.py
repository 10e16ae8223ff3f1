"""What a training run leaves for people: numbers, plots, and a page with both."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchclf import __version__, pages, plots
from batchclf.evaluation import Measures, Mistake
from batchclf.evaluation_page import details_section, measure_sections, mistakes_section
from batchclf.pages import Html
from batchclf.store import open_folder

METRICS = "metrics.json"
TRAINING_CURVE = "training-curve.png"
CONFUSION_MATRIX = "confusion-matrix.png"
RELIABILITY = "reliability.png"
REPORT = "report.html"
FILES = (METRICS, TRAINING_CURVE, CONFUSION_MATRIX, RELIABILITY, REPORT)


def write_training_report(
    directory: Path,
    *,
    title: str,
    history: Mapping[str, Any],
    measures: Mapping[str, Measures],
    details: Mapping[str, object],
    mistakes: Sequence[Mistake] = (),
) -> None:
    """Write `FILES` into a folder; each replaces the one of its name in one step.

    Args:
        directory: made if it is not there.
        title: of the page.
        history: `epochs` (`epoch`, `train_loss`, `train_accuracy`, `val_loss`, `val_accuracy`, ...
            of each), `best_epoch`, and `step_losses`.
        measures: by split, at least one; the plots are of the first.
        details: what it was trained on and how, in plain JSON values.
        mistakes: of the first split.

    Raises:
        StoreError, ConfigError: the folder cannot be written.
    """
    (split, first), *_ = measures.items()
    metrics = {
        "title": title,
        "measures": {name: found.as_dict() for name, found in measures.items()},
        "history": dict(history),
        "details": dict(details),
    }
    page = pages.page(
        title,
        f"measured on {split}: {first.num_examples:,} articles",
        _sections(history, measures, details, mistakes),
        f"batchclf {__version__}",
    )
    folder = open_folder(str(directory))
    folder.put(METRICS, (json.dumps(metrics, indent=1, ensure_ascii=False) + "\n").encode())
    folder.put(TRAINING_CURVE, plots.to_png(plots.training_curve(history)))
    folder.put(CONFUSION_MATRIX, plots.to_png(plots.confusion_matrix(first)))
    folder.put(RELIABILITY, plots.to_png(plots.reliability(first)))
    folder.put(REPORT, page)


def _sections(
    history: Mapping[str, Any],
    measures: Mapping[str, Measures],
    details: Mapping[str, object],
    mistakes: Sequence[Mistake],
) -> Iterator[Html]:
    first = next(iter(measures.values()))
    headline, *others = measure_sections(first)
    yield headline
    if len(measures) > 1:
        yield pages.section("Splits", _splits(measures), wide=True)
    svg = plots.to_svg(
        plots.training_curve(history),
        "training",
        "Training curve: losses and accuracies of the epochs; the numbers stand in the table",
    )
    figure = pages.figure(svg, "Losses and accuracies after each epoch.")
    yield pages.section("Training", pages.beside(figure, _epochs(history)), wide=True)
    yield from others
    if mistakes:
        yield mistakes_section(mistakes)
    if details:
        yield details_section("How it was trained", details)


def _splits(measures: Mapping[str, Measures]) -> Html:
    return pages.table(
        "The same model on each split",
        ["split", "articles", "accuracy", "macro-F1", "calibration error", "log loss"],
        (
            (
                split,
                f"{found.num_examples:,}",
                f"{found.accuracy:.4f}",
                f"{found.macro_f1:.4f}",
                f"{found.ece:.4f}",
                f"{found.log_loss:.4f}",
            )
            for split, found in measures.items()
        ),
    )


def _epochs(history: Mapping[str, Any]) -> Html:
    best = history["best_epoch"]
    names = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
    return pages.table(
        "Epochs",
        ["epoch", "training loss", "validation loss", "training accuracy", "validation accuracy"],
        (
            (
                f"{epoch['epoch']} (kept)" if epoch["epoch"] == best else epoch["epoch"],
                *(f"{epoch[name]:.4f}" for name in names),
            )
            for epoch in history["epochs"]
        ),
    )
