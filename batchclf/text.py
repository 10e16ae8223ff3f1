"""Columns -> text -> token ids.

The exact prefix cut
--------------------
A model sees at most `max_length` tokens, so a long text is cut before it is tokenised. A break is
a place between a non-space character and an ASCII space character. What stands before a break
tokenises to an exact prefix of the tokens of the whole text:

- GPT-2's pre-tokeniser (ByteLevel with its own expression
  `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+`) goes from left to
  right and never looks back. A run of letters, numbers or others stops at a space as it stops at
  the end of the text; a contraction holds no space; and a run of spaces ends at the non-space
  character before the break, which both have. So the words before the break are the same.
- An added token without white space, and without `lstrip`, `rstrip` or `single_word`, neither
  spans the break nor looks past it.
- BPE works on one word at a time. With all 256 bytes in the vocabulary no character is dropped.

So any prefix up to a break that gives more than `max_length` tokens gives the right ones, and a
prefix that gives fewer is taken longer. `TextEncoder.cuts` says whether all this holds for a
tokenizer; where it does not, whole texts are tokenised.

Python's white space is that of the tokenizer's regular expressions (Unicode `White_Space`) and
U+001C to U+001F: a character that is not white space here is none there.
"""

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from batchclf.errors import ConfigError

Normalisation = Literal["none", "lower+collapse"]

# Bytes of text that are tokenised as one row, and at once. tokenizers 0.23 takes up to 240 times
# the text in memory (measured: 1 MiB of mixed characters 237 MiB and 0.7 s, 4 MiB 908 MiB).
MAX_UNBROKEN_BYTES = 2 * 2**20

# The first cut, in characters a token. 99.8% of BBC articles give more than 128 tokens of the
# GPT-2 vocabulary within it (median 4.5 characters a token); the others are cut again, later.
_CHARS_PER_TOKEN = 5.5

# Up to here a row is small beside MAX_UNBROKEN_BYTES even if each character takes four bytes.
_LARGE_CHARS = 2**16

_BREAK = re.compile(r"(?<=\S)[\t-\r ]")

_STRING_OF_BINARY = {
    pa.binary(): pa.string(),
    pa.large_binary(): pa.large_string(),
    pa.binary_view(): pa.string_view(),
}
_BINARY_OF_STRING = {string: binary for binary, string in _STRING_OF_BINARY.items()}


@dataclass(frozen=True)
class Texts:
    """The text of each row of a record batch.

    Attributes:
        texts: [rows] None exactly where `errors` has the row.
        errors: row -> `code: short reason`.
    """

    texts: list[str | None]
    errors: dict[int, str]


def join_text(columns: Mapping[str, pa.Array]) -> Texts:
    """The text of each row: the text columns that are not null, joined by a line break.

    A row without usable text gets an error: `null_text` (null in all columns), `empty_text`
    (nothing but white space), `not_text` (a value of a column that holds neither strings nor
    binary), `invalid_utf8`. Where several columns are at fault the first one is named.

    Args:
        columns: name -> column of one record batch, one or more, in the order of joining:
            strings or binary of any layout, dictionaries of those, or whatever else stands there.
    """
    errors: dict[int, str] = {}
    parts = []
    for name, column in columns.items():
        values, faults = _read_column(name, column)
        parts.append(values)
        for row, fault in faults.items():
            errors.setdefault(row, fault)
    texts = parts[0] if len(parts) == 1 else [_join(row) for row in zip(*parts, strict=True)]
    for row in errors:
        texts[row] = None
    for row, text in enumerate(texts):
        if text is None:
            errors.setdefault(row, "null_text: null in every text column")
        elif not text or text.isspace():
            texts[row] = None
            errors[row] = "empty_text: nothing but white space" if text else "empty_text: no text"
    return Texts(texts, errors)


def _join(values: tuple[str | None, ...]) -> str | None:
    present = [value for value in values if value is not None]
    return "\n".join(present) if present else None


