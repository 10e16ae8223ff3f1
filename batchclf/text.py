r"""Columns -> text -> token ids.

The exact prefix cut
--------------------
A model sees at most `max_length` tokens, so a long text is cut before it is tokenised. A break is
a place between a non-space character and an ASCII space character. What stands before a break
tokenises to an exact prefix of the tokens of the whole text:

- GPT-2's pre-tokeniser, ByteLevel with the expression
  `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`, goes from left to
  right and never looks back. A run of letters, of numbers or of others stops at a space as it
  stops at the end of the text; a contraction holds no space; and a run of spaces ends at the
  latest at the non-space character before the break. So the words before the break are the same.
- An added token without white space, and without `lstrip`, `rstrip` or `single_word`, neither
  spans the break nor looks past it.
- BPE works on one word at a time, and with all 256 bytes in the vocabulary it drops none.

So any prefix up to a break that gives more than `max_length` tokens gives the right ones; one
that gives fewer is taken longer. `TextEncoder.cuts` says whether all this holds for a tokenizer;
where it does not, whole texts are tokenised.

White space in Python is what it is in the tokenizer's expression (Unicode `White_Space`) and
U+001C to U+001F besides. So Python's non-space characters are non-space there too.
"""

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress, pairwise
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from batchclf.errors import ConfigError

Normalisation = Literal["none", "lower+collapse"]

# Bytes of text that are tokenised as one row, and at once. tokenizers 0.23 takes up to 300 times
# the text in memory: measured for 1 MiB of "a" 73 MiB and 0.4 s, of Chinese 99 MiB and 0.3 s, of
# letters and digits in turn 279 MiB and 0.7 s.
MAX_UNBROKEN_BYTES = 3 * 2**19

# So little text is tokenised in the caller's thread: tokenizers' own threads would not gain a
# millisecond, and are awake for a while afterwards, on the cores that then compute the batch (a
# request to the small model on two cores took 2.0 to 2.4 ms with them, and 1.3 to 1.5 ms without).
_FEW_BYTES = 1 << 12

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

        A text that cannot be cut within MAX_UNBROKEN_BYTES gets an error `unbroken_text`, one
        that the tokenizer makes no tokens of `empty_text`.

        Args:
            texts: [rows] without lone surrogates, as from `join_text`.
        """
        present = np.array([row for row, text in enumerate(texts) if text is not None], np.int64)
        prepared = [self._normalise(text) for text in texts if text is not None]
        first_chars = int(_CHARS_PER_TOKEN * (self.max_length + 1))
        found, too_long = self._tokenise_prefixes(prepared, first_chars)
        longer = np.flatnonzero(found.lengths > self.max_length)
        if self._truncating is None:
            found.ids = np.delete(found.ids, np.cumsum(found.lengths)[longer] - 1)
            found.lengths[longer] -= 1
        else:
            kept = [prepared[row] for row in longer.tolist()]
            found.replace(longer, _tokenise(self._truncating, kept, _sizes(kept)))

        lengths = np.zeros(len(texts), np.int64)
        lengths[present] = found.lengths
        truncated = np.zeros(len(texts), np.bool_)
        truncated[present[longer]] = True
        unbroken = f"unbroken_text: no place to cut it in its first {MAX_UNBROKEN_BYTES} bytes"
        errors = dict.fromkeys(present[too_long].tolist(), unbroken)
        for row in present[found.lengths == 0].tolist():
            errors.setdefault(row, "empty_text: the tokenizer makes no tokens of it")
        return Encoded(found.ids, np.concatenate(([0], np.cumsum(lengths))), truncated, errors)

    def _normalise(self, text: str) -> str:
        if self.cuts:
            # Each word gives at least one token; one that is too long need not be kept whole.
            words = normalise(text, self._normalisation, self.max_length + 1)
            return words[: MAX_UNBROKEN_BYTES + 1]
        if len(text) > MAX_UNBROKEN_BYTES:
            return text  # too long to be tokenised; splitting it would take gigabytes
        return normalise(text, self._normalisation)

    def _tokenise_prefixes(
        self, texts: list[str], num_chars: int
    ) -> tuple["_Rows", npt.NDArray[np.bool_]]:
        """Up to `max_length` + 1 tokens of each text, from `num_chars` of it or more if need be.

        Returns:
            The tokens, and which texts are too long for them: bool [rows].
        """
        prefixes = [
            text if len(text) <= num_chars else self._prefix(text, num_chars) for text in texts
        ]
        sizes = _sizes(prefixes)
        too_long = sizes > MAX_UNBROKEN_BYTES
        fitting = list(compress(prefixes, (~too_long).tolist()))
        found = _tokenise(self._tokenizer, fitting, sizes[~too_long])
        lengths = np.zeros(len(texts), np.int64)
        lengths[~too_long] = found.lengths
        found.lengths = lengths

        is_cut = _num_chars(prefixes) < _num_chars(texts)
        short = np.flatnonzero(is_cut & ~too_long & (lengths <= self.max_length))
        if len(short):
            again, too_long[short] = self._tokenise_prefixes(
                [texts[row] for row in short.tolist()], 2 * num_chars
            )
            found.replace(short, again)
        return found, too_long

    def _prefix(self, text: str, num_chars: int) -> str:
        """The text up to its first break after `num_chars`; without one whole, or too long."""
        if self.cuts and (found := _BREAK.search(text, num_chars, MAX_UNBROKEN_BYTES + 1)):
            return text[: found.start()]
        return text[: MAX_UNBROKEN_BYTES + 1]


@dataclass
class _Rows:
    """Token ids, row after row, and how many each row has."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]

    def replace(self, rows: npt.NDArray[np.int64], others: "_Rows") -> None:
        """Put `others` in the place of `rows`, which ascend."""
        ends = np.cumsum(self.lengths)
        kept = np.split(self.ids, np.column_stack((ends - self.lengths, ends))[rows].ravel())[::2]
        put = np.split(others.ids, np.cumsum(others.lengths))
        # A last empty part of `put` goes with the ids after the last row.
        self.ids = np.concatenate([part for pair in zip(kept, put, strict=True) for part in pair])
        self.lengths[rows] = others.lengths


