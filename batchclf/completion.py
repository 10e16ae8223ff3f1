"""How to complete an output that is not whole: shell commands for a person to read and run.

What is broken is removed, then the command that wrote the output runs again with the settings that
its run left in `_runs/`. It skips what is whole, so it only does what is missing.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchclf.config import (
    DEFAULT_MAX_SOURCE_BYTES,
    DEFAULT_ROWS_PER_SHARD,
    PredictSettings,
    ReadSettings,
)
from batchclf.messages import ARTICLES
from batchclf.notes import RUNS, SUCCESS_NAME, read_note
from batchclf.shards import source_digest, source_of_name
from batchclf.sink import Footer
from batchclf.store import Folder, Source

_MOST_NOTES = 200  # of the latest runs that are looked at for one of the plan
_IDLE_EXIT_S = 60

_Note = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What `verify` found.

    Attributes:
        broken: names of outputs to remove.
        undecided: names of outputs whose rows stand twice, where no plan says which should go.
        planned: names of all shards of the plan, where it is known.
        whole: the footers of outputs that are whole.
    """

    broken: tuple[str, ...]
    undecided: set[str]
    planned: frozenset[str]
    whole: Sequence[Footer]


def commands(
    folder: Folder, found: Found, inputs: Sequence[str], endpoint_url: str | None
) -> list[str]:
    """Shell commands in the order to run them in, and comments where a person has to decide.

    Args:
        folder: `fp=...`.
        found: what is wrong with it.
        inputs: what it should hold, if that was said; else what its run was given.
        endpoint_url: another server of the S3 protocol.
    """
    lines = [_removal(f"{folder.uri}/{name}", endpoint_url) for name in sorted(found.broken)]
    undecided = sorted(found.undecided - set(found.broken))
    if undecided:
        lines.append("# rows stand twice; name the inputs to learn which of these should go:")
        lines += [f"#   {shlex.quote(f'{folder.uri}/{name}')}" for name in undecided]
    notes = _notes(folder, found)
    if not notes:
        lines.append("# no run left its settings here: run the command that wrote it again")
    for note in notes:
        if "queue" in note["settings"]:
            lines += _queue_commands(folder, note, found, inputs, endpoint_url)
        else:
            lines.append(_classify_command(folder, note, inputs, endpoint_url))
    return list(dict.fromkeys(lines))


def _removal(uri: str, endpoint_url: str | None) -> str:
    if uri.startswith("s3://"):
        return shlex.join(["aws", "s3", "rm", uri, *_endpoint(endpoint_url)])
    return shlex.join(["rm", "--", uri])


def _notes(folder: Folder, found: Found) -> list[_Note]:
    """The runs whose commands complete the output, the latest first.

    One of the plan in `_SUCCESS.json`, else the latest. Where something else than shards of the
    plan is broken, a run of every other plan as well.
    """
    success = read_note(folder, SUCCESS_NAME)
    wanted = success.get("plan") if success else None
    names = sorted(folder.sizes(RUNS), reverse=True)[:_MOST_NOTES]
    read = (note for name in names if (note := read_note(folder, name)) is not None)
    by_plan: dict[object, _Note] = {}
    is_plan_enough = found.planned.issuperset(found.broken)
    for note in read:
        by_plan.setdefault(note.get("plan"), note)
        if is_plan_enough and wanted in (None, note.get("plan")):
            return [note]
    if is_plan_enough:
        return list(by_plan.values())[:1]
    return list(by_plan.values())


def _classify_command(
    folder: Folder, note: _Note, inputs: Sequence[str], endpoint_url: str | None
) -> str:
    settings = note["settings"]
    given = inputs or [_absolute(name, note) for name in settings["inputs"]]
    limit = settings["cut"]["limit"]
    return shlex.join(
        [
            *("batchclf", "classify", *given),
            *_labelling(folder, note),
            *_option("--limit", limit, None),
            *_endpoint(endpoint_url),
        ]
    )


