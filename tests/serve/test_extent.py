import models
import numpy as np
import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer

from batchclf.serve.extent import Extent
from batchclf.text import Normalisation, TextEncoder

WORDS = st.sampled_from(
    ["Shares", "ROSE", "12.5", "naïve", "日本語", "don't", "ΟΔΟΣ", "İstanbul", "🎈🎈", "the", "-"]
)
SPACES = st.sampled_from([" ", "  ", "\n\n", "\t", "\u00a0", " \u2003 "])
TEXTS = st.lists(st.tuples(WORDS, SPACES), min_size=1, max_size=60).map(
    lambda pairs: "".join(word + space for word, space in pairs)
)
NORMALISATIONS = pytest.mark.parametrize("how", ["none", "lower+collapse"])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made: Tokenizer = models.byte_level_tokenizer()
    return made


@NORMALISATIONS
@given(text=TEXTS, max_length=st.integers(1, 40))
def test_what_was_read_gives_the_tokens_that_the_model_saw(
    tokenizer: Tokenizer, how: Normalisation, text: str, max_length: int
) -> None:
    encoder = TextEncoder(tokenizer, max_length, how)
    extent = Extent(tokenizer, max_length, how)
    whole = encoder.encode([text])
    end = extent.read_chars(text)
    assert 0 <= end <= len(text)
    if not whole.truncated[0]:
        assert end >= len(text.rstrip()) or how == "lower+collapse"
        return
    # The end may stand within a character, of which the model saw some bytes: then that
    # character is counted, and read alone it gives a token or more besides.
    again = TextEncoder(tokenizer, 2 * max_length + 8, how).encode([text[:end]])
    seen = whole.ids[:max_length]
    common = np.flatnonzero(again.ids[: len(seen)] != seen[: len(again.ids)])
    assert len(common) == 0 or common[0] >= max_length - 4


@NORMALISATIONS
def test_the_end_of_what_was_read_stands_after_a_word(
    tokenizer: Tokenizer, how: Normalisation
) -> None:
    text = "The film took\n\ntwelve   million pounds at the box office"
    ends = {Extent(tokenizer, n, how).read_chars(text) for n in range(1, 40)}
    assert len("The film took") in ends
    assert len("The film took\n\ntwelve") in ends
    assert max(ends) == len(text)
