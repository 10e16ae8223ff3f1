"""Articles that came one by one from a queue, as record batches: rows judged as in JSON lines."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from batchclf.config import DEFAULT_ID_COLUMN, ReadSettings
from batchclf.messages import MESSAGE_ID
from batchclf.schema import PREDICTION_COLUMNS, output_name
from batchclf.source.base import BATCH_BYTES, BATCH_ROWS, RowBatch, record_batch
from batchclf.source.jsonl_reader import read_object
from batchclf.source.lines import string_arrays

RECEIVE_COUNT = "receive_count"
_OURS = (*PREDICTION_COLUMNS, MESSAGE_ID, RECEIVE_COUNT)


@dataclass(frozen=True)
class QueuedArticle:
    """A JSON object from a queue, and what the queue says of its message.

    Attributes:
        size_bytes: of the message's body.
    """

    fields: Mapping[str, object]
    message_id: str
    receive_count: int
    size_bytes: int


def kept_fields(settings: ReadSettings) -> tuple[str, ...]:
    """The fields of articles that travel to the output, declared since every article has its own.

    The id comes first. With all columns kept, it is the id and the text: of articles, others have
    to be named.
    """
    if settings.keep == "none":
        return ()
    named: tuple[str, ...] = ()
    if settings.keep == "all":
        named = settings.text_columns
    elif isinstance(settings.keep, tuple):
        named = settings.keep
    id_column = settings.id_column or DEFAULT_ID_COLUMN
    first = () if id_column in named else (id_column,)
    return tuple(dict.fromkeys(first + named))


def article_schema(settings: ReadSettings) -> pa.Schema:
    """The kept columns of a set of articles: strings, then which message each row is of."""
    names = kept_fields(settings)
    return pa.schema(
        [
            *(pa.field(output_name(name, names, _OURS), pa.string()) for name in names),
            pa.field(MESSAGE_ID, pa.string(), nullable=False),
            pa.field(RECEIVE_COUNT, pa.int32(), nullable=False),
        ]
    )


def article_batches(
    articles: Sequence[QueuedArticle], settings: ReadSettings
) -> Iterator[RowBatch]:
    """All articles, in order, as record batches of `article_schema`."""
    schema = article_schema(settings)
    first = 0
    while first < len(articles):
        num_bytes, stop = 0, first
        while stop < len(articles) and stop - first < BATCH_ROWS and num_bytes <= BATCH_BYTES:
            num_bytes += articles[stop].size_bytes
            stop += 1
        yield _row_batch(first, articles[first:stop], settings, schema)
        first = stop


def _row_batch(
    first_row: int, articles: Sequence[QueuedArticle], settings: ReadSettings, schema: pa.Schema
) -> RowBatch:
    names = kept_fields(settings)
    wanted = (*settings.text_columns, *names)
    rows = []
    faults = {}
    for row, article in enumerate(articles):
        values, fault = read_object(article.fields, settings.text_columns, wanted)
        if fault is not None:
            faults[row] = fault
        rows.append(values)
    text, kept = string_arrays(rows, len(settings.text_columns), len(names))
    columns = [
        *kept,
        pa.array([article.message_id for article in articles], pa.string()),
        pa.array([article.receive_count for article in articles], pa.int32()),
    ]
    return RowBatch(first_row, text, record_batch(columns, schema, len(rows)), faults)
