import json
from typing import TYPE_CHECKING, Any

import click

from batchclf.cli import options
from batchclf.cli.signals import stop_on_signals
from batchclf.errors import EXIT_OK
from batchclf.log import LogFormat, configure
from batchclf.progress import choose_style

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.command(short_help="Train a classifier on labelled articles.")
@click.option("--train", multiple=True, required=True, metavar="INPUT", help="Labelled articles.")
@click.option(
    "--val", multiple=True, required=True, metavar="INPUT", help="Articles to choose the epoch by."
)
@click.option(
    "--test", multiple=True, metavar="INPUT", help="Articles to measure the trained model with."
)
@click.option(
    "--base-model",
    required=True,
    metavar="NAME|DIR|JSON",
    help="GPT-2 to start from; or a config JSON, to start from scratch.",
)
@click.option(
    "--drop-leaked",
    is_flag=True,
    help="Leave out training articles that stand in --val or --test too.",
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
    help="Longest row times rows of one batch, over all processes.",
)
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Batches whose gradients make one step.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=5e-5,
    show_default=True,
    metavar="X",
    help="Its top.",
)
@click.option(
    "--schedule",
    type=click.Choice(["cosine", "linear"]),
    default="cosine",
    show_default=True,
    help="How the learning rate falls after the warm-up, to a twentieth.",
)
@click.option(
    "--warmup-share",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.1,
    show_default=True,
    metavar="X",
    help="Share of all steps in which the learning rate rises.",
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(min=0),
    default=0.01,
    show_default=True,
    metavar="X",
    help="As in AdamW; not of embeddings, norms and biases.",
)
@click.option(
    "--clip-norm",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="X",
    help="Longer gradients are scaled down to this norm.",
)
@click.option(
    "--label-smoothing",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.0,
    show_default=True,
    metavar="X",
    help="Share of the probability that goes to all labels alike.",
)
@click.option(
    "--dropout",
    type=click.FloatRange(min=0, max=1, max_open=True),
    metavar="X",
    help="In all places. [default: the model's, GPT-2's: 0.1]",
)
@click.option(
    "--class-weights",
    type=click.Choice(["none", "balanced"]),
    default="none",
    show_default=True,
    help="balanced: all labels count the same, however often they occur.",
)
@click.option(
    "--lm-weight",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="X",
    help="Weight of a language-model loss beside that of the labels.",
)
@click.option(
    "--freeze-layers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Keep the embeddings and so many lower layers as they are; 0 freezes nothing.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop after so many epochs without a lower validation loss. [default: never]",
)
@click.option(
    "--average",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.0,
    show_default=True,
    metavar="X",
    help="Keep a moving average of the weights with this decay, such as 0.999; 0: keep none.",
)
@click.option(
    "--crop-share",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.0,
    show_default=True,
    metavar="X",
    help="Share of articles that are cut at random places in an epoch.",
)
@click.option(
    "--noise-share",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.0,
    show_default=True,
    metavar="X",
    help="Share of tokens that are replaced by random ones in an epoch.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of first weights, order and noise.",
)
@options.device_option
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the matrix products. auto: bfloat16 where the device is fast at it.",
)
@click.option(
    "--gradient-checkpointing",
    is_flag=True,
    help="Compute layers again for the gradients: less memory, a third more work.",
)
@click.option(
    "--checkpoint-dir",
    metavar="DIR",
    help="Keep a training checkpoint there; the same command goes on from it.",
)
@click.option(
    "--checkpoint-steps",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    metavar="N",
    help="Write one every N steps, and after each epoch.",
)
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="How the weights are saved.",
)
@options.progress_option
@options.log_options
@options.endpoint_option
def train(
    log_format: LogFormat, labels: str | None, delimiter: str, progress: bool, **wanted: Any
) -> int:
    """Train a classifier on labelled articles and write a model directory.

    Its folder report/ holds metrics, plots and a page. With --checkpoint-dir a run that was stopped
    goes on. Several processes: torchrun --nproc-per-node N -m batchclf train ...

    \b
    batchclf train --train train.csv --val val.csv --base-model gpt2 \\
        --output model
    """
    configure(log_format)
    from dataclasses import fields

    from batchclf.train import TrainSettings
    from batchclf.train_job import TrainJob

    interrupt = stop_on_signals()
    settings = TrainSettings(
        **{field.name: wanted.pop(field.name) for field in fields(TrainSettings)}
    )
    job = TrainJob(
        settings=settings,
        labels=tuple(label.strip() for label in labels.split(",")) if labels else (),
        delimiter=options.unescape_delimiter(delimiter),
        style=choose_style(progress, log_format),
        **wanted,
    )
    metrics = job.run(interrupt)
    if metrics:
        _show(metrics, job.output, log_format)
    return EXIT_OK


def _show(metrics: "Mapping[str, Any]", output: str, log_format: LogFormat) -> None:
    if log_format == "json":
        click.echo(json.dumps({"output": output, **metrics}))
        return
    click.echo(f"best epoch {metrics['best_epoch']}")
    for name, title in (("val", "validation"), ("test", "test")):
        if f"num_{name}" in metrics:
            click.echo(
                f"{title}: accuracy {metrics[f'{name}_accuracy']:.4f}, macro-F1 "
                f"{metrics[f'{name}_macro_f1']:.4f}, loss {metrics[f'{name}_loss']:.4f}, "
                f"calibration error {metrics[f'{name}_ece']:.4f}"
            )
    click.echo(f"model   {output}")
    click.echo(f"report  {output}/report/report.html")
