"""Sentences and figures that a report's page and its Markdown share."""

from batchclf.evaluation import shorten
from batchclf.report import Report, TruthReport

_MOST_LABEL = 60  # characters
_MOST_ERROR = 200
_MOST_UNKNOWN = 10


def title(report: Report) -> str:
    """Of the report."""
    return f"Labels of {count_of(report.counts.num_rows, 'article')}"


def subtitle(report: Report) -> str:
    """Where they are, when they came to be, and by what."""
    words = [report.output]
    if report.finished is not None:
        first, last = (_minute(time) for time in report.finished)
        words.append(first if first == last else f"{first} to {last}")
    if report.runs.latest is not None:
        words.append(f"model {report.runs.latest.model}")
    if report.versions:
        words.append(f"batchclf {', '.join(report.versions)}")
    return " · ".join(words)


def plan_sentence(report: Report) -> str:
    """Whether everything is there, as far as a report can tell."""
    plan = report.plan
    outputs = count_of(report.num_outputs, "output")
    broken = ""
    if report.problems:
        broken = f" {count_of(len(report.problems), 'problem')} found; verify tells all of them."
    if plan.complete is None:
        return f"{outputs} from a queue, which no plan counts.{broken}"
    if plan.num_planned is None:
        return (
            f"Not known to be complete: {outputs}, and no run left a note. Run the job again."
            f"{broken}"
        )
    planned = count_of(plan.num_planned, "planned shard")
    if plan.complete:
        return f"Complete: {plan.num_there:,} of {planned}, as {plan.told_by} has them.{broken}"
    if plan.num_missing:
        return (
            f"Not complete: {plan.num_there:,} of {planned} are whole, {plan.num_missing:,} are "
            f"missing or broken. Run the job again.{broken}"
        )
    errors = report.runs.latest.errors if report.runs.latest else ()
    if errors:
        more = f", and {len(errors) - 1:,} more" if len(errors) > 1 else ""
        return (
            f"Not complete: {outputs} of {planned}, and the last run could not do all: "
            f"{shorten(errors[0], _MOST_ERROR).rstrip('.')}{more}. Mend that and run the job again."
            f"{broken}"
        )
    return (
        f"Not known to be complete: {outputs} of {planned}, and no run has seen every shard done. "
        f"Run the job again.{broken}"
    )


def is_well(report: Report) -> bool:
    """Whether nothing is known to be missing or broken."""
    return report.plan.complete is not False and not report.problems


def truth_notes(truth: TruthReport) -> list[str]:
    """What was held against what, and what was left out."""
    column = shorten(truth.column, _MOST_LABEL)
    notes = [f"True labels are from the kept column {column}."]
    if truth.num_missing:
        notes.append(f"{count_of(truth.num_missing, 'row')} without a true label left out.")
    if truth.num_unlabelled:
        notes.append(
            f"{count_of(truth.num_unlabelled, 'row')} that failed or abstained left out, so that "
            "accuracy is of the rows that got a label."
        )
    if truth.unknown:
        named = ", ".join(
            f"{shorten(label, _MOST_LABEL)} ({number:,})"
            for label, number in list(truth.unknown.items())[:_MOST_UNKNOWN]
        )
        notes.append(
            f"{count_of(sum(truth.unknown.values()), 'row')} with a true label that the model does "
            f"not have left out: {named}"
        )
    return notes


def count_of(count: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def share_of(part: int, whole: int) -> str:
    """As a percentage; a little is never shown as nothing, nor nearly all as all."""
    share = part / whole if whole else 0.0
    shown = f"{share:.1%}"
    if part and shown == "0.0%":
        return "<0.1%"
    if part < whole and shown == "100.0%":
        return ">99.9%"
    return shown


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")
