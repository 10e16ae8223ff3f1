"""Proof that an output is complete and whole."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batchclf.completion import Found, commands
from batchclf.config import CutSettings, ReadSettings
from batchclf.errors import DamagedError, OutputError
from batchclf.messages import ARTICLES, MESSAGE_ID
from batchclf.notes import RUNS, SUCCESS_NAME, read_note
from batchclf.planning import make_plan
from batchclf.schema import prediction_fields
from batchclf.shards import Shard
from batchclf.sink import Counts, Footer, check_seal
from batchclf.store import Folder, hidden, open_folder

_THREADS = 4
_READ = ["row", "label", "n_tokens", "truncated", "error"]
_FOLDER = "fp="


@dataclass
class Verdict:
    """What was found under one fingerprint.

    Attributes:
        num_shards: outputs that are whole.
        counts: rows in them.
        num_repeats: of these rows, those of a message that an earlier row is of as well.
        problems: one sentence each; none means complete and whole.
        broken: names of outputs that are worth nothing: damaged, not ours, or of rows that stand
            elsewhere too.
        fix: shell commands, in order, that complete the output; only where they were asked for.
        notes: what is no problem, but worth knowing.
    """

    output: str
    num_shards: int = 0
    counts: Counts = field(default_factory=Counts)
    num_repeats: int = 0
    problems: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fix: list[str] = field(default_factory=list)


def verify(
    output: str,
    inputs: Sequence[str] = (),
    endpoint_url: str | None = None,
    *,
    fix: bool = False,
) -> Verdict:
    """Read an output to its last byte and hold it against its plan.

    The plan is made again from `inputs`, with the settings of the run that wrote the output;
    without inputs it is the one in `_SUCCESS.json`.

    Args:
        output: what `classify --output` was given, or the folder `fp=...` in it.
        inputs: what `classify` was given.
        endpoint_url: another server of the S3 protocol.
        fix: say how to complete it. Nothing is done.

    Raises:
        OutputError: there is no output, or several fingerprints are mixed under it.
        InputError: an input argument matches nothing.
    """
    folder = open_folder(output, endpoint_url)
    folder = _enter_fingerprint(folder, endpoint_url)
    verdict = Verdict(folder.uri)
    names = sorted(name for name in folder.sizes("") if not hidden(name))
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = pool.map(lambda name: _check(folder, name), names)
        footers: dict[str, Footer] = {}
        messages: list[npt.NDArray[np.int64]] = []
        for name, found in zip(names, checked, strict=True):
            if isinstance(found, _Whole):
                footers[name] = found.footer
                messages += found.messages
                verdict.num_shards += 1
                verdict.counts += found.footer.counts
            else:
                verdict.problems.append(str(found))
                verdict.broken.append(name)
    expected_fingerprint = folder.uri.rsplit(_FOLDER, 1)[-1]
    for name, footer in footers.items():
        if footer.fingerprint != expected_fingerprint:
            verdict.problems.append(f"{name}: was written under fingerprint {footer.fingerprint}")
            verdict.broken.append(name)
    twice = _check_overlaps(footers, verdict)
    _count_repeats(messages, verdict)
    planned = _check_plan(folder, names, footers, inputs, endpoint_url, verdict)
    verdict.broken += sorted(twice - planned) if planned else ()
    if fix and verdict.problems:
        wrong = Found(tuple(verdict.broken), twice - planned, planned, list(footers.values()))
        verdict.fix = commands(folder, wrong, inputs, endpoint_url)
    return verdict


def _enter_fingerprint(folder: Folder, endpoint_url: str | None) -> Folder:
    if folder.uri.rsplit("/", 1)[-1].startswith(_FOLDER):
        return folder
    found = sorted({name.split("/")[0] for name in folder.sizes(_FOLDER) if "/" in name})
    if not found:
        raise OutputError(f"{folder.uri}: holds no output of batchclf, no folder {_FOLDER}...")
    if len(found) > 1:
        listed = "\n  ".join(f"{folder.uri}/{name}" for name in found)
        raise OutputError(
            f"{folder.uri}: holds the outputs of {len(found)} fingerprints, and who reads the "
            f"whole folder mixes them. Verify and read one of\n  {listed}"
        )
    return open_folder(f"{folder.uri}/{found[0]}", endpoint_url)


@dataclass(frozen=True)
class _Whole:
    """An output that is whole.

    Attributes:
        messages: where its rows are articles from a queue, a hash of each one's message id.
    """

    footer: Footer
    messages: list[npt.NDArray[np.int64]]


def _check(folder: Folder, name: str) -> _Whole | OutputError:
    """Read one output whole; its bytes must be those that were written, and what it says true.

    Once the seal holds, columns kept from the input are as they were written; they are not decoded.
    """
    try:
        file = folder.open(name, whole=True)
    except DamagedError as error:
        return OutputError(f"{name}: damaged: {error}")
    if file is None:
        return OutputError(f"{name}: gone while it was verified")
    with file:
        try:
            footer = Footer.read(file, name)
            check_seal(file, name)
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            _check_columns(parquet.schema_arrow, name)
            columns = [*_READ, MESSAGE_ID] if _is_of_articles(footer) else _READ
            counts = Counts()
            messages = []
            for batch in parquet.iter_batches(columns=columns):
                first = footer.start + counts.num_rows
                if not np.array_equal(
                    batch.column("row"), np.arange(first, first + batch.num_rows)
                ):
                    return OutputError(f"{name}: its rows are not {footer.start} to {footer.stop}")
                counts += _count(batch)
                if _is_of_articles(footer):
                    ids = batch.column(MESSAGE_ID).to_pylist()
                    messages.append(np.fromiter(map(hash, ids), np.int64, len(ids)))
        except OutputError as error:
            return error
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            return OutputError(f"{name}: torn: {error}")
    if counts != footer.counts:
        return OutputError(f"{name}: holds {counts}, but its footer says {footer.counts}")
    return _Whole(footer, messages)


def _is_of_articles(footer: Footer) -> bool:
    """Whether its rows came from a queue one by one, and not from a file."""
    return footer.source.startswith(ARTICLES)


def _count_repeats(messages: list[npt.NDArray[np.int64]], verdict: Verdict) -> None:
    """A queue may deliver a message again, and its rows are then equal but for receive_count."""
    every = np.concatenate(messages) if messages else np.array([], np.int64)
    verdict.num_repeats = len(every) - len(np.unique(every))
    if verdict.num_repeats:
        verdict.notes.append(
            f"{verdict.num_repeats:,} rows are of messages that were delivered again; "
            f"keep the first row of each {MESSAGE_ID}"
        )


def _check_columns(schema: pa.Schema, name: str) -> None:
    probs = "probs" in schema.names
    labels = [field.name for field in schema.field("probs").type] if probs else []
    ours = prediction_fields(labels, probs=probs)
    if list(schema)[-len(ours) :] != ours:
        raise OutputError(f"{name}: its columns are not those that batchclf writes")


def _count(batch: pa.RecordBatch) -> Counts:
    num_failed = batch.num_rows - batch.column("error").null_count
    num_labelled = batch.num_rows - batch.column("label").null_count
    return Counts(
        num_rows=batch.num_rows,
        num_labelled=num_labelled,
        num_abstained=batch.num_rows - num_labelled - num_failed,
        num_failed=num_failed,
        num_truncated=batch.column("truncated").sum().as_py() or 0,
        num_tokens=batch.column("n_tokens").sum().as_py() or 0,
    )


def _check_overlaps(footers: Mapping[str, Footer], verdict: Verdict) -> set[str]:
    """Whether rows stand twice; returns the names of all outputs concerned."""
    by_source: dict[tuple[str, str], list[tuple[Footer, str]]] = {}
    versions: dict[str, set[str]] = {}
    for name, footer in footers.items():
        by_source.setdefault((footer.source, footer.source_version), []).append((footer, name))
        if not _is_of_articles(footer):  # one set of them is no version of another
            versions.setdefault(footer.source, set()).add(footer.source_version)
    concerned = set()
    for (source, _), found in by_source.items():
        found.sort(key=lambda pair: (pair[0].start, pair[0].stop))
        for (before, first), (after, second) in pairwise(found):
            if after.start < before.stop:
                verdict.problems.append(
                    f"{source}: rows {after.start} to {min(before.stop, after.stop)} stand twice"
                )
                concerned |= {first, second}
    for source, known in versions.items():
        if len(known) > 1:
            verdict.problems.append(
                f"{source}: was replaced, and outputs of {len(known)} versions of it are here"
            )
            concerned |= {name for name, footer in footers.items() if footer.source == source}
    return concerned


def _check_plan(
    folder: Folder,
    names: Sequence[str],
    footers: Mapping[str, Footer],
    inputs: Sequence[str],
    endpoint_url: str | None,
    verdict: Verdict,
) -> frozenset[str]:
    """Every planned shard must be there. What else is there is told.

    Returns:
        The names of all planned shards, where a plan is known.
    """
    of_articles = {name for name, footer in footers.items() if _is_of_articles(footer)}
    if of_articles:
        verdict.notes.append(
            f"{len(of_articles):,} outputs are of articles from a queue, which no plan counts"
        )
    success = read_note(folder, SUCCESS_NAME)
    if inputs:
        note = success or _latest_run(folder)
        if note is None:
            verdict.problems.append("no run left its settings here, so the plan is unknown")
            return frozenset()
        plan = make_plan(inputs, *_plan_settings(note), endpoint_url)
        verdict.problems.extend(f"unreadable input: {error}" for error in plan.unreadable)
        missing = _missing(plan.shards, names, footers)
        verdict.problems.extend(f"missing: {shard}" for shard in missing)
        planned_sources = {(shard.source.uri, shard.source.version) for shard in plan.shards}
        extra = sum(
            (footer.source, footer.source_version) not in planned_sources
            for name, footer in footers.items()
            if name not in of_articles
        )
        if extra:
            verdict.notes.append(f"{extra} outputs are of other inputs than the plan's")
        if success is None:
            verdict.notes.append(f"no {SUCCESS_NAME}: no run has seen every shard done")
        return frozenset(shard.name for shard in plan.shards)
    if success is not None:
        planned = set(success["shards"])
        verdict.problems.extend(f"missing: {name}" for name in sorted(planned - set(names)))
        extra = len(set(names) - planned - of_articles)
        if extra:
            verdict.notes.append(f"{extra} outputs are of other inputs than the plan's")
        return frozenset(planned)
    if not of_articles or of_articles != footers.keys():
        verdict.problems.append(
            f"no {SUCCESS_NAME}: the job is not complete; run it again, or name its inputs to see "
            "what is missing"
        )
    return frozenset()


def _missing(
    planned: Sequence[Shard], names: Sequence[str], footers: Mapping[str, Footer]
) -> list[Shard]:
    """Planned shards with rows that no output holds, however the outputs were cut.

    One whose own output is there but damaged was told of already.
    """
    there: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for footer in footers.values():
        rows = (footer.start, footer.stop)
        there.setdefault((footer.source, footer.source_version), []).append(rows)
    for ranges in there.values():
        ranges.sort()
    there_by_name = set(names)
    return [
        shard
        for shard in planned
        if shard.name not in there_by_name
        and not _covers(there.get((shard.source.uri, shard.source.version), []), shard)
    ]


def _covers(ranges: Sequence[tuple[int, int]], shard: Shard) -> bool:
    """Whether ranges, sorted by their start, hold every row of a shard; an empty one wants one."""
    next_row = shard.start
    touches = False
    for start, stop in ranges:
        if start > next_row:
            break
        touches |= start <= shard.start <= stop
        next_row = max(next_row, stop)
    return touches and next_row >= shard.stop


def _latest_run(folder: Folder) -> dict[str, Any] | None:
    runs = sorted(folder.sizes(RUNS))
    return read_note(folder, runs[-1]) if runs else None


def _plan_settings(note: Mapping[str, Any]) -> tuple[ReadSettings, CutSettings]:
    read, cut = note["read"], note["cut"]
    keep = tuple(read["keep"]) if isinstance(read["keep"], list) else read["keep"]
    settings = ReadSettings(tuple(read["text_columns"]), read["id_column"], keep, read["delimiter"])
    return settings, replace(CutSettings(), **cut)
