"""The main path: shards in, committed outputs out.

    fetch -> read -> tokenise -> gather -> predict -> write, publish

Each arrow is a bounded queue between threads, and the flow does not stop at the end of a shard:
while one is being published, the next is being computed, and small shards share their batches.
Whoever calls deletes the message, or counts the shard as done, only after its outcome came.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import BinaryIO

import pyarrow as pa

from batchclf.classifier import predictions_of, prepare_encoded
from batchclf.config import PredictSettings, ReadSettings
from batchclf.engine import Engine, Logits, Prepared
from batchclf.errors import ErrorRateError, InputError, OutOfSpaceError, OutputError, StoreError
from batchclf.log import fields
from batchclf.predictions import Predictions
from batchclf.shards import Shard
from batchclf.sink import Receipt, ShardWriter, Sink
from batchclf.source import Reader, RowBatch, open_reader
from batchclf.stages import Flow
from batchclf.store import Source, check_unchanged, open_source
from batchclf.text import Encoded, TextEncoder

log = logging.getLogger(__name__)

_LAST_STAGE = "write"
_MOST_SHOWN = 200  # characters of a text, in a line of level debug
_WINDOW_BYTES = 128 << 20  # of kept columns that wait together for their predictions
# The first rows are tokenised few at a time, so that the device has something to do soon.
_FIRST_ROWS = 64


@dataclass(frozen=True)
class Tools:
    """What every shard of a job shares."""

    read: ReadSettings
    encoder: TextEncoder
    engine: Engine
    temperature: float
    predict: PredictSettings
    sink: Sink
    endpoint_url: str | None = None


@dataclass(frozen=True)
class Arrived:
    """A shard whose rows are here already, such as articles from a queue.

    Attributes:
        rows: read once.
    """

    shard: Shard
    kept_schema: pa.Schema
    rows: Iterable[RowBatch]


class Pause(Enum):
    """Nothing more is ready at the moment: what came before is labelled without waiting for more.

    An endless source gives one now and then also while nothing comes, so that the flow can stop.
    """

    PAUSE = "pause"


@dataclass(frozen=True)
class Outcome:
    """What became of a shard: it has a receipt, or an error says why not.

    Attributes:
        error: a StoreError means that its source could not be fetched, which may pass.
        failed_rows: positions of the rows with an error.
        stage_s: seconds that each stage worked since the outcome before. Stages are ahead of one
            another, so that only sums over many shards say what a shard costs.
    """

    shard: Shard
    receipt: Receipt | None = None
    error: InputError | OutputError | StoreError | None = None
    failed_rows: tuple[int, ...] = ()
    stage_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_new(self) -> bool:
        """Whether this attempt committed it, rather than found it done."""
        return self.receipt is not None and self.receipt.created


@dataclass(frozen=True)
class _Opened:
    """The rows of a shard follow."""

    shard: Shard
    kept_schema: pa.Schema


@dataclass(frozen=True)
class _Closed:
    """No more of this shard: all its rows have passed, or it was found done, or it failed."""

    outcome: Outcome


@dataclass(frozen=True)
class _Fetched:
    """A shard to read. Its file is here with the first shard of a source, then stays open."""

    shard: Shard
    file: BinaryIO | None


@dataclass(frozen=True)
class _Encoded:
    """A record batch with its tokens; a row with an error has none."""

    rows: RowBatch
    errors: dict[int, str]
    encoded: Encoded


@dataclass(frozen=True)
class _Predicted:
    rows: RowBatch
    predictions: Predictions


_Marker = _Opened | _Closed | Pause


@dataclass(frozen=True)
class _Window:
    """What is sorted together: rows and markers in their order, and the examples of all rows."""

    parts: list[_Encoded | _Marker]
    examples: Prepared


@dataclass(frozen=True)
class _Computed:
    """A window, and the logits of its examples."""

    parts: list[_Encoded | _Marker]
    logits: Logits


def run_shards(
    shards: Iterable[Shard | Arrived | Pause],
    tools: Tools,
    interrupt: threading.Event,
    on_batch: Callable[[int, int], None],
    on_end: Callable[[dict[str, float]], None],
) -> Iterator[Outcome]:
    """Label shards and commit them, in order; a shard that cannot be read fails alone.

    Args:
        shards: taken from as the flow has room.
        tools: what all of them share.
        interrupt: when set, the flow stops between two batches and raises Interrupted; whatever
            was not committed leaves no trace.
        on_batch: told the examples and tokens of each batch computed.
        on_end: told each stage's share of the time in which it was busy.

    Raises:
        Interrupted: `interrupt` was set.
        StoreError, ConfigError: the store of the output fails, or there is no scratch space.
    """
    with Flow(interrupt) as flow:
        fetched = flow.stage("fetch", _fetch(shards, tools, flow.check), depth=1)
        rows = flow.stage("read", _read(fetched, tools), depth=4)
        encoded = flow.stage("tokenise", _tokenise(_in_pieces(rows), tools), depth=8)
        # windows are gathered and prepared while another is computed
        windows = flow.stage("gather", _windows(encoded, tools.engine), depth=1)
        computed = flow.stage("predict", _predict(windows, tools, flow.check, on_batch), depth=1)
        before: dict[str, float] = {}
        try:
            for outcome in _write(_restore(computed, tools, flow.check), tools):
                now = flow.busy_s(_LAST_STAGE)
                since = {name: round(s - before.get(name, 0.0), 3) for name, s in now.items()}
                before = now
                yield replace(outcome, stage_s=since)
        finally:
            on_end(flow.busy_shares(_LAST_STAGE))


def _fetch(
    shards: Iterable[Shard | Arrived | Pause], tools: Tools, check: Callable[[], None]
) -> Iterator[_Fetched | _Closed | Arrived | Pause]:
    """Bring each source here once for all its neighbouring shards, ahead of its reader."""
    here: Source | None = None
    is_paused = True
    for shard in shards:
        check()
        if isinstance(shard, Pause) and is_paused:
            continue
        is_paused = isinstance(shard, Pause)
        if not isinstance(shard, Shard):
            yield shard
            continue
        try:
            receipt = tools.sink.committed(shard)
        except OutputError as error:
            yield _Closed(Outcome(shard, error=error))
            continue
        if receipt:
            yield _Closed(Outcome(shard, receipt))
            continue
        try:
            tools.read.check_size(shard.source.size_bytes, str(shard.source))
            file = None if shard.source == here else open_source(shard.source, tools.endpoint_url)
        except OutOfSpaceError:
            raise
        except (InputError, StoreError) as error:
            yield _Closed(Outcome(shard, error=error))
            continue
        here = shard.source
        yield _Fetched(shard, file)


def _read(
    fetched: Iterable[_Fetched | _Closed | Arrived | Pause], tools: Tools
) -> Iterator[RowBatch | _Marker]:
    reader: Reader | InputError | None = None
    with ExitStack() as open_files:
        for item in fetched:
            if isinstance(item, Arrived):
                yield _Opened(item.shard, item.kept_schema)
                yield from item.rows
                yield _Closed(Outcome(item.shard))
                continue
            if not isinstance(item, _Fetched):
                yield item
                continue
            shard = item.shard
            try:
                if item.file is not None:
                    open_files.close()
                    open_files.callback(item.file.close)
                    reader = _try_open(item.file, shard.source, tools.read)
                if not isinstance(reader, Reader):
                    yield _Closed(Outcome(shard, error=reader))
                    continue
                yield _Opened(shard, reader.kept_schema)
                yield from reader.read(shard.start, shard.stop, shard.offset)
                check_unchanged(shard.source)
            except InputError as error:
                yield _Closed(Outcome(shard, error=error))
            else:
                yield _Closed(Outcome(shard))


def _try_open(file: BinaryIO, source: Source, settings: ReadSettings) -> Reader | InputError:
    try:
        return open_reader(file, source, settings)
    except InputError as error:
        return error


def _in_pieces(items: Iterable[RowBatch | _Marker]) -> Iterator[RowBatch | _Marker]:
    """Few rows at first, twice as many each time, and soon record batches as they are."""
    most = _FIRST_ROWS
    for item in items:
        if not isinstance(item, RowBatch):
            yield item
            continue
        first = 0
        while item.num_rows - first > most:
            yield item.slice(first, first + most)
            first += most
            most *= 2
        yield item.slice(first, item.num_rows) if first else item


def _tokenise(items: Iterable[RowBatch | _Marker], tools: Tools) -> Iterator[_Encoded | _Marker]:
    shard: Shard | None = None
    for item in items:
        if not isinstance(item, RowBatch):
            shard = item.shard if isinstance(item, _Opened) else shard
            yield item
            continue
        texts = item.texts(tools.read.text_columns)
        encoded = tools.encoder.encode(texts.texts)
        errors = {**texts.errors, **encoded.errors}
        if errors and log.isEnabledFor(logging.DEBUG):
            _show_failed(shard, item.first_row, errors, texts.texts)
        # the text itself has done its work, and may be most of the memory
        yield _Encoded(replace(item, text=()), errors, encoded)


def _show_failed(
    shard: Shard | None, first_row: int, errors: Mapping[int, str], texts: Sequence[str | None]
) -> None:
    """Log the rows that get no label: for a person who looks for the reason, with their texts."""
    for row, error in sorted(errors.items()):
        text = texts[row]
        shown = None if text is None else text[:_MOST_SHOWN]
        log.debug(
            "%s, row %d: %s; its text begins %r",
            shard,
            first_row + row,
            error,
            shown,
            extra=fields(
                shard=shard and shard.name, row=first_row + row, error=error, text_begins=shown
            ),
        )


def _windows(items: Iterable[_Encoded | _Marker], engine: Engine) -> Iterator[_Window]:
    """What will be sorted together, ready to be computed."""
    for parts in _gather(items, engine.first_window_tokens, engine.window_tokens):
        encoded = [part.encoded for part in parts if isinstance(part, _Encoded)]
        yield _Window(parts, prepare_encoded(engine, encoded))


def _gather(
    items: Iterable[_Encoded | _Marker], first_tokens: int, most_tokens: int
) -> Iterator[list[_Encoded | _Marker]]:
    """Parts of so many tokens together, twice as many each time up to the most.

    They end at a pause, but not with shards.
    """
    enough = min(first_tokens, most_tokens)
    window: list[_Encoded | _Marker] = []
    num_tokens = num_bytes = 0
    for item in items:
        if isinstance(item, Pause):
            if window:
                yield window
            window, num_tokens, num_bytes = [], 0, 0
            continue
        window.append(item)
        if isinstance(item, _Encoded):
            num_tokens += len(item.encoded.ids)
            num_bytes += item.rows.kept.nbytes
            if num_tokens >= enough or num_bytes >= _WINDOW_BYTES:
                yield window
                window, num_tokens, num_bytes = [], 0, 0
                enough = min(2 * enough, most_tokens)
    if window:
        yield window


def _predict(
    windows: Iterable[_Window],
    tools: Tools,
    check: Callable[[], None],
    on_batch: Callable[[int, int], None],
) -> Iterator[_Computed]:
    """Nothing but what the device has to wait for."""

    def after_batch(num_examples: int, num_tokens: int) -> None:
        on_batch(num_examples, num_tokens)
        check()

    for window in windows:
        yield _Computed(window.parts, tools.engine.predict_prepared(window.examples, after_batch))


def _restore(
    computed: Iterable[_Computed], tools: Tools, check: Callable[[], None]
) -> Iterator[_Predicted | _Marker]:
    """Rows and markers in their order again."""
    for window in computed:
        encoded = [part for part in window.parts if isinstance(part, _Encoded)]
        predictions = iter(
            predictions_of(
                window.logits,
                [part.encoded for part in encoded],
                [part.errors for part in encoded],
                temperature=tools.temperature,
                min_score=tools.predict.min_score,
            )
        )
        for part in window.parts:
            check()  # a window may be of many shards, each of them a file to publish
            yield _Predicted(part.rows, next(predictions)) if isinstance(part, _Encoded) else part
        # while the next one is waited for, they would be memory
        del window, encoded, predictions, part


def _write(items: Iterable[_Predicted | _Marker], tools: Tools) -> Iterator[Outcome]:
    with ExitStack() as open_writer:
        writer: ShardWriter | None = None
        failed_rows: list[int] = []
        for item in items:
            match item:
                case _Opened(shard, kept_schema):
                    writer = open_writer.enter_context(tools.sink.writer(shard, kept_schema))
                    failed_rows = []
                case _Predicted(rows, predictions) if writer is not None:
                    writer.write(rows.first_row, rows.kept, predictions)
                    failed_rows += [rows.first_row + row for row in sorted(predictions.errors)]
                case _Closed(outcome):
                    if writer is not None and outcome.error is None:
                        outcome = replace(_commit(writer, tools), failed_rows=tuple(failed_rows))
                    writer = None
                    open_writer.close()
                    yield outcome


def _commit(writer: ShardWriter, tools: Tools) -> Outcome:
    shard, counts = writer.shard, writer.counts
    try:
        if tools.predict.on_error == "fail" and writer.first_error:
            raise ErrorRateError(f"{shard.source} {writer.first_error} (--on-error fail)")
        if counts.num_failed > tools.predict.max_error_rate * counts.num_rows:
            raise ErrorRateError(
                f"{shard}: {counts.num_failed} of {counts.num_rows} rows failed, more than "
                f"--max-error-rate {tools.predict.max_error_rate}; the first is "
                f"{writer.first_error}"
            )
        return Outcome(shard, tools.sink.commit(writer))
    except (ErrorRateError, OutputError) as error:
        return Outcome(shard, error=error)