def _tokenise(tokenizer: Tokenizer, texts: list[str], sizes: npt.NDArray[np.int64]) -> _Rows:
    ids = array("i")
    lengths = array("q")
    for start, end in _chunks(sizes):
        chunk = texts[start:end]
        is_small = sizes[start:end].sum() <= _FEW_BYTES
        encode = partial(map, tokenizer.encode) if is_small else tokenizer.encode_batch_fast
        for encoding in encode(chunk):
            row_ids = encoding.ids
            ids.fromlist(row_ids)
            lengths.append(len(row_ids))
    return _Rows(np.array(ids, np.int32), np.array(lengths, np.int64))


def _chunks(sizes: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that hold MAX_UNBROKEN_BYTES or a single row, so that memory is bounded."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        limit = ends[start] - sizes[start] + MAX_UNBROKEN_BYTES
        end = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield start, end
        start = end


def _sizes(texts: list[str]) -> npt.NDArray[np.int64]:
    """int64 [rows]: UTF-8 bytes of the large texts, characters of the others."""
    sizes = _num_chars(texts)
    for row in np.flatnonzero(sizes > _LARGE_CHARS).tolist():
        sizes[row] = len(texts[row].encode())
    return sizes


def _num_chars(texts: list[str]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(len, texts), np.int64, len(texts))


def _copy(tokenizer: Tokenizer, spec: str, max_length: int) -> Tokenizer:
    copied = Tokenizer.from_str(spec)
    copied.encode_special_tokens = tokenizer.encode_special_tokens  # not in the spec
    copied.no_padding()
    copied.enable_truncation(max_length)
    return copied


def _is_exact_before_breaks(spec: dict[str, Any]) -> bool:
    """Whether what stands before a break tokenises alone as it does in its text.

    Args:
        spec: what `tokenizer.json` holds, of a tokenizer that adds no special tokens.
    """
    splitter = spec["pre_tokenizer"] or {"type": None}
    model = spec["model"]
    if splitter["type"] != "ByteLevel" or model["type"] != "BPE":
        return False
    return not (
        spec["normalizer"]
        or splitter["add_prefix_space"]
        or not splitter["use_regex"]
        or model["dropout"]
        or model["continuing_subword_prefix"]
        or model["end_of_word_suffix"]
        or not set(ByteLevel.alphabet()) <= model["vocab"].keys()
        or any(_minds_white_space(token) for token in spec["added_tokens"])
        or not _adds_nothing(spec["post_processor"])
    )


def _minds_white_space(token: dict[str, Any]) -> bool:
    stripping = token["lstrip"] or token["rstrip"] or token["single_word"]
    return bool(stripping) or re.search(r"\s", token["content"]) is not None


def _adds_nothing(post_processor: dict[str, Any] | None) -> bool:
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return True
    # transformers 5 writes this for GPT-2.
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    return bool(
        post_processor["type"] == "TemplateProcessing" and post_processor["single"] == single
    )
