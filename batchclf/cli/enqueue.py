import json
from typing import TYPE_CHECKING

import click

from batchclf.cli import options
from batchclf.cli.options import plural
from batchclf.cli.signals import stop_on_signals
from batchclf.config import CutSettings, ReadSettings
from batchclf.errors import EXIT_INPUT, EXIT_OK
from batchclf.log import LogFormat, configure, report

if TYPE_CHECKING:
    from batchclf.enqueue import EnqueueJob


@click.command(short_help="Send files to a queue, one message a shard.")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@options.queue_option
@options.text_column_option
@options.delimiter_option
@options.rows_per_shard_option
@click.option("--dry-run", is_flag=True, help="Show the shards; send nothing.")
@options.log_options
@options.endpoint_option
def enqueue(
    inputs: tuple[str, ...],
    queue: str,
    text_columns: tuple[str, ...],
    delimiter: str,
    rows_per_shard: int,
    dry_run: bool,
    log_format: LogFormat,
    endpoint_url: str | None,
) -> int:
    """Send files to a queue for `batchclf work`: one message for each shard.

    INPUT is an s3:// prefix, object or glob of .parquet, .csv, .csv.gz, .jsonl or .jsonl.gz
    files. Sending the same again does no harm: workers only delete messages of what is done.

    \b
    batchclf enqueue s3://in/2024/ \\
        --queue https://sqs.eu-west-1.amazonaws.com/1234/news
    """
    configure(log_format)
    interrupt = stop_on_signals()

    from batchclf.enqueue import EnqueueJob, Settings

    read = ReadSettings(text_columns, delimiter=options.unescape_delimiter(delimiter))
    job = EnqueueJob(Settings(inputs, queue, read, CutSettings(rows_per_shard), endpoint_url))
    num_rows = sum(shard.num_rows for shard in job.plan.shards)
    if dry_run:
        _show_plan(job)
        num_sent = 0
    else:
        num_sent = sum(job.run(interrupt))
    if log_format == "json":
        counts = {"num_sent": num_sent, "num_shards": len(job.plan.shards), "num_rows": num_rows}
        click.echo(json.dumps({"queue": queue, **counts}))
    else:
        shards = plural(len(job.plan.shards), "shard")
        verb = "would send" if dry_run else "sent"
        click.echo(f"{verb} {shards} with {plural(num_rows, 'row')} to {queue}")
    return EXIT_INPUT if job.plan.unreadable else EXIT_OK


def _show_plan(job: "EnqueueJob") -> None:
    for shard in job.plan.shards:
        click.echo(f"to send  {shard}")
    for error in job.plan.unreadable:
        report(str(error))
