import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from batchclf.cli import options
from batchclf.cli.options import plural
from batchclf.errors import EXIT_INPUT, EXIT_OK
from batchclf.log import LogFormat, configure

if TYPE_CHECKING:
    from batchclf.verify import Verdict

_MOST_PROBLEMS = 50  # shown of a broken output


@click.command(short_help="Prove an output complete and whole.")
@click.argument("output")
@click.argument("inputs", nargs=-1, metavar="[INPUT]...")
@click.option(
    "--fix",
    is_flag=True,
    help="Print the commands that complete the output, as a shell script; nothing is run.",
)
@options.log_options
@options.endpoint_option
def verify(
    output: str,
    inputs: tuple[str, ...],
    fix: bool,
    log_format: LogFormat,
    endpoint_url: str | None,
) -> int:
    """Prove an output complete and whole; exit 65 if it is not.

    OUTPUT is what classify was given as --output, or the folder fp=... in it. With the INPUTs that
    classify was given, the plan is made again from them; without, it is the one that the last
    worker wrote down.

    With --fix, what is wrong stands in comments, and below it how to make it right. Read it, then
    run it with sh.

    \b
    batchclf verify labelled --fix > fix.sh
    """
    configure(log_format)
    from batchclf.verify import verify as prove

    verdict = prove(output, inputs, endpoint_url, fix=fix)
    if log_format == "json":
        click.echo(json.dumps(asdict(verdict)))
    elif fix:
        _show_fix(verdict)
    else:
        _show(verdict)
    return EXIT_INPUT if verdict.problems else EXIT_OK


def _show_fix(verdict: "Verdict") -> None:
    """A script: all that is not a command is a comment."""
    for problem in verdict.problems:
        # names of files may hold anything, but a comment ends with its line
        click.echo(f"# {' '.join(problem.splitlines())}")
    if not verdict.problems:
        click.echo("# complete and whole: nothing to do")
    for command in verdict.fix:
        click.echo(command)


def _show(verdict: "Verdict") -> None:
    for note in verdict.notes:
        click.echo(f"note: {note}")
    for problem in verdict.problems[:_MOST_PROBLEMS]:
        click.echo(problem)
    if len(verdict.problems) > _MOST_PROBLEMS:
        click.echo(f"and {len(verdict.problems) - _MOST_PROBLEMS} more")
    counts = verdict.counts
    state = "complete and whole"
    if num_problems := len(verdict.problems):
        state = plural(num_problems, "problem")
    click.echo(
        f"{state}: {plural(verdict.num_shards, 'shard')}, {plural(counts.num_rows, 'row')} "
        f"({counts.num_labelled:,} labelled, {counts.num_abstained:,} abstained, "
        f"{counts.num_failed:,} failed)"
    )
    click.echo(f"output  {verdict.output}")
