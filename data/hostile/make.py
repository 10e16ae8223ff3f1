"""Write the hostile shards of this folder again: `python data/hostile/make.py [FOLDER]`.

No chance and no clock: the same libraries write the same bytes. What each file is for and what
must happen to it stands in README.md.
"""

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ARTICLE = "The council voted on Tuesday to reopen the ferry across the estuary before the summer."
END_OF_TEXT = "<|endoftext|>"

# id, what is odd about the row, text. The same rows stand in every format, as far as it can.
ROWS: tuple[tuple[str | None, str, str | None], ...] = (
    ("plain", "nothing", ARTICLE),
    ("null", "no text", None),
    ("empty", "empty text", ""),
    ("spaces", "white space alone", " \t\r\n\u00a0\u2003\u3000 "),
    ("one", "one character", "x"),
    ("emoji", "emoji, flags, joiners", "Fans 👩‍👩‍👧‍👦 celebrate 🏆🇮🇸 at the derby 👍🏽"),
    ("nul", "NUL bytes", "\0Shares\0fell\0"),
    ("control", "control characters", "Shares\x01fell\x1b[31m\x7f sharply\x85 and\u2028rose"),
    ("replacement", "characters that stand for bad ones", "caf\ufffd \ufffe\uffff"),
    ("combining", "letters made of parts", "Z\u0351\u036b\u0343a\u0300lgo " * 20),
    ("right-to-left", "two scripts, two directions", "فاز الفريق 3-1 في the final"),
    ("end", "the end-of-text string alone", END_OF_TEXT),
    ("end-inside", "the end-of-text string inside", f"{ARTICLE} {END_OF_TEXT} {ARTICLE}"),
    ("end-last", "the end-of-text string at the end", ARTICLE + END_OF_TEXT),
    ("no-spaces", "no space in 20,000 characters", "unbroken" * 2500),
    ("long-word", "a long word, then words", "a" * 3000 + " " + ARTICLE),
    ("twice", "an id that comes again", ARTICLE),
    ("twice", "an id that came before", ARTICLE.upper()),
    (None, "no id", ARTICLE),
    (None, "no id, no text", None),
)
COLUMNS = ("id", "what", "text")


