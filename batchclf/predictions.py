"""Logits -> predictions -> columns: what every way into the model shares.

Shape suffixes: N rows, R those of them that could be read, C classes.
"""
# ruff: noqa: N803, N806 - names of arrays end in their shape, in capitals

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@dataclass(frozen=True)
class Predictions:
    """What the model says of N neighbouring rows; rows with an error have label -1 and zeros.

    Attributes:
        label: int64 [N], index of the best label, -1 where failed.
        probs: float32 [N, C], calibrated.
        abstained: bool [N], best probability below the least score asked for.
        num_tokens: int32 [N].
        truncated: bool [N].
        errors: by index, `code: reason`.
    """

    label: npt.NDArray[np.int64]
    probs: npt.NDArray[np.float32]
    abstained: npt.NDArray[np.bool_]
    num_tokens: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    errors: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.label)

    def rows(self, start: int, stop: int) -> "Predictions":
        """Those of rows `start` to `stop` (exclusive)."""
        return Predictions(
            self.label[start:stop],
            self.probs[start:stop],
            self.abstained[start:stop],
            self.num_tokens[start:stop],
            self.truncated[start:stop],
            {row - start: error for row, error in self.errors.items() if start <= row < stop},
        )


def join_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of rows that follow one another, as one; at least one part."""
    if len(parts) == 1:
        return parts[0]
    errors: dict[int, str] = {}
    first = 0
    for part in parts:
        errors |= {first + row: error for row, error in part.errors.items()}
        first += len(part)
    return Predictions(
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.probs for part in parts]),
        np.concatenate([part.abstained for part in parts]),
        np.concatenate([part.num_tokens for part in parts]),
        np.concatenate([part.truncated for part in parts]),
        errors,
    )


def softmax(logits_NC: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probabilities [N, C] of logits that were divided by the temperature."""
    shifted = logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True, initial=-np.inf)
    exponentials = np.exp(shifted)
    probs_NC: npt.NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probs_NC.astype(np.float32)


def restore(
    probs_RC: npt.NDArray[np.float32],
    failed_R: npt.NDArray[np.bool_],
    *,
    num_tokens: npt.NDArray[np.int32],
    truncated: npt.NDArray[np.bool_],
    errors: Mapping[int, str],
    min_score: float,
) -> Predictions:
    """Predictions of the readable rows R back among all rows N.

    Args:
        probs_RC: of the rows that have tokens, in their order.
        failed_R: those of them that did not fit into the device's memory.
        num_tokens: int32 [N], 0 where a row could not be read.
        truncated: bool [N].
        errors: of the rows that could not be read, by index.
        min_score: below this probability a row abstains.
    """
    readable = np.flatnonzero(num_tokens)
    errors = dict(errors)
    for row in readable[failed_R].tolist():
        errors[row] = "out_of_memory: does not fit into the device's memory"
    fine = readable[~failed_R]
    label = np.full(len(num_tokens), -1, dtype=np.int64)
    probs_NC = np.zeros((len(num_tokens), probs_RC.shape[1]), dtype=np.float32)
    label[fine] = probs_RC[~failed_R].argmax(axis=1)
    probs_NC[fine] = probs_RC[~failed_R]
    return Predictions(
        label,
        probs_NC,
        abstained=(label >= 0) & (probs_NC.max(axis=1, initial=0) < min_score),
        num_tokens=num_tokens,
        truncated=truncated,
        errors=errors,
    )


def to_record_batch(
    first_row: int,
    kept: pa.RecordBatch,
    predictions: Predictions,
    labels: pa.Array,
    schema: pa.Schema,
) -> pa.RecordBatch:
    """Kept input columns and predictions of neighbouring rows, as the output holds them.

    Args:
        first_row: position of the first row in its source.
        kept: [N] the input columns, under their names in the output.
        predictions: [N].
        labels: strings, in the order of the classes.
        schema: as from `output_schema`, with or without `probs`.
    """
    num_rows = kept.num_rows
    failed = predictions.label < 0
    columns = {
        "row": pa.array(np.arange(first_row, first_row + num_rows, dtype=np.int64)),
        "label": labels.take(pa.array(predictions.label, mask=failed | predictions.abstained)),
        "score": pa.array(predictions.probs.max(axis=1), pa.float32(), mask=failed),
        "n_tokens": pa.array(predictions.num_tokens),
        "truncated": pa.array(predictions.truncated),
        "error": pa.array(
            [predictions.errors.get(index) for index in range(num_rows)]
            if predictions.errors
            else pa.nulls(num_rows, pa.string()),
            pa.string(),
        ),
    }
    if "probs" in schema.names[kept.num_columns :]:
        columns["probs"] = pa.StructArray.from_arrays(
            [pa.array(column) for column in np.ascontiguousarray(predictions.probs.T)],
            fields=list(schema.field("probs").type),
            mask=pa.array(failed),
        )
    ours = [columns[name] for name in schema.names[kept.num_columns :]]
    return pa.record_batch([*kept.columns, *ours], schema=schema)
