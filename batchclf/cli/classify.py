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
@options.metrics_option
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
    emf: bool,
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
    from batchclf.metrics import COMMAND, CountingListener, Metrics
    from batchclf.progress import Progress, choose_style

    job = ClassifyJob(Settings(inputs, output, model, read, predict, cut, share, endpoint_url))
    if dry_run:
        _show_plan(job)
        return EXIT_INPUT if job.plan.unreadable else EXIT_OK
    num_rows = sum(shard.num_rows for shard in job.mine)
    worker = f"{share.index} of {share.count}"
    with (
        Metrics("classify", emf=emf, worker=worker, subject=COMMAND) as metrics,
        Progress(num_rows, choose_style(progress, log_format)) as shown,
    ):
        try:
            summary = job.run(interrupt, CountingListener(shown, metrics))
        finally:  # what was committed before a stop is not told by the next run
            metrics.count("failed", job.summary.counts.num_failed)
            metrics.count("undone", len(job.summary.errors))
            metrics.gauge("articles_per_s", job.summary.articles_per_s)
    if log_format == "json":
        where = {
            "output": job.output,
            "device": str(job.compute.device),
            "dtype": job.compute.dtype_name,
        }
        click.echo(json.dumps(where | summary.as_dict()), err=emf)
    else:
        click.echo("\n".join(_describe(summary, job.output, inputs)), err=emf)
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


def _describe(summary: "Summary", output: str, inputs: Sequence[str]) -> list[str]:
    """What was done, for a terminal."""
    counts = summary.counts
    speed = f" ({summary.articles_per_s:,.1f} articles/s)" if counts.num_rows else ""
    shards = plural(summary.num_committed, "shard")
    rows = plural(counts.num_rows, "row")
    lines = [f"labelled {rows} in {shards}, {summary.seconds:.1f} s{speed}"]
    if summary.num_skipped:
        lines.append(f"done before: {plural(summary.num_skipped, 'shard')}")
    if counts.num_rows:
        width = max(len(label) for label in summary.labels)
        lines += [
            f"  {label:<{width}}  {count:>9,}" for label, count in summary.labels.most_common()
        ]
        lines.append(
            f"abstained {counts.num_abstained:,}, failed {counts.num_failed:,}, "
            f"truncated {counts.num_truncated:,}"
        )
    if summary.errors:
        lines.append(
            f"not done: {plural(len(summary.errors), 'input or shard')}; the reasons stand above"
        )
    lines.append(f"output  {output}")
    if summary.complete:
        named = inputs if len(inputs) <= _MOST_INPUTS else ()
        lines.append(f"verify  {shlex.join(['batchclf', 'verify', output, *named])}")
    return lines
