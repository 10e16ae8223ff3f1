import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from batchclf import text as text_module
from batchclf.errors import ConfigError
from batchclf.text import (
    MAX_UNBROKEN_BYTES,
    Encoded,
    TextEncoder,
    join_text,
    normalise,
)

GPT2 = Path(__file__).resolve().parents[2] / "shared" / "gpt2-tokenizer"
END = "<|endoftext|>"
BMP = [chr(point) for point in range(0x10000) if not 0xD800 <= point < 0xE000]
UNICODE = BMP + [chr(point) for point in range(0x10000, 0x110000, 61)]
# What str.isspace, Rust and old and new Oniguruma call white space, and what they disagree on.
SPACES = "".join(c for c in BMP if c.isspace()) + "\u180e\u200b\u200c\u2060\ufeff\0\x7f\u00ad"
CORPUS = (
    "It's what they'd call the market's worst day; we'll see, they've said. I'm sure you're right.",
    "def main():\n\treturn  [1, 22, 333]   # numbers\r\n\r\n    x = 'hello'  ...  ---",
    "Das Café öffnet für Gäste. 新聞記事の要約です。 Новости дня: 12 345,67 € 😀😀",
    "aaaaaaaaaaaaaaaa bbbbbbbb the the the and and  of   in    to",
)

# --- columns to text ---------------------------------------------------------------------------


def join(*columns: pa.Array) -> tuple[list[str | None], dict[int, str]]:
    joined = join_text(dict(zip(("text", "body", "more"), columns, strict=False)))
    return joined.texts, joined.errors


LAYOUTS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
]
VALUES = ["one", "two", None, "zwölf 😀 NUL\0 " + "x" * 40, "one"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_strings_and_binary_of_every_layout_are_text(layout: pa.DataType) -> None:
    texts, errors = join(pa.array(VALUES).cast(pa.binary()).cast(layout))
    assert texts == VALUES
    assert errors == {2: "null_text: null in every text column"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_sliced_column_is_read_where_it_is_sliced(layout: pa.DataType) -> None:
    column = pa.array(VALUES).cast(pa.binary()).cast(layout)
    assert join(column[1:4])[0] == VALUES[1:4]


@pytest.mark.parametrize("layout", LAYOUTS[:2] + LAYOUTS[3:5], ids=str)
@pytest.mark.parametrize("index", [pa.int8(), pa.uint16(), pa.int64()], ids=str)
def test_a_dictionary_column_is_read_through_its_indices(
    layout: pa.DataType, index: pa.DataType
) -> None:
    dictionary = pa.array(["one", None, "two", "never used"]).cast(layout)
    column = pa.DictionaryArray.from_arrays(pa.array([2, 0, None, 1, 2], index), dictionary)
    assert join(column)[0] == ["two", "one", None, None, "two"]
    assert join(column[1:3])[0] == ["one", None]


def test_a_full_dictionary_of_small_indices_is_read() -> None:
    words = [f"w{i}" for i in range(128)]
    column = pa.DictionaryArray.from_arrays(pa.array(range(128), pa.int8()), pa.array(words))
    assert join(column)[0] == words


def test_a_dictionary_faults_only_the_rows_that_use_a_faulty_value() -> None:
    dictionary = pa.array([b"fine", b"b\xffd", b"unus\xed"], pa.binary())
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 1], pa.int32()), dictionary)
    texts, errors = join(column)
    assert texts == ["fine", None, None, None]
    assert errors[1] == errors[3] == "invalid_utf8: byte 0xff at offset 1 of column 'text'"
    assert errors[2].startswith("null_text")


def test_an_extension_column_is_read_by_what_it_is_stored_as() -> None:
    class Headline(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.string(), "test.headline")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, _: pa.DataType, __: bytes) -> "Headline":
            return cls()

    column = pa.ExtensionArray.from_storage(Headline(), pa.array(["one", None]))
    assert join(column)[0] == ["one", None]


