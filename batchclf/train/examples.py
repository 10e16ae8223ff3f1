from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from batchclf.errors import InputError
from batchclf.text import Normalisation, normalise

Ids = npt.NDArray[np.int32]

_MOST_NAMED = 100  # rows in one message


@dataclass(frozen=True)
class Examples:
    """Texts with their labels, as positions in the model's list of labels.

    Attributes:
        places: where each text stands, for messages: `news.csv row 12`; by default its position.
    """

    texts: Sequence[str]
    labels: Sequence[int]
    places: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise InputError(f"{len(self.texts)} texts, but {len(self.labels)} labels")
        if not self.texts:
            raise InputError("no examples")

    def place(self, row: int) -> str:
        return self.places[row] if self.places else f"example {row}"

    def name_rows(self, rows: Sequence[int]) -> str:
        """Where some rows stand, those of one file together: `news.csv row 3, 12; b.csv row 0`."""
        by_file: dict[str, list[str]] = {}
        for row in rows[:_MOST_NAMED]:
            start, number = self.place(row).rsplit(" ", 1)
            by_file.setdefault(start, []).append(number)
        named = "; ".join(f"{start} {', '.join(numbers)}" for start, numbers in by_file.items())
        return named if len(rows) <= _MOST_NAMED else f"{named} and {len(rows) - _MOST_NAMED} more"


@dataclass(frozen=True)
class Tokenised:
    """Examples with all token ids of each text, however long it is."""

    examples: Examples
    ids: Sequence[Ids]

    @property
    def labels(self) -> Sequence[int]:
        return self.examples.labels

    def cut(self, max_length: int) -> Self:
        """No more than the first tokens of each text."""
        return replace(self, ids=[ids[:max_length] for ids in self.ids])


def tokenise(
    tokenizer: Tokenizer, examples: Examples, normalisation: Normalisation, num_labels: int
) -> Tokenised:
    """Find the token ids of each text.

    Raises:
        InputError: a text without tokens, or a label that the model does not have.
    """
    for row, label in enumerate(examples.labels):
        if not 0 <= label < num_labels:
            raise InputError(
                f"{examples.place(row)}: label {label} is none of the model's {num_labels}"
            )
    texts = [normalise(text, normalisation) for text in examples.texts]
    found = [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch_fast(texts)]
    for row, ids in enumerate(found):
        if not len(ids):
            raise InputError(f"the text of {examples.place(row)} is empty")
    return Tokenised(examples, found)
