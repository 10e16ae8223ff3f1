import json
import sys
from typing import TYPE_CHECKING

import click

from batchclf.cli import options
from batchclf.cli.options import plural
from batchclf.cli.signals import stop_on_signals
from batchclf.config import CutSettings, ModelSettings, ReadSettings, Share
from batchclf.errors import EXIT_OK
from batchclf.log import LogFormat, configure

if TYPE_CHECKING:
    from batchclf.estimates import Estimate
    from batchclf.forecast import Forecast, WorkerTime

_BAR_COLUMNS = 48
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MOST_DIGITS = 6  # after the point
_NAME_COLUMNS = 10  # of the names on the left


@click.command(short_help="What labelling files will take, before it is paid for.")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@options.model_options
@options.read_options
@options.cut_options
@options.share_options
@click.option(
    "--sample",
    "sample_rows",
    type=click.IntRange(min=2),
    default=10_000,
    show_default=True,
    metavar="N",
    help="Rows to read, evenly spread; all of them where there are no more.",
)
@click.option(
    "--workers",
    "num_workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Machines like this one that share the job. [default: 1]",
)
@click.option(
    "--price-per-hour",
    type=click.FloatRange(min=0),
    metavar="P",
    help="Of one worker, in any currency: for the cost.",
)
@click.option(
    "--tokens-per-second",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Speed of a worker, as an earlier run reports it. [default: measured here]",
)
@options.log_options
@options.endpoint_option
def plan(
    inputs: tuple[str, ...],
    model: ModelSettings,
    read: ReadSettings,
    cut: CutSettings,
    share: Share,
    sample_rows: int,
    num_workers: int | None,
    price_per_hour: float | None,
    tokens_per_second: float | None,
    log_format: LogFormat,
    endpoint_url: str | None,
) -> int:
    """Show what labelling files will take: time, cost, and what truncation would lose.

    Reads a sample, labels nothing and writes nothing. The speed is measured on this machine, on
    articles of the sample, in about ten seconds. Options are those of classify.

    \b
    batchclf plan archive/ --model model
    batchclf plan s3://in/2024/ --model model --workers 8 --price-per-hour 1.20
    """
    configure(log_format)
    interrupt = stop_on_signals()

    from batchclf.forecast import Settings, make_forecast

    settings = Settings(
        inputs=inputs,
        model=model,
        read=read,
        cut=cut,
        share=share,
        sample_rows=sample_rows,
        num_workers=num_workers,
        price_per_hour=price_per_hour,
        tokens_per_second=tokens_per_second,
        endpoint_url=endpoint_url,
    )
    found = make_forecast(settings, interrupt)
    if log_format == "json":
        click.echo(json.dumps(found.as_dict()))
    else:
        for line in _describe(found):
            click.echo(line)
    return max((error.exit_code for error in found.unreadable), default=EXIT_OK)


def _describe(found: "Forecast") -> list[str]:
    """The plan for a terminal of 80 columns."""
    lines = _describe_input(found)
    if found.lengths.shares:
        lines += ["", *_draw_lengths(found), "", *_table_of_lengths(found), ""]
    least = "" if found.is_whole else "at least "
    repeats = f"{least}{found.repeats:.1%} of the texts repeat an earlier one"
    budget = f"in batches of at most {found.max_batch_tokens:,} tokens"
    of_all = "" if found.num_mine == found.num_planned else f" of {found.num_planned:,}"
    lines += [
        _named("repeats", repeats),
        _named("padding", f"{found.padding:.1%} of what is computed, {budget}"),
        _named("shards", f"{found.num_mine:,}{of_all}, each committed as one file when it is done"),
    ]
    if found.time is not None:
        lines += ["", *_describe_time(found, found.time)]
    return lines


def _named(name: str, text: str) -> str:
    return f"{name:{_NAME_COLUMNS}} {text}"


def _describe_input(found: "Forecast") -> list[str]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.kinds.items()))
    lines = [
        _named("input", f"{plural(found.num_files, 'file')} ({kinds})"),
        _named("", f"{plural(found.num_rows, 'row')}, {_bytes(found.num_bytes)}"),
    ]
    if found.unreadable:
        files = plural(len(found.unreadable), "file")
        lines.append(_named("unreadable", f"{files}, left out of all that follows; see above"))
    if found.is_whole:
        lines.append(_named("sample", "every row was read"))
    else:
        lines.append(
            _named(
                "sample",
                f"{found.num_sampled:,} rows from {plural(found.num_blocks, 'place')}; "
                f"{_plus_minus()} is a 95% interval",
            )
        )
    if found.error_rows:
        for code, rows in found.error_rows.items():
            lines.append(_named("no label", f"{_number(rows)} rows: {code}"))
    elif found.num_rows:
        lines.append(_named("no label", "no row: all of them have text"))
    return lines


