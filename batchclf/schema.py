"""Arrow schema of the output: declared, never inferred from rows."""

from collections.abc import Sequence

import pyarrow as pa

PREDICTION_COLUMNS = ("row", "label", "score", "probs", "n_tokens", "truncated", "error")
RENAME_PREFIX = "input_"


def prediction_fields(labels: Sequence[str], *, probs: bool) -> list[pa.Field]:
    """The columns that batchclf adds, in their order."""
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("score", pa.float32()),
        pa.field("probs", pa.struct([pa.field(label, pa.float32()) for label in labels])),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("error", pa.string()),
    ]
    return fields if probs else [field for field in fields if field.name != "probs"]


def output_schema(kept: pa.Schema, labels: Sequence[str], *, probs: bool) -> pa.Schema:
    """Kept input columns, then the predictions. `kept` has its final names already."""
    return pa.schema([*kept, *prediction_fields(labels, probs=probs)])


def output_name(name: str, taken: Sequence[str], ours: Sequence[str] = PREDICTION_COLUMNS) -> str:
    """The name of a kept input column in the output: its own, unless it is one of ours.

    Compared without case, since Athena and Spark do not tell `Label` from `label`.

    Args:
        name: the column's name in the input.
        taken: the names of all columns kept from this input.
        ours: the names that batchclf gives.
    """
    if name.lower() not in ours:
        return name
    lowered = {other.lower() for other in taken}
    renamed = RENAME_PREFIX + name
    while renamed.lower() in lowered:
        renamed = RENAME_PREFIX + renamed
    return renamed
