"""The job of `batchclf report`: an output read once, a record batch at a time.

Of each row the labels, scores, counts of tokens and errors are read, and two kept columns: a date
and a true label. Probabilities and texts are not.
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batchclf.errors import CheckpointError, ConfigError, DamagedError, OutputError
from batchclf.kept_columns import KeptColumns, Sampler, spread
from batchclf.messages import ARTICLES, MESSAGE_ID
from batchclf.model_card import ModelCard, read_card
from batchclf.notes import SUCCESS_NAME, read_note
from batchclf.report import (
    PlanState,
    Report,
    SourceShare,
    abstained_of,
    date_report,
    label_shares,
    tokens_of,
    truth_report,
)
from batchclf.report_words import count_of
from batchclf.runs import read_runs, run_names
from batchclf.schema import prediction_fields
from batchclf.sink import Footer
from batchclf.store import Folder, Source, hidden, open_folder
from batchclf.tally import Columns, Tally

_FOLDER = "fp="
_THREADS = 4
_FILES_AT_ONCE = 256  # whose counts may wait to be added up
_WHOLE_BYTES = 8 << 20  # a smaller output is fetched at once, not in parts
_SAMPLED_FILES = 8
_BATCH_ROWS = 1 << 16
_READ = ("row", "label", "score", "n_tokens", "truncated", "error")
_MOST_LISTED = 50  # of what is missing
_MOST_INPUTS = 20  # that a command still shows

T = TypeVar("T")


def make_report(
    output: str,
    *,
    fingerprint: str | None = None,
    date_column: str | None = None,
    label_column: str | None = None,
    model: str | None = None,
    endpoint_url: str | None = None,
) -> Report:
    """Read an output.

    Args:
        output: what `classify --output` was given, or the folder `fp=...` in it.
        fingerprint: which one, where there are several; else the newest that is complete.
        date_column: a kept column of dates, instead of the first that looks like one.
        label_column: likewise of true labels.
        model: directory of the model, instead of the one that the last run used.
        endpoint_url: another server of the S3 protocol.

    Raises:
        OutputError: there is no output.
        ConfigError: no such fingerprint or column.
        CheckpointError: `model` cannot be read.
        StoreError: the store kept failing.
    """
    folder, others = choose_folder(open_folder(output, endpoint_url), fingerprint, endpoint_url)
    return _Reading(folder, others, endpoint_url).report(date_column, label_column, model)


def choose_folder(
    folder: Folder, fingerprint: str | None, endpoint_url: str | None
) -> tuple[Folder, list[str]]:
    """The folder `fp=...` to read, and the fingerprints of those beside it.

    Raises:
        OutputError: there is none.
        ConfigError: not the one that was asked for.
    """
    last = folder.uri.rsplit("/", 1)[-1]
    if last.startswith(_FOLDER):
        if fingerprint not in (None, last.removeprefix(_FOLDER)):
            raise ConfigError(f"{folder.uri}: not of --fingerprint {fingerprint}")
        return folder, []
    by_folder: dict[str, list[str]] = {}
    for name in folder.sizes(_FOLDER):
        top, slash, rest = name.partition("/")
        if slash:
            by_folder.setdefault(top.removeprefix(_FOLDER), []).append(rest)
    if not by_folder:
        raise OutputError(f"{folder.uri}: holds no output of batchclf, no folder {_FOLDER}...")
    if fingerprint is not None:
        found = [name for name in by_folder if name.startswith(fingerprint)]
        if len(found) != 1:
            listed = "\n  ".join(sorted(by_folder))
            what = "no" if not found else "more than one"
            raise ConfigError(
                f"--fingerprint {fingerprint}: {what} such output in {folder.uri}; there are\n"
                f"  {listed}"
            )
        (chosen,) = found
    else:
        chosen = max(by_folder, key=lambda name: _recency(by_folder[name]))
    others = sorted(set(by_folder) - {chosen})
    return open_folder(f"{folder.uri}/{_FOLDER}{chosen}", endpoint_url), others


def _recency(names: Sequence[str]) -> tuple[bool, str]:
    """Complete ones before others, and later ones before earlier ones."""
    return SUCCESS_NAME in names, max(run_names(names), default="")


class _Reading:
    """One output while it is read."""

    def __init__(self, folder: Folder, others: Sequence[str], endpoint_url: str | None) -> None:
        self._folder = folder
        self._others = others
        self._endpoint_url = endpoint_url
        sizes = folder.sizes("")
        self._sizes = {name: size for name, size in sizes.items() if not hidden(name)}
        self._names = sorted(self._sizes)
        self._runs = read_runs(folder, run_names(list(sizes)))
        self._fingerprint = folder.uri.rsplit(_FOLDER, 1)[-1]
        self._problems: list[str] = list(self._runs.problems)
        self._notes: list[str] = []

    def report(
        self, date_column: str | None, label_column: str | None, model: str | None
    ) -> Report:
        labels, kept = self._look()
        columns = kept.choose(date_column, label_column) if self._names else Columns()
        counted = _Counted(columns, frozenset(labels))
        for name, found in self._map(lambda name: self._count(name, counted), self._names):
            if isinstance(found, OutputError):
                self._problems.append(str(found))
            else:
                counted.add(name, found)
        repeats = counted.first_rows()
        for _, tally in self._map(
            lambda name: self._count_articles(name, counted, repeats[name]), list(repeats)
        ):
            if isinstance(tally, OutputError):
                self._problems.append(str(tally))
            else:
                counted.tally.merge(tally)
        self._note(kept, columns, counted)
        return self._make(kept, columns, counted, labels, model)

    def _map(self, work: Callable[[str], T], names: Sequence[str]) -> Iterator[tuple[str, T]]:
        """Results of reading files, in their order."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(names), _FILES_AT_ONCE):
                part = names[start : start + _FILES_AT_ONCE]
                yield from zip(part, pool.map(work, part), strict=True)

    def _look(self) -> tuple[tuple[str, ...], KeptColumns]:
        """The model's labels, and what the kept columns are."""
        labels = tuple(self._runs.latest.labels) if self._runs.latest else ()
        sampler = None
        for name in spread(self._names, _SAMPLED_FILES):
            try:
                with self._opened(name) as (file, _):
                    labels = labels or _labels_of(file.schema_arrow)
                    sampler = sampler or Sampler(labels)
                    sampler.look(file)
            except OutputError:
                continue  # told of when it is counted
        return labels, sampler.found() if sampler else KeptColumns()

    @contextmanager
    def _opened(
        self, name: str, dictionaries: Sequence[str] = ()
    ) -> Iterator[tuple[pq.ParquetFile, Footer]]:
        """A published file and its footer.

        Raises:
            OutputError: it is torn or not ours, or turns out to be while it is read.
        """
        try:
            file = self._folder.open(name, whole=self._sizes[name] <= _WHOLE_BYTES)
        except DamagedError as error:
            raise OutputError(f"{name}: damaged: {error}") from error
        if file is None:
            raise OutputError(f"{name}: gone while it was read")
        with file:
            footer = Footer.read(file, name)
            if footer.fingerprint != self._fingerprint:
                raise OutputError(f"{name}: was written under fingerprint {footer.fingerprint}")
            try:
                parquet = pq.ParquetFile(file, read_dictionary=list(dictionaries))
                _check_columns(parquet.schema_arrow, name)
                yield parquet, footer
            except (pa.ArrowException, KeyError, ValueError, OSError) as error:
                raise OutputError(f"{name}: torn: {error}") from error

    def _count(self, name: str, counted: "_Counted") -> "_File | OutputError":
        try:
            with self._opened(name, counted.dictionaries) as (file, footer):
                if footer.source.startswith(ARTICLES):
                    return _File(footer, Tally(), list(_message_hashes(file)))
                tally = Tally()
                for batch in _batches(file, counted.columns):
                    tally.add(batch, counted.columns, _shown(footer), counted.labels)
                return _File(footer, tally, [])
        except OutputError as error:
            return error

    def _count_articles(
        self, name: str, counted: "_Counted", is_first: npt.NDArray[np.bool_]
    ) -> Tally | OutputError:
        try:
            with self._opened(name, counted.dictionaries) as (file, footer):
                tally = Tally()
                position = 0
                for batch in _batches(file, counted.columns):
                    mask = pa.array(is_first[position : position + batch.num_rows])
                    position += batch.num_rows
                    tally.add(batch.filter(mask), counted.columns, _shown(footer), counted.labels)
                return tally
        except OutputError as error:
            return error

    def _note(self, kept: KeptColumns, columns: Columns, counted: "_Counted") -> None:
        if self._others:
            self._notes.append(
                "there is more in this output, under "
                f"{count_of(len(self._others), 'other fingerprint')}; --fingerprint chooses one: "
                f"{', '.join(self._others)}"
            )
        if counted.num_repeats:
            self._notes.append(
                f"{counted.num_repeats:,} rows are of messages that were delivered again, and are "
                f"left out here; keep the first row of each {MESSAGE_ID}"
            )
        for what, option, chosen, others in (
            ("Dates", "--date-column", columns.date, kept.dates),
            ("True labels", "--label-column", columns.truth, kept.truths),
        ):
            rest = [name for name in others if name != chosen]
            if rest:
                listed = ", ".join(rest)
                self._notes.append(f"{what} are from {chosen}; {option} takes another: {listed}")
        if self._runs.num_older:
            self._notes.append(f"{self._runs.num_older:,} earlier runs are not listed")

    def _make(
        self,
        kept: KeptColumns,
        columns: Columns,
        counted: "_Counted",
        labels: Sequence[str],
        model: str | None,
    ) -> Report:
        tally = counted.tally
        card = self._card(labels, model)
        plan = self._plan(counted)
        return Report(
            output=self._folder.uri,
            fingerprint=self._fingerprint,
            others=self._others,
            problems=self._problems,
            notes=self._notes,
            num_outputs=counted.num_outputs,
            finished=counted.finished,
            versions=sorted(counted.versions),
            counts=tally.counts,
            num_repeats=counted.num_repeats,
            labels=label_shares(tally, labels),
            abstained=abstained_of(tally),
            tokens=tokens_of(tally),
            failures=dict(sorted(tally.failures.items(), key=lambda each: -each[1].count)),
            sources=counted.source_shares(),
            kept=list(kept.kinds),
            dates=date_report(columns, tally),
            truth=truth_report(columns, tally, labels),
            plan=plan,
            runs=self._runs,
            card=card,
            verify=self._verify_command(),
        )

    def _card(self, labels: Sequence[str], model: str | None) -> ModelCard | None:
        """The model's card, if it still seems to be the model that labelled."""
        latest = self._runs.latest
        path = model or (latest.model if latest else None)
        if path is None:
            return None
        try:
            card = read_card(Path(path))
        except CheckpointError:
            if model is not None:
                raise
            self._notes.append(f"the model is no longer at {path}; --model says where it is")
            return None
        if labels and tuple(card.labels) != tuple(labels):
            self._notes.append(f"{path} holds a model of other labels now, so its card is left out")
            return None
        return card

    def _plan(self, counted: "_Counted") -> PlanState:
        planned: set[str] | None = None
        try:
            success = read_note(self._folder, SUCCESS_NAME)
            if success is not None:
                planned = set(map(str, success["shards"]))
        except (OutputError, KeyError, TypeError) as error:
            self._problems.append(f"{SUCCESS_NAME}: not readable: {error}")
        if planned is not None:
            missing = sorted(planned - counted.whole)
            extra = counted.whole - planned - counted.of_articles
            return PlanState(
                complete=not missing,
                num_planned=len(planned),
                num_there=len(planned) - len(missing),
                missing=missing[:_MOST_LISTED],
                num_missing=len(missing),
                num_extra=len(extra),
                told_by=SUCCESS_NAME,
            )
        runs = [run for run in self._runs.found if run.num_planned is not None]
        num_planned = runs[-1].num_planned if runs else None
        of_queue = counted.of_articles or any(run.messages for run in self._runs.found)
        return PlanState(
            complete=None if of_queue and num_planned is None else False,
            num_planned=num_planned,
            num_there=len(counted.whole - counted.of_articles),
            missing=(),
            num_missing=0,
            num_extra=0,
            told_by="the last run's note" if runs else "",
        )

    def _verify_command(self) -> str:
        runs = [run for run in self._runs.found if run.inputs]
        inputs = runs[-1].inputs if runs and len(runs[-1].inputs) <= _MOST_INPUTS else ()
        endpoint = ("--endpoint-url", self._endpoint_url) if self._endpoint_url else ()
        return shlex.join(("batchclf", "verify", self._folder.uri, *inputs, *endpoint))


