#!/usr/bin/env python3
"""Plan a job and submit as many workers to AWS Batch as its shards are worth; nothing is uploaded.

AWS Batch tells each worker of an array its index and the array's size, by which `classify` takes
its run of neighbouring shards. So nothing more has to be passed on.
https://docs.aws.amazon.com/batch/latest/userguide/job_env_vars.html
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import boto3
import click
from botocore.exceptions import BotoCoreError, ClientError
from click.core import ParameterSource

from batchclf.cli import options
from batchclf.cli.options import plural
from batchclf.config import CutSettings, ReadSettings
from batchclf.errors import EXIT_INPUT, EXIT_OK, EXIT_USAGE, BatchclfError, ConfigError
from batchclf.log import report
from batchclf.planning import Plan, make_plan

# https://docs.aws.amazon.com/batch/latest/userguide/service_limits.html
LEAST_ARRAY_SIZE = 2
MOST_ARRAY_SIZE = 10_000
MOST_REQUEST_BYTES = 30 << 10

_VARIABLE = "BATCHCLF_CLASSIFY_"
_OWN_OPTIONS = {"definition", "max_workers", "dry_run"}  # the others are those of classify


def _read_job_definition(context: click.Context, _: click.Parameter, stack: str) -> dict[str, Any]:
    """The newest job definition of the stack, whose settings become the defaults here."""
    with _batch_errors():
        pages = (
            boto3.client("batch")
            .get_paginator("describe_job_definitions")
            .paginate(jobDefinitionName=stack, status="ACTIVE")
        )
        revisions = [found for page in pages for found in page["jobDefinitions"]]
    if not revisions:
        raise ConfigError(
            f"there is no active job definition {stack!r} in this region; deploy template.yaml, or "
            "name its stack with --stack"
        )
    newest: dict[str, Any] = max(revisions, key=lambda found: int(found["revision"]))
    container = newest["containerProperties"]
    context.default_map = {
        **_defaults(context.command, container.get("environment", [])),
        "inputs": [word for word in container.get("command", []) if word.startswith("s3://")],
    }
    return newest


def _defaults(command: click.Command, environment: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What the variables of the workers make of our options, as `classify` reads them."""
    variables = {variable["name"]: variable["value"] for variable in environment}
    found: dict[str, Any] = {}
    for option in _worker_options(command):
        written = option.opts[0].removeprefix("--").replace("-", "_").upper()
        if value := variables.get(_VARIABLE + written):
            found[str(option.name)] = value.split() if option.multiple else value
    return found


def _worker_options(command: click.Command) -> list[click.Option]:
    return [
        option
        for option in command.params
        if isinstance(option, click.Option) and option.name not in _OWN_OPTIONS
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("inputs", nargs=-1, required=True, metavar="[INPUT]...")
@click.option(
    "--stack",
    "definition",
    default="batchclf",
    show_default=True,
    is_eager=True,
    callback=_read_job_definition,
    metavar="NAME",
    help="The stack of template.yaml; its queue and job definition have its name.",
)
@click.option(
    "--max-workers",
    type=click.IntRange(min=1, max=MOST_ARRAY_SIZE),
    default=100,
    show_default=True,
    metavar="N",
    help="Most workers, though never more than there are shards.",
)
@click.option("--output", metavar="URI", help="s3:// prefix for labelled Parquet.")
@options.read_options
@options.cut_options
@click.option("--dry-run", is_flag=True, help="Print the request as JSON; submit nothing.")
@click.pass_context
def submit(
    context: click.Context,
    inputs: tuple[str, ...],
    definition: Mapping[str, Any],
    max_workers: int,
    output: str | None,  # noqa: ARG001 - the workers look at it
    read: ReadSettings,
    cut: CutSettings,
    dry_run: bool,
) -> int:
    """Label INPUT, s3:// prefixes or globs, on AWS Batch; by default what runs every night.

    What is not given here is as in the job definition of the stack.

    \b
    submit.py --dry-run
    submit.py s3://my-archive/2024/ --max-workers 16
    """  # noqa: D301 - click wants a real backspace where a paragraph keeps its lines
    local = [uri for uri in inputs if not uri.startswith("s3://")]
    if local:
        raise ConfigError(f"{local[0]}: workers in the cloud cannot read it; put it on S3")
    plan = make_plan(inputs, read, cut)
    for error in plan.unreadable:
        report(str(error))
    num_workers = min(len(plan.shards), max_workers)
    _show(plan, num_workers)
    if not num_workers:
        return EXIT_INPUT
    request = make_request(definition, ["classify", *inputs, *_given(context)], num_workers)
    if dry_run:
        click.echo(json.dumps(request, indent=2))
    elif plan.unreadable:
        raise ConfigError("nothing was submitted; mend these inputs, or name only the others")
    else:
        with _batch_errors():
            job_id = boto3.client("batch").submit_job(**request)["jobId"]
        click.echo(f"submitted {job_id}")
    return EXIT_INPUT if plan.unreadable else EXIT_OK


def make_request(
    definition: Mapping[str, Any], command: Sequence[str], num_workers: int
) -> dict[str, Any]:
    """The parameters of SubmitJob: an array of `num_workers`, or a plain job for one alone.

    Raises:
        ConfigError: it would be larger than AWS Batch takes.
    """
    name = definition["jobDefinitionName"]
    request: dict[str, Any] = {
        "jobName": name,
        "jobQueue": name,
        "jobDefinition": definition["jobDefinitionArn"],
        "containerOverrides": {"command": list(command)},
    }
    if num_workers >= LEAST_ARRAY_SIZE:
        request["arrayProperties"] = {"size": num_workers}
    num_bytes = len(json.dumps(request).encode())
    if num_bytes > MOST_REQUEST_BYTES:
        raise ConfigError(
            f"the request has {num_bytes:,} bytes, and AWS Batch takes {MOST_REQUEST_BYTES:,}; "
            "name a prefix or a glob in place of so many inputs"
        )
    return request


def _given(context: click.Context) -> list[str]:
    """The options of `classify` that stood on our command line, as words for the workers."""
    words = []
    for option in _worker_options(context.command):
        name = str(option.name)
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            value = context.params[name]
            for each in value if option.multiple else [value]:
                words += [option.opts[0], str(each)]
    return words


def _show(plan: Plan, num_workers: int) -> None:
    num_rows = sum(shard.num_rows for shard in plan.shards)
    click.echo(
        f"{plural(len(plan.sources), 'file')}, {plural(num_rows, 'row')}, "
        f"{plural(len(plan.shards), 'shard')}: {plural(num_workers, 'worker')}",
        err=True,
    )


@contextmanager
def _batch_errors() -> Iterator[None]:
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise ConfigError(f"AWS Batch: {error}") from error


def main() -> NoReturn:
    """Run the command line and leave with one of the exit codes of `batchclf`."""
    try:
        sys.exit(submit.main(standalone_mode=False))
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except BatchclfError as error:
        report(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
