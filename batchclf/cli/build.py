import json
from typing import Any, Literal

import click

from batchclf.cli import options
from batchclf.errors import EXIT_OK
from batchclf.log import LogFormat, configure


@click.command(short_help="Make an int8 build of a model for --backend openvino.")
@click.option("--model", required=True, metavar="DIR|s3://", help="Model to build for.")
@click.option(
    "--calibrate",
    "inputs",
    multiple=True,
    required=True,
    metavar="INPUT",
    help="Articles like those to be labelled; repeatable. They need no labels.",
)
@click.option(
    "--backend",
    type=click.Choice(["openvino"]),
    default="openvino",
    show_default=True,
    help="What will compute.",
)
@click.option(
    "--precision",
    type=click.Choice(["int8", "bfloat16", "float32"]),
    default="int8",
    show_default=True,
    help="int8 is kept in the model directory; the others need no build and are compared alone.",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    default=0.995,
    show_default=True,
    metavar="P",
    help="Refuse if a smaller share of labels agrees with float32.",
)
@click.option(
    "--rows",
    "num_rows",
    type=click.IntRange(min=10),
    default=500,
    show_default=True,
    metavar="N",
    help="Articles to compare on; int8 is calibrated on up to 300 others.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of an article that are read. [default: the model's]",
)
@options.text_column_option
@options.delimiter_option
@options.log_options
@options.endpoint_option
def build(
    log_format: LogFormat, backend: Literal["openvino"], delimiter: str, **settings: Any
) -> int:
    """Make an int8 build of a model for `--backend openvino`.

    It is calibrated on some articles, compared with float32 on others, and kept in the model
    directory if it agrees. The last line of standard output is one JSON object.

    \b
    batchclf build --model model --calibrate news.csv
    batchclf classify news.csv --model model --backend openvino --output out
    """
    configure(log_format)
    from batchclf.build_job import BuildSettings, build as make

    del backend  # there is one
    found = make(BuildSettings(delimiter=options.unescape_delimiter(delimiter), **settings))
    if log_format == "text":
        agreement = found["agreement"]
        click.echo(
            f"{found['precision']}: {agreement['labels']:.2%} of {agreement['num_texts']} labels "
            f"as in float32\n"
            f"a probability moves by at most {agreement['max_change']:.2g}, on average "
            f"{agreement['mean_change']:.2g}"
        )
        if found["kept_in"]:
            click.echo(f"kept in {found['kept_in']}; classify takes it with --backend openvino")
    click.echo(json.dumps(found))
    return EXIT_OK