@dataclass(frozen=True)
class _File:
    """What one output holds; of articles first the hashes of their message ids alone."""

    footer: Footer
    tally: Tally
    messages: list[npt.NDArray[np.int64]]


@dataclass
class _Counted:
    """The sum of what was read so far."""

    columns: Columns
    labels: frozenset[str]
    tally: Tally = field(default_factory=Tally)
    num_outputs: int = 0
    num_repeats: int = 0
    whole: set[str] = field(default_factory=set)
    of_articles: set[str] = field(default_factory=set)
    versions: set[str] = field(default_factory=set)
    finished: tuple[str, str] | None = None
    _sources: dict[str, list[int]] = field(default_factory=dict)
    _messages: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    @property
    def dictionaries(self) -> list[str]:
        """Columns of few different strings, which are read as places in a list of them."""
        named = (self.columns.date, self.columns.truth)
        return ["label", "error", *(name for name in named if name is not None)]

    def add(self, name: str, file: _File) -> None:
        """Count one output that is whole."""
        footer = file.footer
        self.num_outputs += 1
        self.whole.add(name)
        self.versions.add(footer.version)
        first, last = self.finished or (footer.finished_at, footer.finished_at)
        self.finished = min(first, footer.finished_at), max(last, footer.finished_at)
        sums = self._sources.setdefault(_shown(footer), [0, 0, 0])
        for place, number in enumerate((1, footer.counts.num_rows, footer.counts.num_failed)):
            sums[place] += number
        if footer.source.startswith(ARTICLES):
            self.of_articles.add(name)
            hashes = [np.zeros(0, np.int64), *file.messages]
            self._messages[name] = np.concatenate(hashes)
        else:
            self.tally.merge(file.tally)

    def first_rows(self) -> dict[str, npt.NDArray[np.bool_]]:
        """For each output of articles, which rows are the first of their message."""
        if not self._messages:
            return {}
        every = np.concatenate(list(self._messages.values()))
        is_first = np.zeros(len(every), np.bool_)
        is_first[np.unique(every, return_index=True)[1]] = True
        self.num_repeats = len(every) - int(is_first.sum())
        ends = np.cumsum([len(hashes) for hashes in self._messages.values()])[:-1]
        return dict(zip(self._messages, np.split(is_first, ends), strict=True))

    def source_shares(self) -> list[SourceShare]:
        return [SourceShare(name, *sums) for name, sums in sorted(self._sources.items())]


