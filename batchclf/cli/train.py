import json
from typing import Any

import click

from batchclf.cli import options
from batchclf.errors import EXIT_OK
from batchclf.log import LogFormat, configure


@click.command()
@click.option("--train", multiple=True, required=True, metavar="INPUT", help="Labelled articles.")
@click.option(
    "--val", multiple=True, required=True, metavar="INPUT", help="Articles to choose the epoch by."
)
@click.option(
    "--base-model",
    required=True,
    metavar="NAME|DIR|JSON",
    help="GPT-2 to start from; or a config JSON, to start from scratch.",
)
@click.option(
    "--drop-leaked", is_flag=True, help="Leave out training articles that stand in --val too."
)
@click.option("--output", required=True, metavar="DIR", help="Model directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace a model directory.")
@options.text_column_option
@click.option(
    "--label-column", default="category", show_default=True, metavar="NAME", help="True labels."
)
@click.option(
    "--labels", metavar="A,B", help="Labels in their order. [default: those of the training data]"
)
@options.delimiter_option
@click.option(
    "--head",
    type=click.Choice(["last_token", "flatten"]),
    default="last_token",
    show_default=True,
    help="What is put on top of GPT-2.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Tokens of a text that the model sees.",
)
@click.option(
    "--normalise",
    type=click.Choice(["none", "lower+collapse"]),
    default="none",
    show_default=True,
    help="What is done to a text before it is tokenised, also at inference.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=257),
    default=8192,
    show_default=True,
    metavar="N",
    help="Of the tokenizer, from scratch.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Passes over the training articles.",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Longest row times rows of one batch.",
)
@click.option(
    "--learning-rate", type=float, default=5e-5, show_default=True, metavar="X", help="Its top."
)
@click.option(
    "--warmup-share",
    type=float,
    default=0.1,
    show_default=True,
    metavar="X",
    help="Share of all steps in which the learning rate rises.",
)
@click.option(
    "--weight-decay", type=float, default=0.01, show_default=True, metavar="X", help="As in AdamW."
)
@click.option(
    "--clip-norm",
    type=float,
    default=1.0,
    show_default=True,
    metavar="X",
    help="Longer gradients are scaled down to this norm.",
)
@click.option(
    "--label-smoothing",
    type=float,
    default=0.0,
    show_default=True,
    metavar="X",
    help="Share of the probability that goes to all labels alike.",
)
@click.option(
    "--crop-share",
    type=float,
    default=0.0,
    show_default=True,
    metavar="X",
    help="Share of articles that are cut at random places in an epoch.",
)
@click.option(
    "--noise-share",
    type=float,
    default=0.0,
    show_default=True,
    metavar="X",
    help="Share of tokens that are replaced by random ones in an epoch.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Of first weights, order and noise.",
)
@options.device_option
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="How the weights are saved.",
)
@options.log_format_option
@options.endpoint_option
def train(log_format: LogFormat, labels: str | None, delimiter: str, **wanted: Any) -> int:
    """Train a classifier on labelled articles and write a model directory.

    \b
    batchclf train --train train.csv --val val.csv --base-model gpt2 \\
        --output model
    """
    configure(log_format)
    from dataclasses import fields

    from batchclf.train import TrainSettings
    from batchclf.train_job import TrainJob

    settings = TrainSettings(
        **{field.name: wanted.pop(field.name) for field in fields(TrainSettings)}
    )
    names = tuple(label.strip() for label in labels.split(",")) if labels else ()
    delimiter = options.unescape_delimiter(delimiter)
    trained = TrainJob(settings=settings, labels=names, delimiter=delimiter, **wanted).run()
    if log_format == "json":
        click.echo(json.dumps({"output": wanted["output"], **trained.metrics}))
    else:
        metrics = trained.metrics
        click.echo(
            f"validation: accuracy {metrics['val_accuracy']:.4f}, macro-F1 "
            f"{metrics['val_macro_f1']:.4f}, loss {metrics['val_loss']:.4f}, "
            f"best epoch {metrics['best_epoch']}"
        )
        click.echo(f"model   {wanted['output']}")
    return EXIT_OK
