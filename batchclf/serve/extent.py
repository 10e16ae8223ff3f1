"""How far into a text the model reads."""

import re
from itertools import islice

from tokenizers import Tokenizer

from batchclf.text import MAX_UNBROKEN_BYTES, Normalisation, normalise

_RUN = re.compile(r"\S+")


class Extent:
    """Finds the character of a text after which the model sees no more of it."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, normalisation: Normalisation) -> None:
        self._max_length = max_length
        self._normalisation: Normalisation = normalisation
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = tokenizer.encode_special_tokens  # not in the spec
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)

    def read_chars(self, text: str) -> int:
        """Characters of a text, from its start, that stand behind the model's tokens.

        Args:
            text: without lone surrogates, one that the model does not see the end of.
        """
        # Every run gives a token at least, so what the model sees ends within these.
        head = text[:MAX_UNBROKEN_BYTES]
        runs = list(islice(_RUN.finditer(head), self._max_length + 1))
        if not runs:
            return 0
        seen = normalise(head[: runs[-1].end()], self._normalisation)
        encoding = self._tokenizer.encode(seen)
        ends = [
            end
            for (_, end), is_special in zip(
                encoding.offsets, encoding.special_tokens_mask, strict=True
            )
            if not is_special
        ]
        end = max(ends, default=0)
        if self._normalisation == "none":
            return end
        return _place(seen[:end], runs)


def _place(seen: str, runs: list[re.Match[str]]) -> int:
    """Where in the original a beginning of the lower-cased, collapsed text ends.

    Args:
        seen: words in lower case with single spaces, the last one perhaps cut.
        runs: the words of the original.
    """
    words = seen.split(" ")
    run = runs[len(words) - 1]
    # Lower case may be longer than upper case, so count in lower case.
    word = run.group()
    length = next(
        (n for n in range(len(word) + 1) if len(word[:n].lower()) >= len(words[-1])), len(word)
    )
    return run.start() + length
