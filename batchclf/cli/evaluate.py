import json
from collections.abc import Iterator
from textwrap import wrap
from typing import TYPE_CHECKING

import click

from batchclf.cli import options
from batchclf.cli.options import plural
from batchclf.cli.signals import stop_on_signals
from batchclf.config import ModelSettings
from batchclf.errors import EXIT_OK
from batchclf.log import LogFormat, configure

if TYPE_CHECKING:
    from batchclf.evaluate_job import Evaluation
    from batchclf.evaluation import Measures

_WIDTH = 80
_MOST_SQUARED = 7  # labels of a confusion matrix that fits the width
_MOST_CONFUSIONS = 10
_MOST_MISTAKES = 5


@click.command(short_help="Measure a model on labelled files.")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@options.model_options
@click.option("--output", metavar="DIR", help="Folder for evaluation.json and evaluation.html.")
@options.text_column_option
@click.option(
    "--label-column", default="category", show_default=True, metavar="NAME", help="True labels."
)
@options.delimiter_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows.")
@options.progress_option
@options.log_options
@options.endpoint_option
def evaluate(
    inputs: tuple[str, ...],
    model: ModelSettings,
    output: str | None,
    text_columns: tuple[str, ...],
    label_column: str,
    delimiter: str,
    limit: int | None,
    progress: bool,
    log_format: LogFormat,
    endpoint_url: str | None,
) -> int:
    """Measure a model on labelled files, which it labels just as classify would.

    INPUT is as for classify. The calibration error says how far scores lie from the accuracy that
    they promise, before and after the model's temperature.

    \b
    batchclf evaluate test.csv --model model --output evaluation
    """
    configure(log_format)
    interrupt = stop_on_signals()

    from batchclf.evaluate_job import EvaluateJob
    from batchclf.progress import choose_style
    from batchclf.store import open_folder

    folder = open_folder(output, endpoint_url) if output else None
    if folder:
        folder.prepare()  # a folder that cannot be written is known before the work
    job = EvaluateJob(
        inputs,
        model,
        text_columns,
        label_column,
        options.unescape_delimiter(delimiter),
        limit,
        endpoint_url,
    )
    evaluation = job.run(interrupt, choose_style(progress, log_format))
    if folder:
        evaluation.write(folder)
    if log_format == "json":
        where = {"output": folder.uri} if folder else {}
        click.echo(json.dumps(where | evaluation.as_dict()))
        return EXIT_OK
    for line in _summary(evaluation):
        click.echo(line)
    if folder:
        click.echo(f"output  {folder.uri}")
    else:
        click.echo("--output DIR writes all of this, with plots, as a page and as JSON")
    return EXIT_OK


def _summary(evaluation: "Evaluation") -> Iterator[str]:
    measures = evaluation.measures
    yield (
        f"accuracy {measures.accuracy:.4f}, macro-F1 {measures.macro_f1:.4f}, "
        f"log loss {measures.log_loss:.4f}"
    )
    error = f"calibration error {measures.ece:.4f}"
    if measures.temperature != 1:
        error += (
            f" at the model's temperature {measures.temperature:.3f}; {measures.ece_before:.4f} "
            "before"
        )
    yield error
    rows = plural(measures.num_examples, "row")
    yield f"{rows} measured, {evaluation.num_truncated:,} of them truncated"
    failed = evaluation.failures.counts
    if failed:
        codes = ", ".join(f"{count:,} {code}" for code, count in failed.most_common())
        yield from wrap(f"{failed.total():,} could not be labelled: {codes}", _WIDTH)
    yield ""
    yield from _labels(measures)
    yield ""
    yield from _confusion(measures)
    yield f"{'--min-score':<12}{'kept':>12}{'share':>10}{'accuracy':>10}"
    for each in measures.risk_coverage:
        accuracy = "-" if each.accuracy is None else f"{each.accuracy:.4f}"
        share = f"{each.share_kept:.1%}"
        yield f"{each.min_score:<12g}{each.num_kept:>12,}{share:>10}{accuracy:>10}"
    yield ""
    yield from _mistakes(evaluation)


def _labels(measures: "Measures") -> Iterator[str]:
    width = min(max(5, *(len(label) for label in measures.labels)), 26)
    head = ("precision", "recall", "F1", "articles", "predicted")
    yield _fit("label", width) + "".join(f"{name:>10}" for name in head)
    for each in measures.per_label:
        yield (
            f"{_fit(each.label, width)}{each.precision:>10.4f}{each.recall:>10.4f}{each.f1:>10.4f}"
            f"{each.support:>10,}{each.num_predicted:>10,}"
        )


def _confusion(measures: "Measures") -> Iterator[str]:
    if len(measures.labels) <= _MOST_SQUARED:
        first = 16
        room = min((_WIDTH - first) // len(measures.labels), 14)
        heads = "".join(" " + _fit(label, room - 1, at_end=True) for label in measures.labels)
        yield f"{'true, predicted':<{first}}{heads}"
        for label, row in zip(measures.labels, measures.confusion, strict=True):
            yield _fit(label, first) + "".join(f"{count:>{room},}" for count in row)
        yield ""
        return
    pairs = measures.confusions()
    if not pairs:
        return
    yield "confused most often: true, predicted, articles"
    for true, predicted, count in pairs[:_MOST_CONFUSIONS]:
        yield f"  {_fit(true, 32)} {_fit(predicted, 32)}{count:>10,}"
    yield ""


def _mistakes(evaluation: "Evaluation") -> Iterator[str]:
    shown = evaluation.mistakes[:_MOST_MISTAKES]
    if not shown:
        yield "no mistakes"
        return
    yield f"most confident mistakes ({len(shown)} of {len(evaluation.mistakes)} listed)"
    for each in shown:
        yield _fit(f"{each.score:.4f}  {each.label}, taken for {each.predicted}", _WIDTH).rstrip()
        yield f"        {_printable(each.place)}"
        yield "        " + _fit(each.text, _WIDTH - 8).rstrip()


def _fit(text: str, width: int, *, at_end: bool = False) -> str:
    """Exactly so many columns of a terminal, of what may be shown there: it is a stranger's."""
    from rich.cells import cell_len, set_cell_size

    shown = _printable(text)
    if cell_len(shown) > width:
        shown = set_cell_size(shown, width - 1).rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    space = " " * (width - cell_len(shown))
    return space + shown if at_end else shown + space


def _printable(text: str) -> str:
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