def main() -> None:
    """Write them into the folder that is named, else beside this script."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (folder / name).write_bytes(content)


def files() -> dict[str, bytes]:
    """Name -> content."""
    return {
        **_odd_rows(),
        **_odd_types(),
        **_without_rows(),
        **_damaged(),
        **_misnamed(),
        **_odd_csv(),
        **_odd_columns(),
    }


def _odd_rows() -> dict[str, bytes]:
    ids, whats, texts = (list(column) for column in zip(*ROWS, strict=True))
    table = pa.table({"id": ids, "what": whats, "text": texts})
    lines = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    as_csv = _csv([COLUMNS, *([value or "" for value in row] for row in ROWS)])
    as_csv += b"latin-1,not UTF-8,caf\xe9 society\n"
    as_csv += b"surrogate,half a pair in three bytes,\xed\xa0\x80 and more\n"
    as_csv += b"overlong,a slash in two bytes,\xc0\xaf and more\n"
    as_csv += b"cut,a character cut short,a price of 10 \xe2\x82\n"
    as_jsonl = _jsonl(lines)
    as_jsonl += b'{"id": "surrogate", "what": "half a pair", "text": "\\ud83d and more"}\n'
    as_jsonl += b'{"id": "latin-1", "what": "not UTF-8", "text": "caf\xe9 society"}\n'
    as_jsonl += b'{"id": "number", "what": "a number", "text": 12.5}\n'
    as_jsonl += b'{"id": "boolean", "what": "a boolean", "text": true}\n'
    as_jsonl += b'{"id": "array", "what": "an array", "text": ["a", "b"]}\n'
    as_jsonl += b'{"id": "object", "what": "an object", "text": {"body": "a"}}\n'
    as_jsonl += b'{"id": "absent", "what": "no key text"}\n'
    as_jsonl += b'{"id": 7, "what": "an id that is a number", "text": "Seven goals"}\n'
    as_jsonl += b'{"id": "again", "what": "a key twice", "text": "first", "text": "second"}\n'
    as_jsonl += b"\n   \n"  # no rows
    as_jsonl += b"not JSON at all\n"
    as_jsonl += b'["an", "array"]\n'
    as_jsonl += b'"a string"\n'
    as_jsonl += b"[" * 5000 + b"\n"
    as_jsonl += b'{"id": "cut", "what": "a line cut short", "text": "The minis'
    return {
        "rows.parquet": _parquet(table),
        "rows.csv": as_csv,
        "rows.csv.gz": _gzip(as_csv),
        "rows.jsonl": as_jsonl,
        "rows.jsonl.gz": _gzip(as_jsonl),
    }


def _odd_types() -> dict[str, bytes]:
    bad = [ARTICLE.encode(), b"caf\xe9 society", None, b"\xed\xa0\x80", b""]
    ids = ["fine", "latin-1", "null", "surrogate", "empty"]
    as_binary = pa.array(bad, pa.binary())
    # pyarrow would not write this on purpose; other writers do.
    as_string = pa.Array.from_buffers(pa.string(), len(bad), as_binary.buffers())
    repeated = pa.array([ARTICLE, None, ARTICLE, "", ARTICLE]).dictionary_encode()
    return {
        "invalid-utf8.parquet": _parquet(pa.table({"id": ids, "text": as_string})),
        "binary-text.parquet": _parquet(pa.table({"id": ids, "text": as_binary})),
        "numbers.parquet": _parquet(pa.table({"id": ids, "text": pa.array([1, 2, None, 4, 5])})),
        "all-null.parquet": _parquet(pa.table({"id": ids, "text": pa.nulls(5)})),
        "dictionary-text.parquet": _parquet(pa.table({"id": ids, "text": repeated})),
    }


def _without_rows() -> dict[str, bytes]:
    empty = pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    return {
        "zero-rows.parquet": _parquet(empty),
        "zero-rows.csv": b"id,text\n",
        "zero-rows.csv.gz": _gzip(b"id,text\n"),
        "zero-rows.jsonl": b"\n\n",
        "zero-rows.jsonl.gz": _gzip(b""),
        "zero-bytes.parquet": b"",
        "zero-bytes.csv": b"",
        "zero-bytes.csv.gz": b"",
        "zero-bytes.jsonl": b"",
        "zero-bytes.jsonl.gz": b"",
    }


def _damaged() -> dict[str, bytes]:
    texts = [f"{ARTICLE} It is item {number} of the agenda." for number in range(50)]
    ids = [f"item-{number}" for number in range(50)]
    table = pa.table({"id": ids, "text": texts})
    # Neither compressed nor encoded: only the checksum can tell that a letter changed.
    whole = _parquet(table, compression="none", use_dictionary=False)
    as_gzip = _gzip(_csv([("id", "text"), *zip(ids, texts, strict=True)]))
    return {
        "truncated.parquet": whole[: len(whole) // 2],
        "flipped.parquet": _flip(whole, whole.index(b"item 25 of")),
        "truncated.csv.gz": as_gzip[: len(as_gzip) // 2],
        "flipped.csv.gz": _flip(as_gzip, len(as_gzip) - 6),  # in the checksum at its end
    }


def _misnamed() -> dict[str, bytes]:
    table = pa.table({"id": ["a"], "text": [ARTICLE]})
    as_csv = _csv([("id", "text"), ("a", ARTICLE)])
    return {
        "csv-inside.parquet": as_csv,
        "csv-inside.csv.gz": as_csv,
        "csv-inside.jsonl": as_csv,
        "gzip-inside.csv": _gzip(as_csv),
        "parquet-inside.csv": _parquet(table),
        "parquet-inside.jsonl": _parquet(table),
        "utf-16.csv": as_csv.decode().encode("utf-16"),
    }


def _odd_csv() -> dict[str, bytes]:
    return {
        "ragged.csv": (
            b"id,text,category\n"
            b"whole,The ferry is back,politics\n"
            b"short,The ferry is late\n"
            b"long,The ferry is full,politics,and more,and more\n"
            b"alone\n"
            b"\n"  # no row
            b"last,The ferry is gone,politics\n"
        ),
        "quoted.csv": (
            b"id,text\r\n"
            b'lines,"First line\nsecond line\r\nthird, with a comma"\r\n'
            b'quotes,"She said ""no"" twice"\r\n'
            b'inner,He said "yes" once\r\n'
            b"old,an old Mac's line\rends here\r\n"
        ),
        "never-closed.csv": (
            b"id,text\n"
            b"before,The ferry is back\n"
            b'opened,"The ferry is late\n'
            b"swallowed,The ferry is full\n"
            b"swallowed too,The ferry is gone\n"
        ),
        "bom.csv": b"\xef\xbb\xbfid,text\nbom,The ferry is back\n",
        "semicolons.csv": b"id;text\na;The ferry, at last, is back\n",
        "repeated-column.csv": b"id,text,text\na,The ferry is back,The ferry is late\n",
    }


def _odd_columns() -> dict[str, bytes]:
    missing = {"headline": ["The ferry is back"], "body": [ARTICLE]}
    collide = {
        "id": ["a", "b"],
        "text": [ARTICLE, None],
        "row": [70, 71],
        "label": ["theirs", "theirs too"],
        "Score": [0.5, None],
        "probs": [[0.1, 0.9], []],
        "error": [None, "an old error"],
        "input_label": ["taken", "taken too"],
    }
    return {
        "missing-text.parquet": _parquet(pa.table(missing)),
        "missing-text.csv": _csv([tuple(missing), *zip(*missing.values(), strict=True)]),
        "missing-text.jsonl": _jsonl([{name: value[0] for name, value in missing.items()}]),
        "collide.parquet": _parquet(pa.table(collide)),
        "nested.parquet": _parquet(_nested()),
    }


def _nested() -> pa.Table:
    published = [datetime(2024, 2, 29, 12, tzinfo=UTC), None]
    columns: dict[str, pa.Array] = {
        "id": pa.array(["a", "b"]),
        "text": pa.array([ARTICLE, ARTICLE.upper()]),
        "section": pa.array(["local", None]).dictionary_encode(),
        "author": pa.array([{"name": "Ana", "desk": {"city": "Porto"}}, None]),
        "tags": pa.array([["ferry", None], []]),
        "links": pa.array([[{"url": "https://example.org/1", "rank": 1}], None]),
        "counts": pa.array([[("likes", 3)], None], pa.map_(pa.string(), pa.int64())),
        "published": pa.array(published, pa.timestamp("us", "UTC")),
        "price": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
        "vector": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
        "thumbnail": pa.array([b"\x89PNG", None], pa.binary()),
        "large": pa.array([ARTICLE, None], pa.large_string()),
    }
    return pa.table(columns)


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True, **({"compression": "zstd"} | options))
    return sink.getvalue()


def _csv(rows: Sequence[Sequence[str | None]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    dump: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False).encode
    return "".join(f"{dump(row)}\n" for row in rows).encode()


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def _flip(content: bytes, place: int) -> bytes:
    """One bit of one byte changed."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


if __name__ == "__main__":
    main()