def _shown(footer: Footer) -> str:
    return str(Source(footer.source, footer.source_version, 0))


def _batches(file: pq.ParquetFile, columns: Columns) -> Iterator[pa.RecordBatch]:
    there = set(file.schema_arrow.names)
    kept = [name for name in (columns.date, columns.truth) if name in there]
    yield from file.iter_batches(_BATCH_ROWS, columns=[*kept, *_READ], use_threads=False)


def _message_hashes(file: pq.ParquetFile) -> Iterator[npt.NDArray[np.int64]]:
    for batch in file.iter_batches(_BATCH_ROWS, columns=[MESSAGE_ID], use_threads=False):
        ids = batch.column(MESSAGE_ID).to_pylist()
        yield np.fromiter(map(hash, ids), np.int64, len(ids))


def _check_columns(schema: pa.Schema, name: str) -> None:
    for ours in prediction_fields((), probs=False):
        if ours.name not in schema.names:
            raise OutputError(f"{name}: has no column {ours.name}")
        kind = schema.field(ours.name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if kind != ours.type:
            raise OutputError(f"{name}: its columns are not those that batchclf writes")


def _labels_of(schema: pa.Schema) -> tuple[str, ...]:
    if "probs" not in schema.names or not pa.types.is_struct(schema.field("probs").type):
        return ()
    return tuple(each.name for each in schema.field("probs").type)