def test_several_columns_are_joined_by_a_line_break_without_the_nulls() -> None:
    title = pa.array(["t", None, "t", None, ""])
    body = pa.array([b"b", b"b", None, None, b"b"], pa.binary())
    assert join(title, body)[0] == ["t\nb", "b", "t", None, "\nb"]


def test_a_row_is_null_only_where_every_column_is() -> None:
    texts, errors = join(pa.nulls(2), pa.array(["b", None]), pa.nulls(2, pa.int64()))
    assert texts == ["b", None]
    assert list(errors) == [1]


@pytest.mark.parametrize("blank", ["", " ", "\n\t \r", "\u3000\u00a0\u2028", "\x1c"])
def test_a_row_of_nothing_but_white_space_is_empty(blank: str) -> None:
    texts, errors = join(pa.array([blank, "x"]), pa.array([blank, None]))
    assert texts == [None, "x"]
    assert errors[0].startswith("empty_text: ")


@pytest.mark.parametrize("text", ["x", "\0", "\u200b", "\ufeff", "7", END])
def test_one_character_is_a_text(text: str) -> None:
    assert join(pa.array([text])) == ([text], {})


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([1, None]), "int64"),
        (pa.array([1.5, None]), "double"),
        (pa.array([True, None]), "bool"),
        (pa.array([["a"], None]), "list<item: string>"),
        (pa.array([b"ab", None], pa.binary(2)), "fixed_size_binary[2]"),
        (pa.array([7, None]).dictionary_encode(), "int64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_of_another_type_are_not_text_but_their_nulls_are_nulls(
    column: pa.Array, kind: str
) -> None:
    texts, errors = join(pa.array(["fine", "fine"]), column)
    assert texts == [None, "fine"]
    assert errors == {0: f"not_text: column 'body' is {kind}"}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"plain ascii \xff", "byte 0xff at offset 12"),
        ("surrogate \ud800!".encode(errors="surrogatepass"), "byte 0xed at offset 10"),
        (b"cut short \xe2\x82", "byte 0xe2 at offset 10"),
        (b"\xc0\x80 overlong", "byte 0xc0 at offset 0"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_invalid_utf8_faults_its_row_alone(layout: pa.DataType, raw: bytes, reason: str) -> None:
    binary = pa.array([b"caf\xc3\xa9", raw, None], pa.binary())
    column = pa.compute.cast(binary, layout, safe=False)
    if layout in {pa.string(), pa.large_string(), pa.string_view()}:
        column = pa.compute.cast(
            binary, options=pa.compute.CastOptions(layout, allow_invalid_utf8=True)
        )
    texts, errors = join(column)
    assert texts == ["café", None, None]
    assert errors[1] == f"invalid_utf8: {reason} of column 'text'"
    assert errors[2].startswith("null_text")


def test_invalid_utf8_that_a_parquet_string_column_holds_is_found(tmp_path: Path) -> None:
    binary = pa.array([b"fine", b"caf\xe9"], pa.binary())
    pq.write_table(pa.table({"text": binary.view(pa.string())}), tmp_path / "a.parquet")
    column = pq.read_table(tmp_path / "a.parquet")["text"].chunk(0)
    assert column.type == pa.string()
    assert join(column) == (
        ["fine", None],
        {1: "invalid_utf8: byte 0xe9 at offset 3 of column 'text'"},
    )


def test_the_first_column_at_fault_is_named() -> None:
    errors = join(pa.array([b"\xff"], pa.binary()), pa.array([1]))[1]
    assert errors == {0: "invalid_utf8: byte 0xff at offset 0 of column 'text'"}


def test_no_rows_give_no_texts() -> None:
    assert join(pa.array([], pa.string())) == ([], {})


def test_a_value_of_64_mib_is_read_whole() -> None:
    texts, errors = join(pa.array(["x" * 2**26, "y"], pa.large_string()))
    assert [len(text or "") for text in texts] == [2**26, 1]
    assert errors == {}


@given(st.lists(st.tuples(st.none() | st.binary(max_size=6), st.none() | st.text(max_size=3))))
def test_rows_in_are_rows_out_and_each_has_a_text_or_an_error(
    rows: list[tuple[bytes | None, str | None]],
) -> None:
    title = pa.array([row[0] for row in rows], pa.binary())
    body = pa.array([row[1] for row in rows], pa.string())
    texts, errors = join(title, body)
    assert len(texts) == len(rows)
    assert [row for row, text in enumerate(texts) if text is None] == sorted(errors)


# --- normalisation -----------------------------------------------------------------------------

cased = st.text(st.sampled_from("aΣ\u03c3ςİIßǅ'.\u0301\u00ad\u180e\u200b1" + SPACES), max_size=30)


@given(st.text() | cased, st.integers(1, 6))
def test_the_first_words_of_a_normalised_text_are_those_of_the_whole(text: str, num: int) -> None:
    whole = " ".join(text.lower().split())
    assert normalise(text, "lower+collapse") == whole
    assert normalise(text, "lower+collapse", num) == " ".join(whole.split(" ")[:num])


def test_no_character_turns_into_white_space_or_out_of_it_in_lower_case() -> None:
    assert all(char.lower() == char for char in UNICODE if char.isspace())
    assert not any(lower.isspace() for c in UNICODE if not c.isspace() for lower in c.lower())


def test_capital_sigma_looks_no_further_than_white_space() -> None:
    spaces = [char for char in BMP if char.isspace()]
    assert all(f"aΣ{space}a".lower() == f"aς{space}a" for space in spaces)
    assert all(f"a{space}Σa".lower() == f"a{space}\u03c3a" for space in spaces)


@given(st.text())
def test_normalisation_none_leaves_a_text_as_it_is(text: str) -> None:
    assert normalise(text, "none") == text
    assert normalise(text, "none", 1) == text


# --- tokenizers --------------------------------------------------------------------------------


def train(pre_tokenizer: Any = None) -> Tokenizer:
    """A small byte-level BPE of GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 10, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train()


@pytest.fixture(scope="module", params=["trained", "gpt2"])
def tokenizer(request: pytest.FixtureRequest, trained: Tokenizer) -> Tokenizer:
    if request.param == "trained":
        return trained
    if not GPT2.is_dir():
        pytest.skip("the GPT-2 vocabulary is not here")
    gpt2 = Tokenizer(models.BPE.from_file(str(GPT2 / "vocab.json"), str(GPT2 / "merges.txt")))
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.add_special_tokens([END])
    return gpt2


def rows_of(encoded: Encoded) -> list[list[int]]:
    return [row.tolist() for row in np.split(encoded.ids, encoded.offsets[1:-1])]


def check_against_whole_texts(
    tokenizer: Tokenizer, texts: list[str], encoder: TextEncoder, how: str = "none"
) -> None:
    """Ids, counts and `truncated` are those of the tokens of the whole texts."""
    assert encoder.cuts
    if how != "none":
        texts = [" ".join(text.lower().split()) for text in texts]
    whole = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    encoded = encoder.encode(texts)
    assert rows_of(encoded) == [ids[: encoder.max_length] for ids in whole]
    assert encoded.truncated.tolist() == [len(ids) > encoder.max_length for ids in whole]
    assert encoded.num_tokens.tolist() == [min(len(ids), encoder.max_length) for ids in whole]
    assert set(encoded.errors) == {row for row, ids in enumerate(whole) if not ids}


pieces = st.one_of(
    st.text(max_size=8),
    st.text(st.sampled_from(SPACES), min_size=1, max_size=5),
    st.sampled_from(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", " '", "' ", "'r e", "'l"]),
    st.sampled_from([END, END[:-1], END[1:], f" {END}", f"{END} ", f"'{END}'"]),
    st.sampled_from(["word", " the", "  12", " 3,4", "😀", "新聞", "é", "e\u0301", "\r\n", "\0"]),
    st.tuples(st.sampled_from(["a", " ", "=", "1", "'s", "\n", "語", "\x85", "\x1c"])).map(
        lambda run: run[0] * 90
    ),
)
texts = st.lists(pieces, max_size=40).map("".join)


@pytest.mark.parametrize("max_length", [1, 2, 3, 16])
@settings(max_examples=150)
@given(rows=st.lists(texts, min_size=1, max_size=4))
def test_a_cut_text_has_the_tokens_of_the_whole_text(
    tokenizer: Tokenizer, max_length: int, rows: list[str]
) -> None:
    check_against_whole_texts(tokenizer, rows, encoder_of(tokenizer, max_length))


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(texts, st.integers(1, 40)), min_size=1, max_size=3))
def test_a_cut_text_has_the_tokens_of_the_whole_text_at_128(
    tokenizer: Tokenizer, rows: list[tuple[str, int]]
) -> None:
    check_against_whole_texts(
        tokenizer, [text * times for text, times in rows], encoder_of(tokenizer, 128)
    )


@settings(max_examples=100)
@given(rows=st.lists(texts, min_size=1, max_size=3), max_length=st.sampled_from([1, 3, 16]))
def test_a_cut_and_normalised_text_has_the_tokens_of_the_whole_normalised_text(
    tokenizer: Tokenizer, rows: list[str], max_length: int
) -> None:
    encoder = encoder_of(tokenizer, max_length, "lower+collapse")
    check_against_whole_texts(tokenizer, rows, encoder, "lower+collapse")


@pytest.mark.parametrize("max_length", [1, 3])
def test_every_character_of_the_basic_plane_may_stand_before_at_and_after_a_cut(
    tokenizer: Tokenizer, max_length: int
) -> None:
    start = "a" * int(5.5 * (max_length + 1) - 3)
    rows = [f"{start}#b# ## # #c '#s #\n#d#".replace("#", char) for char in BMP]
    check_against_whole_texts(tokenizer, rows, encoder_of(tokenizer, max_length))


def test_many_texts_have_the_tokens_of_each_alone(tokenizer: Tokenizer) -> None:
    texts = [f"{number} {line}" * (number % 7 + 1) for number in range(40) for line in CORPUS]
    encoder = TextEncoder(tokenizer, 64)
    alone = [encoder.encode([text]).ids.tolist() for text in texts]
    assert encoder.encode(texts).ids.tolist() == [token for ids in alone for token in ids]


def test_white_space_here_is_white_space_in_the_expression_of_the_tokenizer() -> None:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    here = {char for char in UNICODE if char.isspace()}
    # Two of a kind are one word, unless they are white space before something else.
    there = {
        char
        for char in UNICODE
        if len(splitter.pre_tokenize_str(f".{char}{char}.")) == (3 if char == " " else 4)
    }
    there -= {char for char in UNICODE if char.isalnum()}
    assert here - there == set("\x1c\x1d\x1e\x1f")
    assert there <= here
    assert {char for char in UNICODE if text_module._BREAK.search(f"a{char}")} <= there


def test_what_stands_before_a_break_is_split_into_words_like_the_whole_text() -> None:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for char in BMP:
        text = f".{char} {char}.'{char} s{char}\n1{char}"
        words = splitter.pre_tokenize_str(text)
        for found in text_module._BREAK.finditer(text):
            before = splitter.pre_tokenize_str(text[: found.start()])
            assert before == words[: len(before)]


encoders: dict[tuple[int, int, str], tuple[Tokenizer, TextEncoder]] = {}


def encoder_of(tokenizer: Tokenizer, max_length: int, how: Any = "none") -> TextEncoder:
    """An encoder, kept with its tokenizer: making one for GPT-2 takes a fifth of a second."""
    key = (id(tokenizer), max_length, how)
    if key not in encoders:
        encoders[key] = (tokenizer, TextEncoder(tokenizer, max_length, how))
    return encoders[key][1]


# --- what is cut, and what is not --------------------------------------------------------------


def test_a_long_text_is_tokenised_only_as_far_as_it_is_seen(trained: Tokenizer) -> None:
    encoder = TextEncoder(trained, 3)
    spy = spy_on(encoder)
    encoder.encode(["the end of the market " * 1000])
    assert [len(text) for text in spy.seen] == [25]


def test_a_text_of_long_tokens_is_cut_again_further_on(trained: Tokenizer) -> None:
    encoder = TextEncoder(trained, 3)
    spy = spy_on(encoder)
    encoded = encoder.encode(["aaaaaaaaaaaaaaaa aaaaaaaaaaaaaaaa " * 1000])
    assert [len(text) for text in spy.seen] == [33, 50]
    assert encoded.num_tokens.tolist() == [3]


def test_the_tokenizer_that_was_passed_in_is_left_as_it_was(trained: Tokenizer) -> None:
    before = trained.to_str()
    TextEncoder(trained, 3).encode(["the end of the market"])
    assert trained.to_str() == before


def test_padding_and_truncation_of_the_tokenizer_do_not_count() -> None:
    tokenizer = train()
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(2, direction="left")
    plain = train()
    texts = ["the end of the market", "x"]
    encoded = TextEncoder(tokenizer, 3).encode(texts)
    assert rows_of(encoded) == [ids.ids[:3] for ids in plain.encode_batch(texts)]


def test_the_end_of_text_string_stays_split_up_where_the_tokenizer_splits_it() -> None:
    tokenizer = train()
    tokenizer.encode_special_tokens = True
    text = f"one{END} two"
    encoded = TextEncoder(tokenizer, 50).encode([text])
    assert rows_of(encoded) == [tokenizer.encode(text).ids]
    assert tokenizer.token_to_id(END) not in encoded.ids


def add(token: AddedToken) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: tokenizer.add_tokens([token])


def put(name: str, part: Any) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: setattr(tokenizer, name, part)


BYTES = pre_tokenizers.ByteLevel
ALPHABET = sorted(BYTES.alphabet())
BYTE_VOCABULARY = {byte: i for i, byte in enumerate(ALPHABET)}


def byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = BYTES(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        add(AddedToken("two words")),
        add(AddedToken("tab\t")),
        add(AddedToken("<mask>", lstrip=True)),
        add(AddedToken("<mask>", rstrip=True)),
        add(AddedToken("mask", single_word=True)),
        put("normalizer", normalizers.Lowercase()),
        put("pre_tokenizer", BYTES(add_prefix_space=True)),
        put("pre_tokenizer", BYTES(add_prefix_space=False, use_regex=False)),
        put("pre_tokenizer", pre_tokenizers.Whitespace()),
        put("pre_tokenizer", pre_tokenizers.Sequence([BYTES(add_prefix_space=False)])),
        put("post_processor", processors.TemplateProcessing(f"{END} $A", None, [(END, 0)])),
    ],
)
def test_a_tokenizer_for_which_a_cut_may_not_be_exact_gets_whole_texts(
    change: Callable[[Tokenizer], None],
) -> None:
    tokenizer = train()
    change(tokenizer)
    encoder = TextEncoder(tokenizer, 6)
    assert not encoder.cuts
    texts = ["Two words <mask> tab\t and  mask  the end" * 9, "x", f"{END} two words"]
    tokenizer.no_truncation()
    whole = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    tokenizer.enable_truncation(6)
    encoded = encoder.encode(texts)
    assert rows_of(encoded) == [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    assert encoded.truncated.tolist() == [len(ids) > 6 for ids in whole]


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({byte: i for i, byte in enumerate(ALPHABET[1:])}, []),
        models.BPE(BYTE_VOCABULARY, [], dropout=0.1),
        models.BPE(BYTE_VOCABULARY, [], continuing_subword_prefix="##"),
        models.BPE(BYTE_VOCABULARY, [], end_of_word_suffix="</w>"),
        models.WordLevel(BYTE_VOCABULARY, unk_token="a"),
    ],
)
def test_a_model_that_may_drop_characters_or_look_at_word_ends_gets_whole_texts(
    model: models.Model,
) -> None:
    assert TextEncoder(byte_level(models.BPE(BYTE_VOCABULARY, [])), 6).cuts
    assert not TextEncoder(byte_level(model), 6).cuts


@pytest.mark.parametrize(
    "post_processor",
    [
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing("$A", "$A $B:1", []),
    ],
)
def test_a_post_processor_that_adds_nothing_does_not_keep_texts_from_being_cut(
    post_processor: Any,
) -> None:
    tokenizer = train()
    tokenizer.post_processor = post_processor
    check_against_whole_texts(tokenizer, ["the end of it " * 99], TextEncoder(tokenizer, 6))


def test_special_tokens_at_both_ends_survive_truncation() -> None:
    tokenizer = train()
    tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A {END}", None, [(END, 0)])
    encoded = TextEncoder(tokenizer, 4).encode(["the end of the market", None, "x"])
    rows = rows_of(encoded)
    assert [len(row) for row in rows] == [4, 0, 3]
    assert [row[:: len(row) - 1] for row in rows if row] == [[0, 0], [0, 0]]
    assert encoded.truncated.tolist() == [True, False, False]


@pytest.mark.parametrize("max_length", [-1, 0, 1, 2])
def test_a_length_without_room_for_text_is_refused(max_length: int) -> None:
    tokenizer = train()
    tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A {END}", None, [(END, 0)])
    with pytest.raises(ConfigError, match="leaves no room for text"):
        TextEncoder(tokenizer, max_length)


def test_an_unknown_normalisation_is_refused(trained: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"'upper'; known are none, lower\+collapse"):
        TextEncoder(trained, 3, "upper")  # type: ignore[arg-type]


# --- rows --------------------------------------------------------------------------------------


def test_rows_without_text_have_no_tokens_and_no_error(trained: Tokenizer) -> None:
    encoded = TextEncoder(trained, 3).encode([None, "the end of the market", None])
    assert encoded.num_tokens.tolist() == [0, 3, 0]
    assert encoded.truncated.tolist() == [False, True, False]
    assert encoded.errors == {}


@pytest.mark.parametrize("rows", [[], [None], [None, None]])
def test_no_texts_give_no_tokens(trained: Tokenizer, rows: list[None]) -> None:
    encoded = TextEncoder(trained, 3).encode(rows)
    assert encoded.offsets.tolist() == [0] * (len(rows) + 1)
    assert (encoded.ids.tolist(), encoded.truncated.tolist()) == ([], [False] * len(rows))


def test_a_text_that_the_tokenizer_makes_nothing_of_is_an_error() -> None:
    encoded = TextEncoder(byte_level(models.BPE({"a": 0}, [])), 3).encode(["aa", "b", None])
    assert encoded.errors == {1: "empty_text: the tokenizer makes no tokens of it"}
    assert encoded.num_tokens.tolist() == [2, 0, 0]


def test_rows_have_equal_bytes_exactly_where_their_ids_are_equal(trained: Tokenizer) -> None:
    encoded = TextEncoder(trained, 2).encode(["the end is", "the end was", "", "x", None])
    first, second, *rest = encoded.row_bytes()
    assert first == second == encoded.ids[:2].tobytes()
    assert [len(row) for row in rest] == [0, 4, 0]


def test_the_arrays_have_the_types_that_are_promised(trained: Tokenizer) -> None:
    encoded = TextEncoder(trained, 2).encode(["the end of it", "x"])
    kinds = [encoded.ids, encoded.offsets, encoded.truncated, encoded.num_tokens]
    assert [array.dtype for array in kinds] == [np.int32, np.int64, np.bool_, np.int32]


# --- texts without a place to cut --------------------------------------------------------------


def test_a_mebibyte_without_spaces_is_tokenised_exactly(tokenizer: Tokenizer) -> None:
    unbroken = "".join(itertools.islice(itertools.cycle("newspaper1,"), 2**20))
    check_against_whole_texts(tokenizer, [unbroken, "x"], encoder_of(tokenizer, 128))


@pytest.mark.parametrize("how", ["none", "lower+collapse"])
@pytest.mark.parametrize("run", ["a", "語"])
def test_64_mib_without_spaces_is_an_error_of_its_row_alone(
    trained: Tokenizer, run: str, how: Any
) -> None:
    encoded = encoder_of(trained, 128, how).encode(["x", run * (2**26 // len(run.encode())), "y"])
    assert encoded.num_tokens.tolist() == [1, 0, 1]
    assert encoded.errors == {
        1: f"unbroken_text: no place to cut it in its first {MAX_UNBROKEN_BYTES} bytes"
    }


@pytest.mark.parametrize("how", ["none", "lower+collapse"])
def test_64_mib_of_words_is_cut_like_any_text(trained: Tokenizer, how: Any) -> None:
    encoded = encoder_of(trained, 128, how).encode(["the end " * 2**23])
    assert rows_of(encoded) == [trained.encode("the end " * 100).ids[:128]]
    assert encoded.truncated.tolist() == [True]


def test_64_mib_of_white_space_between_two_words_collapse(trained: Tokenizer) -> None:
    encoded = encoder_of(trained, 128, "lower+collapse").encode(["The" + " " * 2**26 + "End"])
    assert rows_of(encoded) == [trained.encode("the end").ids]


def test_a_first_word_of_the_longest_size_is_tokenised(
    trained: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "MAX_UNBROKEN_BYTES", 100)
    encoder = TextEncoder(trained, 3)
    longest, longer = "x" * 100, "x" * 101
    assert encoder.encode([longest, f"{longest} y"]).errors == {}
    assert list(encoder.encode([longer, f"{longer} y", "é" * 51]).errors) == [0, 1]


def test_a_tokenizer_that_cannot_cut_gets_no_text_that_is_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_module, "MAX_UNBROKEN_BYTES", 100)
    tokenizer = train(BYTES(add_prefix_space=True))
    for how in ("none", "lower+collapse"):
        encoded = encoder_of(tokenizer, 3, how).encode(["a " * 50, "a " * 51])
        assert list(encoded.errors) == [1]


@given(st.lists(st.integers(0, 2 * MAX_UNBROKEN_BYTES), max_size=30))
def test_what_is_tokenised_at_once_is_bounded_but_for_single_rows(sizes: list[int]) -> None:
    array: npt.NDArray[np.int64] = np.array(sizes, dtype=np.int64)
    chunks = list(text_module._chunks(array))
    assert [row for start, end in chunks for row in range(start, end)] == list(range(len(sizes)))
    for start, end in chunks:
        assert sum(sizes[start:end]) <= MAX_UNBROKEN_BYTES or end - start == 1


class Spy:
    """A tokenizer that remembers what it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.seen: list[str] = []
        self._tokenizer = tokenizer

    def encode_batch_fast(self, texts: list[str]) -> Any:
        self.seen += texts
        return self._tokenizer.encode_batch_fast(texts)

    def encode(self, text: str) -> Any:
        self.seen.append(text)
        return self._tokenizer.encode(text)


def spy_on(encoder: TextEncoder) -> Spy:
    spy = Spy(encoder._tokenizer)
    encoder._tokenizer = spy
    return spy
