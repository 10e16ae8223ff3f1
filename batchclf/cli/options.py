"""Options that several commands share, each group turned into one of the frozen settings."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click

from batchclf.config import (
    DEFAULT_ROWS_PER_SHARD,
    Backend,
    CutSettings,
    Keep,
    ModelSettings,
    PredictSettings,
    ReadSettings,
    Share,
    find_share,
)
from batchclf.log import LogLevel, set_level

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]


def group(name: str, build: Callable[..., object], *options: Decorator[Any]) -> Decorator[Any]:
    """A decorator that adds options and passes what `build` makes of them as argument `name`.

    Args:
        name: the argument of the command.
        build: its parameters are the names of the options.
        options: shown in the order in which they are given.
    """
    own = tuple(inspect.signature(build).parameters)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            settings = build(**{option: values.pop(option) for option in own})
            return command(**{name: settings}, **values)

        decorated: Callable[..., Any] = wrapper
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def _set_log_level(_context: click.Context, _option: click.Parameter, level: LogLevel) -> None:
    set_level(level)


def log_options(command: Command) -> Command:
    """The options of the log; the level is set, and only the format passed on."""
    decorate_format = click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Log lines on standard error as text, or one JSON object a line.",
    )
    decorate_level = click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        show_default=True,
        expose_value=False,
        callback=_set_log_level,
        help="Least that is logged; debug shows texts of articles that cannot be labelled.",
    )
    return decorate_format(decorate_level(command))


progress_option = click.option(
    "--progress/--no-progress",
    default=True,
    show_default=True,
    help="A bar on a terminal, elsewhere a line every few seconds.",
)


def _is_emf(_context: click.Context, _option: click.Parameter, value: str) -> bool:
    return value == "emf"


metrics_option = click.option(
    "--metrics",
    "emf",
    type=click.Choice(["none", "emf"]),
    default="none",
    show_default=True,
    callback=_is_emf,
    help="emf: numbers for CloudWatch on standard output, every minute and at the end.",
)
endpoint_option = click.option(
    "--endpoint-url",
    metavar="URL",
    help="Another server of the S3 and SQS protocols. [default: AWS_ENDPOINT_URL, else AWS]",
)
queue_option = click.option(
    "--queue", required=True, metavar="URL", help="The queue's URL, as SQS shows it."
)
text_column_option = click.option(
    "--text-column",
    "text_columns",
    multiple=True,
    default=("text",),
    metavar="NAME",
    help="Column with the text; several are joined by a newline. [default: text]",
)
delimiter_option = click.option(
    "--delimiter",
    default=",",
    show_default=True,
    metavar="CHAR",
    help=r"Between the fields of a CSV; '\t' is a tab.",
)


rows_per_shard_option = click.option(
    "--rows-per-shard",
    type=click.IntRange(min=1),
    default=DEFAULT_ROWS_PER_SHARD,
    show_default=True,
    metavar="N",
    help="Rows that are committed as one file. Keep it between runs into one output.",
)
min_score_option = click.option(
    "--min-score",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="P",
    help="Below this probability the label is null.",
)


def plural(count: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def unescape_delimiter(delimiter: str) -> str:
    r"""The character behind `\t` as it arrives from a shell."""
    return "\t" if delimiter == r"\t" else delimiter


def _read(
    text_columns: tuple[str, ...], id_column: str | None, keep_columns: str | None, delimiter: str
) -> ReadSettings:
    return ReadSettings(
        text_columns, id_column, _parse_keep(keep_columns), unescape_delimiter(delimiter)
    )


def _parse_keep(value: str | None) -> Keep:
    if value is None:
        return "id"
    if value == "all":
        return "all"
    if value == "none":
        return "none"
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise click.BadParameter(
            "an empty name; write A,B or all or none", param_hint="--keep-columns"
        )
    return tuple(dict.fromkeys(names))


read_options = group(
    "read",
    _read,
    text_column_option,
    click.option(
        "--id-column",
        metavar="NAME",
        help="Column that names a row. [default: id, where there is one]",
    ),
    click.option(
        "--keep-columns",
        metavar="A,B|all|none",
        help="Input columns to copy to the output. [default: the id alone]",
    ),
    delimiter_option,
)


def _cut(rows_per_shard: int, limit: int | None) -> CutSettings:
    return CutSettings(rows_per_shard, limit)


cut_options = group(
    "cut",
    _cut,
    rows_per_shard_option,
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows."),
)


def _share(shard_index: int | None, num_shards: int | None) -> Share:
    return find_share(shard_index, num_shards, os.environ)


share_options = group(
    "share",
    _share,
    click.option(
        "--shard-index",
        type=int,
        metavar="I",
        help="This worker's share of an array, from 0. [default: AWS Batch's or Slurm's]",
    ),
    click.option("--num-shards", type=int, metavar="N", help="Number of shares."),
)


def _model(
    model: str,
    max_length: int | None,
    max_batch_tokens: int | None,
    dtype: str,
    device: str,
    backend: Backend,
) -> ModelSettings:
    return ModelSettings(model, max_length, max_batch_tokens, dtype, device, backend)


devices_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N|all",
    help="auto: CUDA where there is one; all: a process for each GPU of this host.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N",
    help="auto: CUDA where there is one.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8"]),
    default="auto",
    show_default=True,
    help="auto: bfloat16 where the device is fast at it, else float32; int8 where openvino has a "
    "build of the model.",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["torch", "openvino"]),
    default="torch",
    show_default=True,
    help="What computes; openvino: on CPUs, in int8 after `batchclf build`.",
)
model_options = group(
    "model",
    _model,
    click.option(
        "--model",
        required=True,
        metavar="DIR",
        help="Model directory or s3:// prefix of one, or the hub's name of a GPT-2 classifier.",
    ),
    click.option(
        "--max-length",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens of a text that the model sees. [default: the model's]",
    ),
    click.option(
        "--max-batch-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Longest row times rows of one batch. [default: by device]",
    ),
    dtype_option,
    devices_option,
    backend_option,
)


def _predict(
    min_score: float, probs: bool, on_error: Literal["keep", "fail"], max_error_rate: float
) -> PredictSettings:
    return PredictSettings(min_score, probs, on_error, max_error_rate)


predict_options = group(
    "predict",
    _predict,
    min_score_option,
    click.option(
        "--probs/--no-probs",
        default=True,
        show_default=True,
        help="Write the probability of every label.",
    ),
    click.option(
        "--on-error",
        type=click.Choice(["keep", "fail"]),
        default="keep",
        show_default=True,
        help="A row that cannot be labelled: keep it with its error, or stop.",
    ),
    click.option(
        "--max-error-rate",
        type=click.FloatRange(0, 1),
        default=1.0,
        show_default=True,
        metavar="R",
        help="Do not commit a shard in which more than this share of rows failed.",
    ),
)
