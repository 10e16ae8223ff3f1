"""The command line: options in, exit codes out. What the commands do stands elsewhere."""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from batchclf import __version__
from batchclf.config import (
    DEFAULT_ROWS_PER_SHARD,
    CutSettings,
    Keep,
    PredictSettings,
    ReadSettings,
    find_share,
)
from batchclf.errors import (
    EXIT_BUG,
    EXIT_INPUT,
    EXIT_OK,
    EXIT_TRY_AGAIN,
    EXIT_USAGE,
    BatchclfError,
)
from batchclf.log import LogFormat, configure

if TYPE_CHECKING:
    from batchclf.classify import ClassifyJob, Summary
    from batchclf.verify import Verdict

# AWS Batch and ECS send SIGKILL 30 s after SIGTERM. What is not over by then is cut off by us, for
# a tidy exit code: a commit is one atomic step, so nothing half-done can be seen.
_GRACE_S = 20.0
_MOST_PROBLEMS = 50  # shown of a broken output


def main() -> NoReturn:
    """Run the command line and leave with one of the exit codes of `batchclf.errors`."""
    sys.exit(_run())


def _run() -> int:
    try:
        result = cli.main(standalone_mode=False, auto_envvar_prefix="BATCHCLF")
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("Error: interrupted", err=True)
        return EXIT_TRY_AGAIN
    except BatchclfError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except MemoryError as error:
        click.echo(f"Error: out of memory: {error}", err=True)
        return EXIT_TRY_AGAIN
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception:  # noqa: BLE001 - the one place where a bug becomes an exit code
        traceback.print_exc()
        click.echo("Error: this is a bug in batchclf; please report the lines above", err=True)
        return EXIT_BUG
    return result if isinstance(result, int) else EXIT_OK


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchclf")
def cli() -> None:
    r"""Label a news archive with a fine-tuned GPT-2 classifier.

    Files in, labelled Parquet out, every row exactly once. Every option can also be set by an
    environment variable: BATCHCLF_CLASSIFY_MODEL for `classify --model`.

    \b
    Exit codes: 0 all done; 64 bad usage or configuration; 65 an input cannot
    be read; 70 a bug; 75 try again (interrupted, throttled, disk full).
    """


def _options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Several options as one decorator, shown in the order in which they are given."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_log_options = _options(
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Log lines on standard error as text, or one JSON object a line.",
    ),
    click.option(
        "--endpoint-url",
        metavar="URL",
        help="Another server of the S3 protocol. [default: AWS_ENDPOINT_URL, else AWS]",
    ),
)

_column_options = _options(
    click.option(
        "--text-column",
        "text_columns",
        multiple=True,
        default=("text",),
        show_default="text",
        metavar="NAME",
        help="Column with the text. Given several times, the columns are joined by a newline.",
    ),
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
    click.option(
        "--delimiter",
        default=",",
        show_default=True,
        metavar="CHAR",
        help=r"Between the fields of a CSV; '\t' is a tab.",
    ),
)

_cut_options = _options(
    click.option(
        "--rows-per-shard",
        type=click.IntRange(min=1),
        default=DEFAULT_ROWS_PER_SHARD,
        show_default=True,
        metavar="N",
        help="Rows that are committed as one file. Keep it between runs into one output.",
    ),
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows."),
    click.option(
        "--shard-index",
        type=int,
        metavar="I",
        help="This worker's share of an array, from 0. [default: AWS Batch's or Slurm's]",
    ),
    click.option("--num-shards", type=int, metavar="N", help="Number of shares."),
)

_model_options = _options(
    click.option(
        "--model",
        required=True,
        metavar="DIR",
        help="Model directory, or the hub's name of a GPT-2 sequence classifier.",
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
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="auto: bfloat16 where the device is fast at it, else float32.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda|cuda:N",
        help="auto: CUDA where there is one.",
    ),
    click.option(
        "--backend",
        type=click.Choice(["torch"]),
        default="torch",
        show_default=True,
        help="What computes.",
    ),
)

