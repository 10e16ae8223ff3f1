import json
from typing import TYPE_CHECKING, Any

import click

from batchclf.cli import options
from batchclf.errors import EXIT_OK
from batchclf.log import LogFormat, configure

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.command()
@click.option("--model", metavar="DIR", help="Model to measure. [default: a random GPT-2]")
@click.option(
    "--size",
    type=click.Choice(["124M", "355M", "774M"]),
    default="124M",
    show_default=True,
    help="Of the random GPT-2.",
)
@click.option(
    "--input", "inputs", multiple=True, metavar="INPUT", help="Articles. [default: made-up ones]"
)
@options.text_column_option
@click.option(
    "--rows",
    "num_rows",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Articles that batchclf labels.",
)
@click.option(
    "--peer-rows",
    "num_peer_rows",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    metavar="N",
    help="Articles of them, evenly spread, that the Hugging Face pipeline labels.",
)
@click.option(
    "--max-length",
    "max_lengths",
    type=click.IntRange(min=1),
    multiple=True,
    default=(128, 1024),
    show_default=True,
    metavar="N",
    help="Tokens of a text that the model sees; each is measured.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Runs of each, taking turns; the median counts.",
)
@options.dtype_option
@options.device_option
@options.log_format_option
def bench(log_format: LogFormat, **measured: Any) -> int:
    """Articles/s on this machine, against the plain Hugging Face pipeline (float32, batch 16).

    Compare ratios of one run: machines differ. The last line of standard output is one JSON object.
    """
    configure(log_format)
    from batchclf.bench import BenchSettings, bench as measure

    found = measure(BenchSettings(**measured))
    _show(found)
    click.echo(json.dumps(found))
    return EXIT_OK


def _show(found: "Mapping[str, Any]") -> None:
    click.echo(f"{'max length':>10}  {'batchclf':>10}  {'pipeline':>10}  {'ratio':>6}  articles/s")
    for row in found["results"]:
        click.echo(
            f"{row['max_length']:>10}  {row['batchclf']['articles_per_s']:>10,.2f}  "
            f"{row['pipeline_float32']['articles_per_s']:>10,.2f}  {row['ratio']:>6.2f}"
        )
