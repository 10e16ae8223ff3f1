import pytest
from hypothesis import given, strategies as st

from batchclf.serve.media import (
    CSV,
    JSON,
    JSON_LINES,
    KNOWN,
    PARQUET,
    MediaType,
    choose_media_type,
    parse_media_type,
)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("application/json", JSON),
        ("Application/JSON; charset=utf-8", JSON),
        ("text/csv", CSV),
        ("application/x-ndjson", JSON_LINES),
        ("application/jsonlines", JSON_LINES),
        ("application/x-parquet", PARQUET),
        ("application/vnd.apache.parquet", PARQUET),
    ],
)
def test_a_content_type_is_known_by_its_name_in_any_case(written: str, name: str) -> None:
    media = parse_media_type(written)
    assert media is not None
    assert media.name == name


@pytest.mark.parametrize("written", ["", "text/html", "application", "/", ";;", "json"])
def test_another_content_type_is_not_known(written: str) -> None:
    assert parse_media_type(written) is None


def test_a_csv_has_a_header_unless_it_says_otherwise() -> None:
    with_header, without = parse_media_type("text/csv"), parse_media_type("text/csv; header=absent")
    assert with_header is not None
    assert without is not None
    assert (with_header.has_header, without.has_header) == (True, False)


@pytest.mark.parametrize(
    ("accept", "name"),
    [
        (None, CSV),
        ("", CSV),
        ("*/*", CSV),
        ("text/*", CSV),
        ("application/*", JSON),
        ("application/json", JSON),
        ("text/html, application/xml;q=0.9, */*;q=0.8", CSV),
        ("application/json;q=0.5, application/jsonlines", JSON_LINES),
        ("application/json;q=0, text/csv;q=0.1", CSV),
        ("application/json, text/csv", JSON),
    ],
)
def test_the_answer_has_the_type_that_the_client_likes_best(accept: str | None, name: str) -> None:
    chosen = choose_media_type(accept, MediaType(CSV))
    assert chosen is not None
    assert chosen.name == name


@pytest.mark.parametrize("accept", ["text/html", "image/*", "application/json;q=0"])
def test_a_client_that_takes_none_of_our_types_gets_none(accept: str) -> None:
    assert choose_media_type(accept, MediaType(CSV)) is None


def test_a_csv_without_a_header_is_answered_without_one() -> None:
    asked = MediaType(CSV, {"header": "absent"})
    assert choose_media_type("text/csv", asked) == asked


@given(st.text(st.characters(max_codepoint=255)) | st.text('application/json;,q=" *'))
def test_any_header_is_read_as_a_known_type_or_as_none(value: str) -> None:
    for found in (parse_media_type(value), choose_media_type(value, MediaType(CSV))):
        assert found is None or found.name in KNOWN
