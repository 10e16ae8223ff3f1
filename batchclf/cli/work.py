import json
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from batchclf.cli import options
from batchclf.cli.options import plural
from batchclf.cli.signals import stop_on_signals
from batchclf.config import (
    DEFAULT_MAX_SOURCE_BYTES,
    CutSettings,
    ModelSettings,
    PredictSettings,
    ReadSettings,
    Share,
)
from batchclf.errors import EXIT_OK
from batchclf.log import LogFormat, configure

if TYPE_CHECKING:
    from batchclf.work import Summary, WorkJob

# Three sets are held, and all workers of a queue together may hold 120,000 messages.
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-queues.html
_MAX_GATHER_ROWS = 10_000
_MAX_VISIBILITY_S = 3600


@click.command()
@options.queue_option
@options.model_options
@click.option(
    "--output", required=True, metavar="URI", help="Folder or s3:// prefix for labelled Parquet."
)
@click.option(
    "--allow-source",
    "allowed_sources",
    multiple=True,
    metavar="S3-PREFIX",
    help="What messages may point to: s3://bucket or s3://bucket/prefix; repeatable. "
    "[default: nothing]",
)
@options.read_options
@options.predict_options
@options.rows_per_shard_option
@click.option(
    "--max-source-bytes",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_SOURCE_BYTES,
    show_default=True,
    metavar="N",
    help="Largest object that a message may point to, stored or expanded.",
)
@click.option(
    "--gather-rows",
    type=click.IntRange(1, _MAX_GATHER_ROWS),
    default=4096,
    show_default=True,
    metavar="N",
    help="Most articles that are labelled and written as one set.",
)
@click.option(
    "--gather-seconds",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    metavar="S",
    help="How long the first article of a set waits for others.",
)
@click.option(
    "--visibility-timeout",
    type=click.IntRange(2, _MAX_VISIBILITY_S),
    default=60,
    show_default=True,
    metavar="S",
    help="When messages of a dead worker come back; a living one extends it.",
)
@click.option(
    "--retry-delay",
    type=click.IntRange(0, 900),
    default=10,
    show_default=True,
    metavar="S",
    help="Until a message that failed is tried again; twice as long each time.",
)
@click.option(
    "--max-messages", type=click.IntRange(min=1), metavar="N", help="Leave after N messages."
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take no more messages once they hold N rows, and leave.",
)
@click.option(
    "--idle-exit",
    type=click.FloatRange(min=0),
    metavar="S",
    help="Leave after so many seconds without any message. [default: never]",
)
@options.share_options
@click.option(
    "--dry-run", is_flag=True, help="Check queue, model and output; receive and write nothing."
)
@options.metrics_option
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Serve the numbers to Prometheus; 0 takes a free port.",
)
@options.progress_option
@options.log_options
@options.endpoint_option
def work(
    queue: str,
    model: ModelSettings,
    output: str,
    allowed_sources: tuple[str, ...],
    read: ReadSettings,
    predict: PredictSettings,
    rows_per_shard: int,
    max_source_bytes: int,
    gather_rows: int,
    gather_seconds: float,
    visibility_timeout: int,
    retry_delay: int,
    max_messages: int | None,
    limit: int | None,
    idle_exit: float | None,
    share: Share,
    dry_run: bool,
    emf: bool,
    metrics_port: int | None,
    progress: bool,
    log_format: LogFormat,
    endpoint_url: str | None,
) -> int:
    """Label what a queue's messages hold, until told to stop.

    A message is an article as JSON, a shard from `batchclf enqueue`, or an event of S3 (also
    through SNS or EventBridge), whose objects are labelled whole. It is deleted once its rows are
    committed. What cannot be understood or read is left to the queue's redrive policy. A queue
    shares itself out: start as many workers as you like.

    \b
    batchclf work --queue https://sqs.eu-west-1.amazonaws.com/1234/news \\
        --model model --output s3://out/news --allow-source s3://in/2024/
    """
    configure(log_format)
    interrupt = stop_on_signals()

    from batchclf.metrics import Metrics
    from batchclf.work import QueueSettings, Settings, WorkJob, work_side_by_side

    asked = QueueSettings(
        url=queue,
        allowed_sources=allowed_sources,
        gather_rows=gather_rows,
        gather_s=gather_seconds,
        visibility_s=visibility_timeout,
        retry_delay_s=retry_delay,
        max_messages=max_messages,
        max_rows=limit,
        idle_exit_s=idle_exit,
    )
    job = WorkJob(
        Settings(
            asked,
            output,
            model,
            replace(read, max_source_bytes=max_source_bytes),
            predict,
            CutSettings(rows_per_shard),
            share,
            endpoint_url,
        )
    )
    if dry_run:
        _show_plan(job)
        return EXIT_OK
    worker = socket.gethostname() if share.count == 1 else f"{share.index} of {share.count}"
    with Metrics(job.queue.name, emf=emf, port=metrics_port, worker=worker) as metrics:
        if len(job.labelling.devices) == 1:
            summary = job.run(interrupt, metrics, show_health=progress)
        else:
            # of one dtype, or each would write a fingerprint of its own
            of_one_dtype = replace(model, dtype=job.labelling.compute.dtype_name)
            settings = replace(job.settings, model=of_one_dtype)
            summary = work_side_by_side(
                settings, job.labelling.devices, interrupt, metrics, show_health=progress
            )
    if log_format == "json":
        where = {"output": job.labelling.output, "queue": queue}
        click.echo(json.dumps(where | summary.as_dict()), err=emf)
    else:
        _show_summary(summary, job.labelling.output, err=emf)
    return EXIT_OK


def _show_plan(job: "WorkJob") -> None:
    depth = job.depth()
    click.echo(
        f"queue   {job.queue.url}: about {depth.waiting:,} waiting, {depth.in_flight:,} in flight, "
        f"{depth.delayed:,} delayed; {'a' if job.redrives else 'no'} redrive policy"
    )
    click.echo(f"model   {job.labelling.checkpoint.path} on {job.labelling.compute.device}")
    click.echo(f"output  {job.labelling.output}")


def _show_summary(summary: "Summary", output: str, *, err: bool) -> None:
    counts, messages = summary.counts, summary.messages
    speed = f" ({counts.num_rows / summary.seconds:,.1f} articles/s)" if counts.num_rows else ""
    shards, sets = plural(summary.num_shards, "shard"), plural(summary.num_sets, "set")
    received = plural(messages["received"], "message")
    dealt = f"{messages['refused']:,} refused, {messages['abandoned']:,} abandoned"
    rows = f"labelled {plural(counts.num_rows, 'row')} in {shards} and {sets} of articles"
    lines = [
        f"{rows}, {summary.seconds:.1f} s{speed}",
        f"{received} received, {messages['deleted']:,} deleted, {dealt}",
    ]
    if counts.num_rows:
        width = max(len(label) for label in summary.labels)
        lines += [
            f"  {label:<{width}}  {count:>9,}" for label, count in summary.labels.most_common()
        ]
        lines.append(
            f"abstained {counts.num_abstained:,}, failed {counts.num_failed:,}, "
            f"truncated {counts.num_truncated:,}"
        )
    click.echo("\n".join([*lines, f"output  {output}"]), err=err)