_predict_options = _options(
    click.option(
        "--min-score",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        metavar="P",
        help="Below this probability the label is null.",
    ),
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


@cli.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@_model_options
@click.option(
    "--output", required=True, metavar="URI", help="Folder or s3:// prefix for labelled Parquet."
)
@_column_options
@_predict_options
@_cut_options
@click.option("--dry-run", is_flag=True, help="Show the shards and what is left to do; no writes.")
@click.option(
    "--progress/--no-progress",
    default=True,
    help="A bar on a terminal, else lines.",
    show_default=True,
)
@_log_options
def classify(  # noqa: PLR0917 - click passes by name
    inputs: tuple[str, ...],
    model: str,
    max_length: int | None,
    max_batch_tokens: int | None,
    dtype: str,
    device: str,
    backend: str,
    output: str,
    text_columns: tuple[str, ...],
    id_column: str | None,
    keep_columns: str | None,
    delimiter: str,
    min_score: float,
    probs: bool,
    on_error: Any,
    max_error_rate: float,
    rows_per_shard: int,
    limit: int | None,
    shard_index: int | None,
    num_shards: int | None,
    dry_run: bool,
    progress: bool,
    log_format: LogFormat,
    endpoint_url: str | None,
) -> int:
    r"""Label files: one output row for every input row.

    INPUT is a file, a folder, a glob or an s3:// prefix of .parquet, .csv, .csv.gz, .jsonl or
    .jsonl.gz files. The same command again goes on where it was stopped.

    \b
    batchclf classify news.csv --model model --output labelled
    batchclf classify s3://in/2024/ --model model --output s3://out/2024 \
        --text-column title --text-column body --keep-columns url,published
    """
    configure(log_format)
    interrupt = _stop_on_signals()
    read = ReadSettings(text_columns, id_column, _parse_keep(keep_columns), _unescape(delimiter))
    share = find_share(shard_index, num_shards, os.environ)

    from batchclf.classify import ClassifyJob, Settings
    from batchclf.progress import Progress, choose_style

    job = ClassifyJob(
        Settings(
            inputs=inputs,
            model=model,
            output=output,
            read=read,
            cut=CutSettings(rows_per_shard, limit),
            predict=PredictSettings(min_score, probs, on_error, max_error_rate),
            share=share,
            max_length=max_length,
            max_batch_tokens=max_batch_tokens,
            device=device,
            dtype=dtype,
            backend=backend,
            endpoint_url=endpoint_url,
        )
    )
    if dry_run:
        _show_plan(job)
        return EXIT_INPUT if job.plan.unreadable else EXIT_OK
    num_rows = sum(shard.num_rows for shard in job.mine)
    with Progress(num_rows, choose_style(progress, log_format)) as shown:
        summary = job.run(interrupt, shown)
    if log_format == "json":
        click.echo(json.dumps({"output": job.output, **summary.as_dict()}))
    else:
        _show_summary(summary, job.output, [*inputs])
    for error in summary.errors:
        click.echo(f"Error: {error}", err=True)
    return max((error.exit_code for error in summary.errors), default=EXIT_OK)


def _parse_keep(value: str | None) -> Keep:
    if value is None:
        return "id"
    if value in ("all", "none"):
        return value  # type: ignore[return-value]
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise click.BadParameter(
            "an empty name; write A,B or all or none", param_hint="--keep-columns"
        )
    return tuple(dict.fromkeys(names))


def _unescape(delimiter: str) -> str:
    return "\t" if delimiter == r"\t" else delimiter


def _stop_on_signals() -> threading.Event:
    """SIGTERM and SIGINT set the event; a second one, or too long a wait, leaves at once."""
    interrupt = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if interrupt.is_set():
            os._exit(EXIT_TRY_AGAIN)
        interrupt.set()
        timer = threading.Timer(_GRACE_S, os._exit, [EXIT_TRY_AGAIN])
        timer.daemon = True
        timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return interrupt


def _show_plan(job: "ClassifyJob") -> None:
    for shard in job.mine:
        state = "done" if job.is_done(shard) else "to do"
        click.echo(f"{state}  {shard}")
    for error in job.plan.unreadable:
        click.echo(f"Error: {error}", err=True)
    done = sum(job.is_done(shard) for shard in job.mine)
    rows = sum(shard.num_rows for shard in job.mine)
    click.echo(
        f"{len(job.mine)} of {len(job.plan.shards)} shards are mine: {rows:,} rows, "
        f"{done} shards done, {len(job.mine) - done} to do"
    )
    click.echo(f"output  {job.output}")


def _show_summary(summary: "Summary", output: str, inputs: Sequence[str]) -> None:
    counts = summary.counts
    click.echo(
        f"labelled {counts.num_rows:,} rows in {summary.num_committed} shards, "
        f"{summary.seconds:.1f} s ({counts.num_rows / max(summary.seconds, 1e-9):,.1f} articles/s)"
    )
    if summary.num_skipped:
        click.echo(f"{summary.num_skipped} shards were done before")
    width = max((len(label) for label in summary.labels), default=0)
    for label, count in summary.labels.most_common():
        click.echo(f"  {label:<{width}}  {count:>9,}")
    click.echo(
        f"abstained {counts.num_abstained:,}, failed {counts.num_failed:,}, "
        f"truncated {counts.num_truncated:,}"
    )
    click.echo(f"output    {output}")
    if summary.complete:
        click.echo(f"complete  batchclf verify {output} {' '.join(inputs)}")


@cli.command()
@click.argument("output")
@click.argument("inputs", nargs=-1, metavar="[INPUT]...")
@_log_options
def verify(
    output: str, inputs: tuple[str, ...], log_format: LogFormat, endpoint_url: str | None
) -> int:
    """Prove an output complete and whole; exit 65 if it is not.

    OUTPUT is what classify was given as --output, or the folder fp=... in it. With the INPUTs that
    classify was given, the plan is made again from them; without, it is the one that the last
    worker wrote down.
    """
    configure(log_format)
    from batchclf.verify import verify as prove

    verdict = prove(output, inputs, endpoint_url)
    if log_format == "json":
        click.echo(json.dumps(asdict(verdict)))
    else:
        _show_verdict(verdict)
    return EXIT_INPUT if verdict.problems else EXIT_OK


def _show_verdict(verdict: "Verdict") -> None:
    for note in verdict.notes:
        click.echo(f"note: {note}")
    for problem in verdict.problems[:_MOST_PROBLEMS]:
        click.echo(problem)
    if len(verdict.problems) > _MOST_PROBLEMS:
        click.echo(f"and {len(verdict.problems) - _MOST_PROBLEMS} more")
    counts = verdict.counts
    state = f"{len(verdict.problems)} problems" if verdict.problems else "complete and whole"
    click.echo(
        f"{state}: {verdict.num_shards:,} shards, {counts.num_rows:,} rows "
        f"({counts.num_labelled:,} labelled, {counts.num_abstained:,} abstained, "
        f"{counts.num_failed:,} failed)"
    )
    click.echo(f"output  {verdict.output}")


if __name__ == "__main__":
    main()