def _queue_commands(
    folder: Folder,
    note: _Note,
    found: Found,
    inputs: Sequence[str],
    endpoint_url: str | None,
) -> list[str]:
    """Shards are sent again; of articles, which left the queue for good, nothing can be."""
    settings = note["settings"]
    queue, read, cut = settings["queue"], settings["read"], settings["cut"]
    lines = []
    sources = list(inputs)
    if not sources:
        by_digest = {
            source_digest(Source(footer.source, footer.source_version, 0)): footer.source
            for footer in found.whole
            if not footer.source.startswith(ARTICLES)
        }
        for name in found.broken:
            source = by_digest.get(source_of_name(name) or "")
            if source is None:
                lines.append(
                    f"# {' '.join(name.splitlines())}: it is not known what it was made of. Name "
                    "the INPUTs; if its rows were articles from the queue, send them again"
                )
            elif source not in sources:
                sources.append(source)
    if sources:
        enqueue = [
            *("batchclf", "enqueue", *sources, "--queue", queue["url"]),
            *_text_columns(read),
            *_delimiter(read),
            *_option("--rows-per-shard", cut["rows_per_shard"], DEFAULT_ROWS_PER_SHARD),
            *_endpoint(endpoint_url),
        ]
        lines.append(shlex.join(enqueue))
    allowed = [word for uri in queue["allowed_sources"] for word in ("--allow-source", uri)]
    size = read.get("max_source_bytes") or DEFAULT_MAX_SOURCE_BYTES
    work = [
        *("batchclf", "work", "--queue", queue["url"]),
        *_labelling(folder, note),
        *allowed,
        *_option("--max-source-bytes", size, DEFAULT_MAX_SOURCE_BYTES),
        *("--idle-exit", str(_IDLE_EXIT_S)),
        *_endpoint(endpoint_url),
    ]
    return [*lines, shlex.join(work)]


def _labelling(folder: Folder, note: _Note) -> list[str]:
    """The options that `classify` and `work` share; those at their defaults are left out.

    The dtype is the one that was used: `auto` may be another one on this machine, and so would the
    fingerprint be.
    """
    settings = note["settings"]
    model, read, predict = settings["model"], settings["read"], settings["predict"]
    cut = settings["cut"]
    output = folder.uri.rpartition("/")[0] or "."
    keep = read["keep"] if isinstance(read["keep"], str) else ",".join(read["keep"])
    default = PredictSettings()
    return [
        *("--model", _model(note), "--output", output),
        *_option("--max-length", model["max_length"], None),
        *_option("--max-batch-tokens", model["max_batch_tokens"], None),
        *("--dtype", note["dtype"]),
        *_option("--device", model["device"], "auto"),
        *_option("--backend", model["backend"], "torch"),
        *_text_columns(read),
        *_option("--id-column", read["id_column"], None),
        *_option("--keep-columns", keep, "id"),
        *_delimiter(read),
        *_option("--min-score", predict["min_score"], default.min_score),
        *(() if predict["probs"] else ("--no-probs",)),
        *_option("--on-error", predict["on_error"], default.on_error),
        *_option("--max-error-rate", predict["max_error_rate"], default.max_error_rate),
        *_option("--rows-per-shard", cut["rows_per_shard"], DEFAULT_ROWS_PER_SHARD),
    ]


def _option(name: str, value: object, default: object) -> Iterable[str]:
    return () if value == default or value is None else (name, str(value))


def _text_columns(read: Mapping[str, Any]) -> list[str]:
    names = tuple(read["text_columns"])
    if names == ReadSettings().text_columns:
        return []
    return [word for name in names for word in ("--text-column", name)]


def _delimiter(read: Mapping[str, Any]) -> Iterable[str]:
    written = r"\t" if read["delimiter"] == "\t" else read["delimiter"]
    return _option("--delimiter", written, ReadSettings().delimiter)


def _endpoint(endpoint_url: str | None) -> Iterable[str]:
    return _option("--endpoint-url", endpoint_url, None)


def _absolute(name: str, note: _Note) -> str:
    """A local path as it is from anywhere, where the run says where it was started."""
    if "://" in name or "directory" not in note:
        return name
    return str(Path(note["directory"]) / name)


def _model(note: _Note) -> str:
    given = str(note["settings"]["model"]["model"])
    here = _absolute(given, note)
    return here if Path(here).is_dir() else given  # else a name on the hub
