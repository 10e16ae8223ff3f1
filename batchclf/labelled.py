"""Labelled articles: texts with the label that a person gave them, for training and measuring."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from batchclf.config import CutSettings, ReadSettings
from batchclf.errors import InputError
from batchclf.planning import make_plan
from batchclf.shards import Shard
from batchclf.source import RowBatch, open_reader
from batchclf.store import Source, open_source


@dataclass(frozen=True)
class Labelled:
    """Articles of one split.

    Attributes:
        texts: as in the input, not normalised.
        labels: one of each text.
        places: where each stands, for messages: `news.csv row 12`.
        num_without_text: rows that were left out because nothing in them can be read.
    """

    texts: list[str]
    labels: list[str]
    places: list[str]
    num_without_text: int

    def __len__(self) -> int:
        return len(self.texts)

    def without(self, dropped: Sequence[bool]) -> "Labelled":
        """The articles that are not dropped, in their order."""
        kept = [index for index, drop in enumerate(dropped) if not drop]
        return Labelled(
            [self.texts[index] for index in kept],
            [self.labels[index] for index in kept],
            [self.places[index] for index in kept],
            self.num_without_text,
        )


def read_labelled(
    inputs: Sequence[str],
    *,
    text_columns: tuple[str, ...],
    label_column: str,
    delimiter: str,
    endpoint_url: str | None,
) -> Labelled:
    """All labelled articles of some inputs, in memory. Stray spaces around a label are dropped.

    Raises:
        InputError: an input cannot be read, or an article has no label; says which row.
    """
    read = ReadSettings(text_columns, keep=(label_column,), delimiter=delimiter)
    found = Labelled([], [], [], 0)
    without_text = 0
    for source, batch, texts in read_texts(inputs, read, CutSettings(), endpoint_url):
        without_text += _append(found, source, batch, texts)
    return Labelled(found.texts, found.labels, found.places, without_text)


def read_texts(
    inputs: Sequence[str], read: ReadSettings, cut: CutSettings, endpoint_url: str | None
) -> Iterator[tuple[Source, RowBatch, list[str | None]]]:
    """Every record batch of some inputs with its texts; None for a row that has none.

    Raises:
        InputError: an input cannot be read.
    """
    plan = make_plan(inputs, read, cut, endpoint_url)
    if plan.unreadable:
        raise _of_labels(plan.unreadable[0])
    yield from read_shards(plan.shards, read, endpoint_url)


def read_shards(
    shards: Iterable[Shard], read: ReadSettings, endpoint_url: str | None
) -> Iterator[tuple[Source, RowBatch, list[str | None]]]:
    """As `read_texts`, of some shards."""
    for shard in shards:
        with open_source(shard.source, endpoint_url) as file:
            reader = open_reader(file, shard.source, read)
            for batch in reader.read(shard.start, shard.stop, shard.offset):
                yield shard.source, batch, batch.texts(read.text_columns).texts


def _of_labels(error: InputError) -> InputError:
    """The same, in the words of who named a label column: that is the only kind of kept column."""
    return type(error)(str(error).replace("--keep-columns", "--label-column"))


def _append(found: Labelled, source: Source, batch: RowBatch, texts: Sequence[str | None]) -> int:
    """Add the articles of a record batch; returns how many rows have no text."""
    # the id column stands before it, where there is one
    column = batch.kept.column(batch.kept.num_columns - 1)
    try:
        labels = column.cast(pa.string()).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"{source}: the label column cannot be read as text: {error}; write labels as text or "
            "whole numbers, or name another --label-column"
        ) from error
    skipped = 0
    for index, (text, label) in enumerate(zip(texts, labels, strict=True)):
        place = f"{source} row {batch.first_row + index}"
        if text is None:
            skipped += 1
            continue
        if label is None or not label.strip():
            raise InputError(f"{place}: has no label")
        found.texts.append(text)
        found.labels.append(label.strip())
        found.places.append(place)
    return skipped
