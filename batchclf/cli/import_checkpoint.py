import json
from pathlib import Path

import click

from batchclf.cli import options
from batchclf.errors import EXIT_OK
from batchclf.log import LogFormat, configure


@click.command("import-checkpoint", short_help="Take over the original project's model.pth.")
@click.argument("file", metavar="FILE.pth", type=click.Path(path_type=Path))
@click.option(
    "--base-model",
    required=True,
    metavar="NAME|DIR",
    help="GPT-2 that it was tuned from, such as gpt2; only its tokenizer and config are used.",
)
@click.option(
    "--labels",
    required=True,
    metavar="A,B,C",
    help="Labels in the order of the original's label map: which is 0, which is 1, and so on.",
)
@click.option(
    "--output",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Model directory to write.",
)
@click.option("--overwrite", is_flag=True, help="Replace a model directory.")
@options.log_options
def import_checkpoint(
    file: Path, base_model: str, labels: str, output: Path, overwrite: bool, log_format: LogFormat
) -> int:
    """Turn the original project's model.pth into a model directory.

    FILE.pth is the state_dict of SimpleGPT2SequenceClassifier
    (https://github.com/haocai1992/GPT2-News-Classifier). Code in it is never run.

    The order of the labels is not in the file, and a wrong one gives wrong labels without an error:
    take it from the label map that the model was trained with, and prove it with evaluate.

    \b
    batchclf import-checkpoint model.pth --base-model gpt2 \\
        --labels A,B,C --output model
    """
    configure(log_format)
    from batchclf.import_checkpoint import import_checkpoint as run

    names = tuple(label.strip() for label in labels.split(","))
    model = run(file, base_model=base_model, labels=names, output=output, overwrite=overwrite)
    if log_format == "json":
        wrote = {
            "output": str(output),
            "labels": list(names),
            "max_length": model.config.head_length,
            "num_layers": model.config.num_layers,
            "hidden_size": model.config.hidden_size,
        }
        click.echo(json.dumps(wrote))
    else:
        click.echo(
            f"{model.config.num_layers} layers of {model.config.hidden_size}, "
            f"{model.config.head_length} tokens, {len(names)} labels"
        )
        for place, label in enumerate(names):
            click.echo(f"  {place}  {label}")
        click.echo(f"model   {output}")
    return EXIT_OK
