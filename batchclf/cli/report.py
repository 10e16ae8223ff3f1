import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from batchclf.cli import options
from batchclf.errors import EXIT_INPUT, EXIT_OK, ConfigError
from batchclf.log import LogFormat, configure

if TYPE_CHECKING:
    from batchclf.report import Report

log = logging.getLogger(__name__)

Format = Literal["html", "json", "md"]
_PAGE = "batchclf-report.html"
_STDOUT = "-"


@click.command(short_help="Show what came out, as one page.")
@click.argument("output")
@click.option(
    "--to",
    metavar="FILE",
    help="Where to write; - is standard output. [default: batchclf-report.html, else -]",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["html", "json", "md"]),
    default="html",
    show_default=True,
    help="A page, one JSON object, or Markdown.",
)
@click.option(
    "--fingerprint",
    metavar="HEX",
    help="Which output, by its first digits. [default: the newest that is complete]",
)
@click.option(
    "--date-column",
    metavar="NAME",
    help="Kept column with dates. [default: the first that looks like it]",
)
@click.option(
    "--label-column",
    metavar="NAME",
    help="Kept column with true labels. [default: the first that holds the model's]",
)
@click.option(
    "--model", metavar="DIR", help="Whose card to show. [default: the last run's, if it is there]"
)
@options.log_options
@options.endpoint_option
def report(
    output: str,
    to: str | None,
    file_format: Format,
    fingerprint: str | None,
    date_column: str | None,
    label_column: str | None,
    model: str | None,
    log_format: LogFormat,
    endpoint_url: str | None,
) -> int:
    """Show what came out, as one page that needs no network.

    OUTPUT is what classify or work was given as --output, or the folder fp=... in it. The page
    has shares of labels, scores, tokens, errors, the speed of runs and whether anything is
    missing. Where a date was kept (--keep-columns) it shows labels over time, and where true labels
    were kept, how good the predictions are. Exit code 65 if a file is torn; the others are counted.

    \b
    batchclf report labelled
    batchclf report s3://my-labels/2024 --format json
    """
    configure(log_format)
    from batchclf.report_job import make_report

    found = make_report(
        output,
        fingerprint=fingerprint,
        date_column=date_column,
        label_column=label_column,
        model=model,
        endpoint_url=endpoint_url,
    )
    content = _format(found, file_format)
    where = to or (_PAGE if file_format == "html" else _STDOUT)
    if where == _STDOUT:
        click.echo(content, nl=False)
    else:
        _write(where, content, endpoint_url)
        click.echo(f"report  {where}")
    for problem in found.problems:
        log.error("%s", problem)
    if found.problems:
        log.error("only what is whole was counted; %s tells all that is wrong", found.verify)
    return EXIT_INPUT if found.problems else EXIT_OK


def _format(report: "Report", file_format: Format) -> bytes:
    # A file name that is not UTF-8 arrives with lone surrogates, which have no bytes.
    if file_format == "json":
        return (json.dumps(report.as_dict(), ensure_ascii=False) + "\n").encode("utf-8", "replace")
    if file_format == "md":
        from batchclf.report_markdown import report_markdown

        return report_markdown(report).encode("utf-8", "replace")
    from batchclf.report_page import report_page

    return report_page(report)


def _write(where: str, content: bytes, endpoint_url: str | None) -> None:
    from batchclf.store import open_folder

    folder, slash, name = where.rpartition("/")
    if not name or Path(where).is_dir():
        raise ConfigError(f"--to {where}: is a folder; name a file in it")
    open_folder(folder + slash if slash else ".", endpoint_url).put(name, content)