def _read_column(name: str, column: pa.Array) -> tuple[list[str | None], dict[int, str]]:
    """The values of one column as strings, and what is wrong with some of them by row."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        return _read_dictionary(name, column)
    if column.type in _STRING_OF_BINARY:
        column = column.view(_STRING_OF_BINARY[column.type])
    if column.type not in _BINARY_OF_STRING:
        fault = f"not_text: column {name!r} is {column.type}"
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)).tolist()
        return [None] * len(column), dict.fromkeys(rows, fault)
    try:
        return column.to_numpy(zero_copy_only=False).tolist(), {}
    except pa.ArrowException:  # what pyarrow makes of a UnicodeDecodeError
        return _decode_column(name, column.view(_BINARY_OF_STRING[column.type]))


def _decode_column(name: str, column: pa.Array) -> tuple[list[str | None], dict[int, str]]:
    values: list[str | None] = []
    faults = {}
    for row, value in enumerate(column.to_numpy(zero_copy_only=False)):
        try:
            values.append(None if value is None else value.decode())
        except UnicodeDecodeError as error:
            values.append(None)
            faults[row] = (
                f"invalid_utf8: byte 0x{value[error.start]:02x} at offset {error.start} "
                f"of column {name!r}"
            )
    return values, faults


def _read_dictionary(name: str, column: pa.Array) -> tuple[list[str | None], dict[int, str]]:
    # Decoding the dictionary in Arrow would copy a long value once a row; here rows share it.
    values, faults = _read_column(name, column.dictionary)
    null = len(values)
    values.append(None)
    indices = column.indices.cast(pa.int64()).fill_null(null).to_numpy()
    faulty = np.flatnonzero(np.isin(indices, list(faults))).tolist() if faults else []
    return (
        [values[index] for index in indices.tolist()],
        {row: faults[indices[row]] for row in faulty},
    )


def normalise(text: str, how: Normalisation, num_words: int | None = None) -> str:
    """Text as the model was trained on it: as it is, or lower case with single spaces.

    Args:
        text: any text without lone surrogates.
        how: `none` or `lower+collapse`, which is `" ".join(text.lower().split())`.
        num_words: with `lower+collapse`, stop after this many words, at the cost of those alone.
            Splitting first gives the same words: no character turns into white space or out of
            it in lower case, and the one letter whose lower case depends on its neighbours, the
            capital sigma, looks no further than white space.
    """
    if how == "none":
        return text
    if num_words is None:
        return " ".join(text.lower().split())
    return " ".join(text.split(None, num_words)[:num_words]).lower()


@dataclass(frozen=True)
class Encoded:
    """Token ids of many rows, without an object a row.

    Attributes:
        ids: int32 [tokens of all rows], row after row.
        offsets: int64 [rows + 1]; row i is `ids[offsets[i]:offsets[i + 1]]`.
        truncated: bool [rows]; the whole text has more tokens than the row.
        errors: row -> `code: short reason`; such a row has no tokens.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    errors: dict[int, str]

    @property
    def num_tokens(self) -> npt.NDArray[np.int32]:
        """int32 [rows]: tokens of each row."""
        return np.diff(self.offsets).astype(np.int32)

    def row_bytes(self) -> list[bytes]:
        """The ids of each row as bytes, equal exactly where the ids are."""
        raw = self.ids.tobytes()
        starts = (self.offsets * self.ids.itemsize).tolist()
        return [raw[start:end] for start, end in pairwise(starts)]


class TextEncoder:
    """Tokenises rows for a model that sees at most `max_length` tokens.

    The ids are those of `tokenizer` with special tokens and truncation on the right. The
    tokenizer that is passed in is left as it is. Safe to use from several threads.

    Attributes:
        max_length: tokens of a row, special tokens included.
        cuts: whether long texts are cut before they are tokenised (see the top of this file).

    Raises:
        ConfigError: an unknown normalisation, or a max_length that leaves no room for text.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, normalisation: Normalisation = "none"
    ) -> None:
        if normalisation not in get_args(Normalisation):
            known = ", ".join(get_args(Normalisation))
            raise ConfigError(f"unknown text normalisation {normalisation!r}; known are {known}")
        num_special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length <= num_special:
            raise ConfigError(
                f"a maximum length of {max_length} leaves no room for text: "
                f"the tokenizer adds {num_special} special tokens; set at least {num_special + 1}"
            )
        self.max_length = max_length
        self._normalisation: Normalisation = normalisation
        spec = tokenizer.to_str()
        self.cuts = num_special == 0 and _is_exact_before_breaks(json.loads(spec))
        # One token more than the model sees tells whether the text goes on.
        self._tokenizer = _copy(tokenizer, spec, max_length + 1)
        # Special tokens may stand at the end, so dropping the last token does not truncate.
        self._truncating = _copy(tokenizer, spec, max_length) if num_special else None

    def encode(self, texts: Sequence[str | None]) -> Encoded:
        """Tokenise rows; a row that is None has no tokens and no error.

        A text whose first `max_length` + 1 tokens cannot be had from MAX_UNBROKEN_BYTES of it
        gets an error `unbroken_text`, one that the tokenizer makes no tokens of `empty_text`.

        Args:
            texts: [rows] without lone surrogates, as from `join_text`.
        """
        present = [row for row, text in enumerate(texts) if text is not None]
        found = self._encode([self._normalise(text) for text in texts if text is not None])
        longer = np.flatnonzero(found.lengths > self.max_length)
        if self._truncating is None:
            found.ids = np.delete(found.ids, np.cumsum(found.lengths)[longer] - 1)
            found.lengths[longer] -= 1
        else:
            rows = [self._normalise(texts[present[row]] or "") for row in longer.tolist()]
            found.replace(longer, self._tokenise(rows, self._truncating))
        lengths = np.zeros(len(texts), dtype=np.int64)
        lengths[present] = found.lengths
        truncated = np.zeros(len(texts), dtype=np.bool_)
        truncated[np.array(present, dtype=np.int64)[longer]] = True
        errors = {present[row]: error for row, error in found.errors.items()}
        for row in np.flatnonzero(found.lengths == 0).tolist():
            errors.setdefault(present[row], "empty_text: the tokenizer makes no tokens of it")
        return Encoded(found.ids, np.concatenate(([0], np.cumsum(lengths))), truncated, errors)

    def _normalise(self, text: str) -> str:
        if self.cuts:
            # Each word gives at least one token.
            return normalise(text, self._normalisation, self.max_length + 1)
        # Bounds the memory of splitting; the row is too long to be tokenised in any case.
        return normalise(text[: MAX_UNBROKEN_BYTES + 1], self._normalisation)