def _draw_lengths(found: "Forecast") -> list[str]:
    lines = [f"How many tokens the texts have, {_number(found.text_tokens)} on average"]
    chosen = next(row.max_length for row in found.truncation if row.chosen)
    bounds, shares = found.lengths.bounds(), found.lengths.shares
    names = [
        f"more than {first - 1:,}" if last is None else f"{first:,} to {last:,}"
        for first, last in bounds
    ]
    width = max(map(len, names))
    for name, share, (first, last) in zip(names, shares, bounds, strict=True):
        bar = _bar(share / max(shares))
        lines.append(f"  {name:>{width}}  {bar:{_BAR_COLUMNS}} {share:6.1%}")
        if last is not None and first <= chosen <= last:
            line = "- " * (width // 2)
            lines.append(f"  {line:>{width}}  the model sees no more than {chosen:,}")
    return lines


def _table_of_lengths(found: "Forecast") -> list[str]:
    lines = ["  --max-length    texts cut short   text not seen   tokens seen of a text"]
    for row in found.truncation:
        mark = "*" if row.chosen else " "
        lines.append(
            f"  {row.max_length:>10,} {mark} {_share(row.texts):>17} {_share(row.lost):>15} "
            f"{_number(row.num_tokens):>23}"
        )
    lines.append("  * the one that this plan is for; time grows with the tokens seen")
    return lines


def _describe_time(found: "Forecast", time: "WorkerTime") -> list[str]:
    where = f", on {found.device} in {found.dtype}, measured just now" if time.is_measured else ""
    lines = [_named("speed", f"{time.tokens_per_s:,.0f} tokens/s of a worker{where}")]
    run = time.run_s
    low, high = _duration(run.low), _duration(run.high)
    spread = f" ({low} to {high})" if low != high else ""
    total_s = run.value + (time.start_s or 0.0)
    if time.num_workers > 1:
        workers = f"{plural(time.num_workers, 'worker')}; the busiest one labels"
    else:
        workers = "1 worker, which labels"
    lines.append(_named("time", f"{_duration(total_s)} with {workers}"))
    rows = f"{plural(time.num_rows, 'row')} in {plural(time.num_shards, 'shard')}"
    lines.append(_named("", f"{rows} in {_duration(run.value)}{spread}"))
    if time.start_s is not None:
        lines.append(_named("", f"after a start of {_duration(time.start_s)}"))
    if time.num_workers > 1:
        lines.append(_named("", f"worker-hours in all: {_decimal(time.worker_hours)}"))
    if time.cost is not None:
        lines.append(_named("cost", f"{_decimal(time.cost)}, in the unit of --price-per-hour"))
    return lines


def _bar(share: float) -> str:
    """A bar of `_BAR_COLUMNS` at a share of 1; anything above 0 can be seen."""
    if not _prints("█"):
        return "#" * max(round(share * _BAR_COLUMNS), 1 if share else 0)
    eighths = max(round(share * _BAR_COLUMNS * 8), 1 if share else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _prints(text: str) -> bool:
    """Whether standard output takes these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _plus_minus() -> str:
    return "±" if _prints("±") else "+-"


def _share(estimate: "Estimate") -> str:
    return f"{estimate.value:.1%}{_error(estimate, 100, 1)}"


def _number(estimate: "Estimate") -> str:
    return f"{estimate.value:,.0f}{_error(estimate, 1, 0)}"


def _decimal(estimate: "Estimate") -> str:
    """With two digits after the point, or more where the number is small."""
    digits = 2
    while digits < _MOST_DIGITS and estimate.value * 10 ** (digits - 1) < 1:
        digits += 1
    return f"{estimate.value:,.{digits}f}{_error(estimate, 1, digits)}"


def _error(estimate: "Estimate", factor: float, digits: int) -> str:
    """Half the interval, by its longer side, where that can be seen in so many digits."""
    half = max(estimate.high - estimate.value, estimate.value - estimate.low)
    shown = f"{half * factor:,.{digits}f}"
    return f" {_plus_minus()} {shown}" if shown.strip("0.") else ""


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:  # noqa: PLR2004 - what kilo means
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:  # noqa: PLR2004 - an hour
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
