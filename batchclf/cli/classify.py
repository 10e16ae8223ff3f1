import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from batchclf.cli import options
from batchclf.cli.options import plural
from batchclf.cli.signals import stop_on_signals
from batchclf.config import CutSettings, ModelSettings, PredictSettings, ReadSettings, Share
from batchclf.errors import EXIT_INPUT, EXIT_OK
from batchclf.log import LogFormat, configure, report

if TYPE_CHECKING:
    from batchclf.classify import ClassifyJob, Summary

_MOST_INPUTS = 3  # shown again in the command to verify with; a shell may have made thousands


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@options.model_options
@click.option(
    "--output", required=True, metavar="URI", help="Folder or s3:// prefix for labelled Parquet."
)
@options.read_options
@options.predict_options
@options.cut_options
@options.share_options
@click.option("--dry-run", is_flag=True, help="Show the shards and what is left to do; no writes.")
@options.progress_option
@options.log_options
@options.endpoint_option
def classify(
    inputs: tuple[str, ...],
    model: ModelSettings,
    output: str,
    read: ReadSettings,
    predict: PredictSettings,
    cut: CutSettings,
    share: Share,
    dry_run: bool,
    progress: bool,
    log_format: LogFormat,
    endpoint_url: str | None,
) -> int:
    """Label files: one output row for every input row.

    INPUT is a file, a folder, a glob or an s3:// prefix of .parquet, .csv, .csv.gz, .jsonl or
    .jsonl.gz files. The same command again goes on where it was stopped.

    \b
    batchclf classify news.csv --model model --output labelled
    batchclf classify s3://in/2024/ --model model --output s3://out/2024 \\
        --text-column title --text-column body --keep-columns url,published
    """
    configure(log_format)
    interrupt = stop_on_signals()

    from batchclf.classify import ClassifyJob, Settings
    from batchclf.progress import Progress, choose_style

    job = ClassifyJob(Settings(inputs, output, model, read, predict, cut, share, endpoint_url))
    if dry_run:
        _show_plan(job)
        return EXIT_INPUT if job.plan.unreadable else EXIT_OK
    num_rows = sum(shard.num_rows for shard in job.mine)
    with Progress(num_rows, choose_style(progress, log_format)) as shown:
        summary = job.run(interrupt, shown)
    if log_format == "json":
        where = {
            "output": job.output,
            "device": str(job.compute.device),
            "dtype": job.compute.dtype_name,
        }
        click.echo(json.dumps(where | summary.as_dict()))
    else:
        _show_summary(summary, job.output, inputs)
    return max((error.exit_code for error in summary.errors), default=EXIT_OK)


def _show_plan(job: "ClassifyJob") -> None:
    for shard in job.mine:
        state = "done" if job.is_done(shard) else "to do"
        click.echo(f"{state:5}  {shard}")
    for error in job.plan.unreadable:
        report(str(error))
    done = sum(job.is_done(shard) for shard in job.mine)
    rows = sum(shard.num_rows for shard in job.mine)
    click.echo(
        f"{len(job.mine)} of {len(job.plan.shards)} shards are this worker's: {rows:,} rows, "
        f"{done} done, {len(job.mine) - done} to do"
    )
    click.echo(f"output  {job.output}")


def _show_summary(summary: "Summary", output: str, inputs: Sequence[str]) -> None:
    counts = summary.counts
    speed = f" ({counts.num_rows / summary.seconds:,.1f} articles/s)" if counts.num_rows else ""
    click.echo(
        f"labelled {plural(counts.num_rows, 'row')} in {plural(summary.num_committed, 'shard')}, "
        f"{summary.seconds:.1f} s{speed}"
    )
    if summary.num_skipped:
        click.echo(f"done before: {plural(summary.num_skipped, 'shard')}")
    if counts.num_rows:
        width = max(len(label) for label in summary.labels)
        for label, count in summary.labels.most_common():
            click.echo(f"  {label:<{width}}  {count:>9,}")
        click.echo(
            f"abstained {counts.num_abstained:,}, failed {counts.num_failed:,}, "
            f"truncated {counts.num_truncated:,}"
        )
    if summary.errors:
        click.echo(
            f"not done: {plural(len(summary.errors), 'input or shard')}; the reasons stand above"
        )
    click.echo(f"output  {output}")
    if summary.complete:
        named = inputs if len(inputs) <= _MOST_INPUTS else ()
        click.echo(f"verify  {shlex.join(['batchclf', 'verify', output, *named])}")
