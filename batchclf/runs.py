"""What runs wrote down of themselves in the output: counts, speed, settings."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from batchclf.errors import OutputError
from batchclf.notes import RUNS, read_note
from batchclf.store import Folder

MOST_RUNS = 200  # that are read, the latest
_THREADS = 8
_SUFFIX = ".json"

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One run of `classify` or `work`.

    Attributes:
        name: begins with when it ended, as `20240131T235959Z`.
        num_planned: shards of the whole job; None for `work`.
        num_committed: shards that this run committed, sets of articles among them.
        messages: what became of a queue's messages; {} for `classify`.
        errors: what went wrong, one sentence each.
        busy: each stage's share of the time in which it worked.
        model, labels: the model's directory and its labels.
        settings: all that the command was asked for.
    """

    name: str
    finished_at: str
    command: str
    complete: bool | None
    num_planned: int | None
    num_committed: int
    num_done_before: int
    num_rows: int
    num_failed: int
    num_tokens: int
    seconds: float
    articles_per_s: float
    tokens_per_s: float
    peak_rss_mib: int
    device: str
    dtype: str
    busy: Mapping[str, float]
    messages: Mapping[str, int]
    errors: Sequence[str]
    model: str
    labels: Sequence[str]
    inputs: Sequence[str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @classmethod
    def from_note(cls, name: str, note: Mapping[str, Any]) -> "Run":
        """What a note says.

        Raises:
            KeyError, TypeError, ValueError: it is no note of a run.
        """
        settings = _of(dict, note["settings"])
        shards, counts = _of(dict, note["num_shards"]), _of(dict, note["counts"])
        is_work = "messages" in note
        planned = None if is_work else int(shards["planned"])
        return cls(
            name=name,
            finished_at=str(note["finished_at"]),
            command="work" if is_work else "classify",
            complete=None if is_work else bool(note["complete"]),
            num_planned=planned,
            num_committed=int(shards["committed"]) + int(note.get("num_sets", 0)),
            num_done_before=int(shards["done_before"]),
            num_rows=int(counts["num_rows"]),
            num_failed=int(counts["num_failed"]),
            num_tokens=int(counts["num_tokens"]),
            seconds=float(note["seconds"]),
            articles_per_s=float(note["articles_per_s"]),
            tokens_per_s=float(note["tokens_per_s"]),
            peak_rss_mib=int(note["peak_rss_mib"]),
            device=str(note["device"]),
            dtype=str(note["dtype"]),
            busy={str(stage): float(share) for stage, share in _of(dict, note["busy"]).items()},
            messages={str(k): int(n) for k, n in _of(dict, note.get("messages", {})).items()},
            errors=_errors(note, is_work=is_work),
            model=str(note["model"]["path"]),
            labels=tuple(map(str, _of(list, note["model"]["labels"]))),
            inputs=tuple(map(str, settings.get("inputs", ()))),
            settings=settings,
            versions={str(k): str(v) for k, v in _of(dict, note["versions"]).items()},
        )


@dataclass(frozen=True)
class Runs:
    """The runs that left a note, the earliest first.

    Attributes:
        num_older: earlier runs, whose notes were not read.
        problems: one sentence for each note that cannot be read.
    """

    found: Sequence[Run]
    num_older: int
    problems: Sequence[str]

    @property
    def latest(self) -> Run | None:
        return self.found[-1] if self.found else None


def run_names(names: Sequence[str]) -> list[str]:
    """Of the names in an output, those of the notes of runs, the earliest first."""
    return sorted(name for name in names if name.startswith(RUNS) and name.endswith(_SUFFIX))


def read_runs(folder: Folder, names: Sequence[str]) -> Runs:
    """Read the notes of the latest runs.

    Args:
        folder: `fp=...`.
        names: from `run_names`.
    """

    def read(name: str) -> Run | OutputError | None:
        try:
            note = read_note(folder, name)
            return None if note is None else Run.from_note(_stem(name), note)
        except OutputError as error:
            return error
        except (KeyError, TypeError, ValueError) as error:
            return OutputError(f"{folder.uri}/{name}: not the note of a run: {error!r}")

    with ThreadPoolExecutor(_THREADS) as pool:
        read_notes = list(pool.map(read, names[-MOST_RUNS:]))
    return Runs(
        found=[each for each in read_notes if isinstance(each, Run)],
        num_older=max(len(names) - MOST_RUNS, 0),
        problems=[str(each) for each in read_notes if isinstance(each, OutputError)],
    )


def _stem(name: str) -> str:
    return name.removeprefix(RUNS).removesuffix(_SUFFIX)


def _errors(note: Mapping[str, Any], *, is_work: bool) -> tuple[str, ...]:
    if is_work:
        ended = str(note.get("ended", ""))
        return () if ended in ("", "done") else (ended,)
    return tuple(map(str, _of(list, note.get("errors", []))))


def _of(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.50} where a {kind.__name__} belongs")
    return value
