import json
from typing import TYPE_CHECKING, Any

import click

from batchclf.cli import options
from batchclf.errors import EXIT_OK
from batchclf.log import LogFormat, configure

if TYPE_CHECKING:
    from collections.abc import Mapping

_QUICK = {"num_rows": 96, "num_peer_rows": 16, "max_lengths": (128,), "repeats": 1}


@click.command(short_help="Measure this machine's speed against other ways.")
@click.option("--model", metavar="DIR|s3://", help="Model to measure. [default: a random GPT-2]")
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
    help="Articles of them, evenly spread, that the others label.",
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
@click.option("--quick", is_flag=True, help="Few articles, 128 tokens, one run: under a minute.")
@options.dtype_option
@options.backend_option
@options.device_option
@options.log_options
@options.endpoint_option
def bench(log_format: LogFormat, quick: bool, **measured: Any) -> int:
    """Articles/s on this machine, against what people would otherwise run.

    \b
    pipeline_float32   Hugging Face pipeline, batch 16
    pipeline_bfloat16  the same in bfloat16, batch 32
    sorted_bfloat16    articles sorted by length, transformers' own forward,
                       bfloat16, batch 16
    openvino_static    where installed: OpenVINO with one fixed shape, in
                       bfloat16 where the CPU has it; _int8 with a build
    ceiling            the model's matrix products alone, on all cores

    Compare ratios of one run: machines differ. The last line of standard output is one JSON object.
    """
    configure(log_format)
    from batchclf.bench import BenchSettings, bench as measure

    if quick:
        measured |= _QUICK
    found = measure(BenchSettings(**measured))
    _show(found)
    click.echo(json.dumps(found))
    return EXIT_OK


def _show(found: "Mapping[str, Any]") -> None:
    for row in found["results"]:
        ours = row["batchclf"]
        click.echo(f"\nmax length {row['max_length']}      articles/s   batchclf is")
        click.echo(f"  {'batchclf':20}{ours['articles_per_s']:>12,.2f}   ({ours['dtype']})")
        for name, peer in row["peers"].items():
            ratio = f"{peer['ratio']:.2f} x"
            click.echo(f"  {name:20}{peer['articles_per_s']:>12,.2f}   {ratio} as fast")
        busy = ", ".join(f"{name} {share:.0%}" for name, share in ours["busy"].items())
        change = row["largest_change_of_a_probability_alone"]
        click.echo(
            f"  {ours['tokens_per_s']:,.0f} tokens/s, {row['share_of_ceiling']:.0%} of the ceiling "
            f"({row['ceiling_gflops']:,.0f} GFLOP/s)\n"
            f"  padding {row['padding_waste']:.1%}, peak memory {ours['peak_rss_mib']:,} MiB\n"
            f"  busy: {busy}\n"
            f"  a row scored alone: its probabilities move by at most {change:.1g}"
        )
