"""A model at hand: texts -> predictions, with the encoder and the engine of `classify`.

Shape suffixes: R rows that could be read, C classes.
"""
# ruff: noqa: N806 - names of arrays end in their shape, in capitals

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Self

import numpy as np
import pyarrow as pa

from batchclf.checkpoint import Checkpoint
from batchclf.compute import Compute, open_model
from batchclf.config import ModelSettings, PredictSettings
from batchclf.engine import Engine, Logits, Prepared, build_model
from batchclf.predictions import Predictions, restore, softmax, to_record_batch
from batchclf.schema import output_schema
from batchclf.source.base import record_batch
from batchclf.text import Encoded, TextEncoder, join_text

_BATCH_ROWS = 1024
_BATCH_CHARS = 4 << 20  # a batch of texts ends after the one that passes this
_COLUMN = "text"


class Classifier:
    """A loaded model; safe to share between threads, which take turns.

    As a context manager, or by `close`, it gives back its threads at once and not when it is
    forgotten.

    Attributes:
        labels: in the order of `probs`.
        max_length: tokens of a text that the model sees.
        name: of the model's directory.
        content_hash: what the checkpoint is known by.
        compute: device and dtype, resolved.

    Raises:
        ConfigError, CheckpointError: the model cannot be loaded here.
        StoreError: S3 kept failing.
    """

    def __init__(
        self, settings: ModelSettings, min_score: float = 0.0, endpoint_url: str | None = None
    ) -> None:
        self._min_score = PredictSettings(min_score=min_score).min_score
        self.checkpoint, self.compute = open_model(settings, endpoint_url)
        self.labels = self.checkpoint.labels
        self.max_length = self.checkpoint.max_length
        self.name = self.checkpoint.path.resolve().name
        self.content_hash = self.checkpoint.content_hash
        self._encoder = build_encoder(self.checkpoint)
        self._engine = build_engine(self.checkpoint, self.compute, settings)
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Classifier {self.name}: {len(self.labels)} labels, on {self.compute.device}>"

    def close(self) -> None:
        """End the threads; nothing can be classified any more."""
        self._engine.close()

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that the device computes at once."""
        return self._engine.max_batch_tokens

    def classify(self, texts: Iterable[object]) -> pa.Table:
        """The label of each text, in the order of the texts: N rows for N texts.

        A text that cannot be labelled has a row with nulls and an `error`, as in the output of
        `batchclf classify`: None, NaN and the like are `null_text`, and what is neither str nor
        bytes is `not_text`.

        Args:
            texts: str or None, one after the other: a list, a pandas or polars Series, a NumPy or
                Arrow array, or a generator, which is read as it is needed.

        Returns:
            Columns `label` (string), `score` (float32), `probs` (struct of one float32 a label),
            `n_tokens` (int32), `truncated` (bool), `error` (string), each [N]. `to_pandas()` and
            `polars.from_arrow` take it.

        Raises:
            TypeError: `texts` is one text, or a table.
        """
        _check_iterable(texts)
        schema = output_schema(pa.schema([]), self.labels, probs=True)
        names = pa.array(self.labels, pa.string())
        batches = []
        with self._turn:
            for predictions in self._predictions(texts):
                nothing_kept = record_batch([], pa.schema([]), len(predictions))
                batches.append(to_record_batch(0, nothing_kept, predictions, names, schema))
        return pa.Table.from_batches(batches, schema).drop_columns("row")

    def predict(self, texts: Sequence[str | None]) -> Predictions:
        """Predictions of N texts; one that is None has label -1 and no error of ours.

        Args:
            texts: [N] as from `join_text`.
        """
        with self._turn:
            return self._predict([self._encoder.encode(texts)], [{}])[0]

    def _predictions(self, texts: Iterable[object]) -> Iterator[Predictions]:
        """Of neighbouring texts; as many of them as are worth sorting together are computed so."""
        encoded: list[Encoded] = []
        errors: list[Mapping[int, str]] = []
        num_tokens = 0
        for column, faults in _columns(texts):
            joined = join_text({_COLUMN: column})
            encoded.append(self._encoder.encode(joined.texts))
            errors.append({**joined.errors, **faults})
            num_tokens += len(encoded[-1].ids)
            if num_tokens >= self._engine.window_tokens:
                yield from self._predict(encoded, errors)
                encoded, errors, num_tokens = [], [], 0
        if encoded:
            yield from self._predict(encoded, errors)

    def _predict(
        self, encoded: Sequence[Encoded], errors: Sequence[Mapping[int, str]]
    ) -> list[Predictions]:
        examples = prepare_encoded(self._engine, encoded)
        return predictions_of(
            self._engine.predict_prepared(examples, _ignore),
            encoded,
            errors,
            temperature=self.checkpoint.temperature,
            min_score=self._min_score,
        )


def build_encoder(checkpoint: Checkpoint) -> TextEncoder:
    """Texts -> tokens, as the model of a checkpoint wants them."""
    return TextEncoder(checkpoint.tokenizer, checkpoint.max_length, checkpoint.normalise)


def build_engine(checkpoint: Checkpoint, compute: Compute, settings: ModelSettings) -> Engine:
    """The model of a checkpoint on its device.

    Raises:
        CheckpointError: a weight is too large for the dtype.
    """
    return Engine(build_model(checkpoint, compute), compute, settings.max_batch_tokens)


def prepare_encoded(engine: Engine, encoded: Sequence[Encoded]) -> Prepared:
    """The tokens of several record batches, ready to be computed; may run ahead in another thread.

    Args:
        engine: what will compute them.
        encoded: the tokens of each record batch.
    """
    ids = np.concatenate([each.ids for each in encoded] or [np.array([], np.int32)])
    lengths = np.concatenate([each.num_tokens for each in encoded] or [np.array([], np.int32)])
    offsets = np.concatenate(([0], np.cumsum(lengths[lengths > 0], dtype=np.int64)))
    return engine.prepare(ids, offsets)


def predictions_of(
    logits: Logits,
    encoded: Sequence[Encoded],
    errors: Sequence[Mapping[int, str]],
    *,
    temperature: float,
    min_score: float,
) -> list[Predictions]:
    """Predictions of several record batches that were computed together, one for each.

    Args:
        logits: of the examples of `prepare_encoded`, of the same record batches.
        encoded: the tokens of each record batch.
        errors: of each, what was wrong with some rows before they were tokenised.
        temperature: logits are divided by it.
        min_score: below this probability a row abstains.
    """
    probs_RC = softmax(logits.logits_NC / temperature)
    predictions = []
    first = 0
    for each, known in zip(encoded, errors, strict=True):
        last = first + int((each.num_tokens > 0).sum())
        predictions.append(
            restore(
                probs_RC[first:last],
                logits.failed_N[first:last],
                num_tokens=each.num_tokens,
                truncated=each.truncated,
                errors={**known, **each.errors},
                min_score=min_score,
            )
        )
        first = last
    return predictions


def _ignore(num_examples: int, num_tokens: int) -> None:
    """Nobody watches single batches here."""


def _check_iterable(texts: object) -> None:
    """What has a length and yields something, but not the texts that were meant."""
    if isinstance(texts, str | bytes):
        _refuse("one text", "give a list of one")
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        _refuse("a table or mapping", "give one column of it")


def _refuse(what: str, advice: str) -> NoReturn:
    raise TypeError(f"texts is {what}; {advice}")


def _columns(texts: Iterable[object]) -> Iterator[tuple[pa.Array, dict[int, str]]]:
    """Texts as Arrow columns of a bounded size, with what is wrong with some values by row."""
    if isinstance(texts, pa.Array | pa.ChunkedArray):
        for start in range(0, len(texts), _BATCH_ROWS):
            part = texts.slice(start, _BATCH_ROWS)
            chunks = part.chunks if isinstance(part, pa.ChunkedArray) else [part]
            yield from ((chunk, {}) for chunk in chunks)
        return
    values: list[Any] = []
    num_chars = 0
    for value in texts:
        values.append(value)
        num_chars += len(value) if isinstance(value, str | bytes) else 0
        if len(values) >= _BATCH_ROWS or num_chars >= _BATCH_CHARS:
            yield _to_column(values)
            values, num_chars = [], 0
    if values:
        yield _to_column(values)


def _to_column(values: list[Any]) -> tuple[pa.Array, dict[int, str]]:
    try:
        return pa.array(values, pa.large_string(), from_pandas=True), {}
    except (pa.ArrowException, ValueError, TypeError):
        return _to_binary(values)


def _to_binary(values: list[Any]) -> tuple[pa.Array, dict[int, str]]:
    """One by one: some are no text, or have lone surrogates, which `join_text` finds."""
    column: list[bytes | None] = []
    faults = {}
    for row, value in enumerate(values):
        if isinstance(value, str):
            column.append(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, bytes):
            column.append(value)
        else:
            column.append(None)
            if not _is_missing(value):
                faults[row] = f"not_text: is of type {type(value).__name__}"
    return pa.array(column, pa.large_binary()), faults


def _is_missing(value: object) -> bool:
    """None, and what pandas has for it: NaN, NaT, NA."""
    try:
        return bool(pa.array([value], from_pandas=True).null_count)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return False
