import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from batchclf.config import ReadSettings
from batchclf.serve.media import CSV, JSON, JSON_LINES, PARQUET, MediaType
from batchclf.serve.refusal import Refusal
from batchclf.serve.rows import Rows, read_rows
from batchclf.serve.settings import Limits

LIMITS = Limits(max_rows=100, max_body_bytes=1 << 20)


def read(body: object, kind: str = JSON, settings: ReadSettings | None = None) -> Rows:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_rows(content, MediaType(kind), settings or ReadSettings(), LIMITS)


def parquet(columns: dict[str, object]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


# Everything that JSON can say, lone surrogates too.
characters = st.characters(exclude_categories=()) | st.sampled_from(" \t\n\u00a0\ud800é日")
texts = st.text(characters, max_size=20)
instances = st.fixed_dictionaries(
    {}, optional={"text": texts | st.none() | st.integers() | st.lists(texts), "id": texts}
)


@given(st.lists(st.fixed_dictionaries({"text": texts}), min_size=1, max_size=5))
def test_one_object_is_read_as_it_is_in_a_list(rows: list[dict[str, str]]) -> None:
    together = read(rows)
    for row, content in enumerate(rows):
        alone = read(content)
        assert alone.texts == [together.texts[row]]
        assert alone.errors.get(0) == together.errors.get(row)


@given(st.lists(instances, min_size=1, max_size=6))
def test_a_list_is_read_as_the_same_rows_in_json_lines(rows: list[dict[str, object]]) -> None:
    rows = [{"text": "first"}, *rows]  # a text column that shows up nowhere is refused
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    as_list, as_lines = read(rows), read(lines, JSON_LINES)
    assert as_list.texts == as_lines.texts
    assert as_list.errors == as_lines.errors
    assert [batch.to_pylist() for batch in as_list.kept] == [b.to_pylist() for b in as_lines.kept]


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ({"text": "a"}, "one"),
        ([{"text": "a"}], "list"),
        (["a"], "list"),
        ({"instances": [{"text": "a"}]}, "instances"),
        ({"instances": ["a"]}, "instances"),
    ],
)
def test_texts_may_stand_in_any_of_these_shapes(body: object, shape: str) -> None:
    rows = read(body)
    assert (rows.texts, rows.shape) == (["a"], shape)


@pytest.mark.parametrize("body", [5, "text", None, True, {"instances": 5}, {"instances": {}}])
def test_json_of_another_shape_is_refused(body: object) -> None:
    with pytest.raises(Refusal) as refused:
        read(body)
    assert (refused.value.status, refused.value.code) == (400, "wrong_shape")


@pytest.mark.parametrize("body", [b"", b"{", b'{"text": ', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        read(body)
    assert (refused.value.status, refused.value.code) == (400, "not_json")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"body": "a"}, JSON),
        (b"body\na\n", CSV),
        (b'{"body": "a"}\n', JSON_LINES),
        (parquet({"body": ["a"]}), PARQUET),
    ],
)
def test_a_missing_column_is_named_with_what_to_do(body: object, kind: str) -> None:
    with pytest.raises(
        Refusal, match=r"no text column 'text'.*text_column in the query"
    ) as refused:
        read(body, kind)
    assert refused.value.status == 400


def test_other_columns_can_be_the_text() -> None:
    rows = read({"title": "a", "body": "b"}, settings=ReadSettings(("title", "body")))
    assert rows.texts == ["a\nb"]


def test_a_csv_without_a_header_holds_the_text_columns_alone() -> None:
    media = MediaType(CSV, {"header": "absent"})
    rows = read_rows(b'"a, b"\n\nc\nd,e\n', media, ReadSettings(), LIMITS)
    assert rows.texts == ["a, b", "c", None]
    assert rows.errors == {2: "unparseable: 2 fields where the header has 1"}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ([{"text": "a"}] * 101, JSON),
        (b"text\n" + b"a\n" * 101, CSV),
        (b'{"text": "a"}\n' * 101, JSON_LINES),
        (parquet({"text": ["a"] * 101}), PARQUET),
    ],
)
def test_more_rows_than_allowed_are_refused(body: object, kind: str) -> None:
    with pytest.raises(Refusal) as refused:
        read(body, kind)
    assert (refused.value.status, refused.value.code) == (413, "too_many_rows")


def test_a_small_parquet_that_is_large_in_memory_is_refused() -> None:
    body = parquet({"text": ["a" * (1 << 20)] * 50})
    assert len(body) < LIMITS.max_body_bytes
    with pytest.raises(Refusal) as refused:
        read(body, PARQUET)
    assert (refused.value.status, refused.value.code) == (413, "body_too_large")


@pytest.mark.parametrize("kind", [CSV, JSON_LINES, PARQUET])
@given(body=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(kind: str, body: bytes) -> None:
    try:
        rows = read(body, kind)
    except Refusal:
        return
    assert all((text is None) == (row in rows.errors) for row, text in enumerate(rows.texts))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_parquet_is_refused(share: float) -> None:
    whole = parquet({"text": ["some text"] * 50})
    with pytest.raises(Refusal) as refused:
        read(whole[: int(share * len(whole))], PARQUET)
    assert (refused.value.status, refused.value.code) == (400, "unreadable")
