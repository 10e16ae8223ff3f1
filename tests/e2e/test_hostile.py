"""Every file of `data/hostile` has the outcome that its README promises."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from e2e import outputs

if TYPE_CHECKING:
    from types import ModuleType

    from e2e.conftest import Classify

HOSTILE = Path(__file__).resolve().parents[2] / "data" / "hostile"
MOST_BYTES = 200_000
NO_INPUT = {"README.md", "make.py"}

# File -> words of the reason for which it cannot be read.
UNREADABLE = {
    "zero-bytes.parquet": "not a readable Parquet file",
    "zero-bytes.csv": "without even a header",
    "zero-bytes.csv.gz": "an empty file",
    "zero-bytes.jsonl.gz": "an empty file",
    "truncated.parquet": "not a readable Parquet file",
    "truncated.csv.gz": "damaged gzip",
    "flipped.parquet": "CRC checksum",
    "flipped.csv.gz": "damaged gzip",
    "csv-inside.parquet": "not a readable Parquet file",
    "csv-inside.csv.gz": "it is not gzip",
    "gzip-inside.csv": "it is gzip",
    "parquet-inside.csv": "it is Parquet",
    "parquet-inside.jsonl": "it is Parquet",
    "utf-16.csv": "UTF-16",
    "semicolons.csv": "set --delimiter ';'",
    "repeated-column.csv": "the text column 'text' stands there 2 times",
    "missing-text.parquet": "no text column 'text'; it has the columns headline, body",
    "missing-text.csv": "no text column 'text'; it has the columns headline, body",
    "missing-text.jsonl": "no text column 'text'; it has the columns headline, body",
}

FINE = None
ODD_ROWS = [
    *(FINE, "null_text", "empty_text", "empty_text"),  # plain, null, empty, spaces
    *[FINE] * 15,  # from one character to no id
    "null_text",  # no id, no text
]
ODD_CSV_ROWS = [code and "empty_text" for code in ODD_ROWS] + ["invalid_utf8"] * 4
ODD_JSON_ROWS = [
    *ODD_ROWS,
    *("invalid_utf8", "invalid_utf8"),  # surrogate, latin-1
    *("not_text", "not_text", "not_text", "not_text", "null_text"),  # number to absent
    *(FINE, FINE),  # a number as id, a key twice
    *("unparseable", "unparseable", "unparseable", "unparseable", "unparseable"),
]
BAD_BYTES = [FINE, "invalid_utf8", "null_text", "invalid_utf8", "empty_text"]

# File -> the error code of each row.
LABELLED: dict[str, list[str | None]] = {
    "rows.parquet": ODD_ROWS,
    "rows.csv": ODD_CSV_ROWS,
    "rows.csv.gz": ODD_CSV_ROWS,
    "rows.jsonl": ODD_JSON_ROWS,
    "rows.jsonl.gz": ODD_JSON_ROWS,
    "invalid-utf8.parquet": BAD_BYTES,
    "binary-text.parquet": BAD_BYTES,
    "numbers.parquet": ["not_text", "not_text", "null_text", "not_text", "not_text"],
    "all-null.parquet": ["null_text"] * 5,
    "dictionary-text.parquet": [FINE, "null_text", FINE, "empty_text", FINE],
    "zero-rows.parquet": [],
    "zero-rows.csv": [],
    "zero-rows.csv.gz": [],
    "zero-rows.jsonl": [],
    "zero-rows.jsonl.gz": [],
    "zero-bytes.jsonl": [],
    "csv-inside.jsonl": ["unparseable", "unparseable"],
    "ragged.csv": [FINE, "unparseable", "unparseable", "unparseable", FINE],
    "quoted.csv": [FINE, FINE, FINE, "unparseable"],
    "never-closed.csv": [FINE, "unparseable"],
    "bom.csv": [FINE],
    "collide.parquet": [FINE, "null_text"],
    "nested.parquet": [FINE, FINE],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def run(classify: "Classify", folder: Path) -> subprocess.CompletedProcess[str]:
    """One run over the whole folder, all columns kept."""
    options = ("--keep-columns", "all", "--log-format", "json")
    return classify(HOSTILE, "--output", folder / "out", *options)


@pytest.fixture(scope="module")
def rows(run: subprocess.CompletedProcess[str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    assert run.returncode == 65
    return outputs.read_sources(folder / "out")


@pytest.fixture(scope="module")
def make() -> "ModuleType":
    spec = importlib.util.spec_from_file_location("make_hostile", HOSTILE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_of_the_folder_is_expected_here_and_told_of_in_its_readme() -> None:
    names = {path.name for path in HOSTILE.iterdir() if path.is_file()} - NO_INPUT
    assert names == UNREADABLE.keys() | LABELLED.keys()
    readme = (HOSTILE / "README.md").read_text()
    for name in names:
        stem, _, ending = name.partition(".")
        endings = rf"(\.\*|\.{ending}|\.\w+`(, `[\w.]+`)*, `\.{ending})"
        assert re.search(rf"`{stem}{endings}`", readme), name


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in HOSTILE.iterdir()) < MOST_BYTES


def test_the_script_writes_the_files_that_are_here(make: "ModuleType") -> None:
    made = make.files()
    assert made.keys() == UNREADABLE.keys() | LABELLED.keys()
    for name, content in made.items():
        # other versions of Arrow and zlib write other bytes
        if name.endswith((".csv", ".jsonl")) and "-inside" not in name:
            assert (HOSTILE / name).read_bytes() == content, name


@pytest.mark.parametrize("name", LABELLED)
def test_a_readable_file_has_a_row_for_each_of_its_rows(
    rows: dict[str, list[dict[str, Any]]], name: str
) -> None:
    codes = [row["error"] and row["error"].partition(":")[0] for row in rows[name]]
    assert codes == LABELLED[name]
    assert [row["row"] for row in rows[name]] == list(range(len(codes)))
    for row in rows[name]:
        answered = [row[key] is not None for key in ("label", "score", "probs")]
        assert answered == [row["error"] is None] * 3
        assert (row["n_tokens"] > 0) == (row["error"] is None)


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_reported_with_its_reason_and_has_no_output(
    run: subprocess.CompletedProcess[str], rows: dict[str, list[dict[str, Any]]], name: str
) -> None:
    errors = json.loads(run.stdout)["errors"]
    (error,) = (error for error in errors if f"/{name}: " in error)
    assert UNREADABLE[name] in error
    assert name not in rows


def test_nothing_is_said_twice_and_nothing_looks_like_a_bug(
    run: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert len(json.loads(run.stdout)["errors"]) == len(UNREADABLE)
    logged = [json.loads(line) for line in run.stderr.splitlines()]
    assert sum(line["level"] == "error" for line in logged) == len(UNREADABLE)
    assert "Traceback" not in run.stderr
    assert not (outputs.fingerprint_folder(folder / "out") / "_SUCCESS.json").exists()


def test_reasons_of_bad_rows_say_where_and_what(rows: dict[str, list[dict[str, Any]]]) -> None:
    def reason(name: str, row_id: str) -> str:
        (found,) = (row["error"] for row in rows[name] if row["id"] == row_id)
        return str(found)

    assert reason("rows.csv", "latin-1") == ("invalid_utf8: byte 0xe9 at offset 3 of column 'text'")
    assert reason("rows.jsonl", "number") == "not_text: 'text' is a JSON number"
    assert reason("numbers.parquet", "fine") == "not_text: column 'text' is int64"
    assert reason("ragged.csv", "short") == "unparseable: 2 fields where the header has 3"
    assert "JSON array, not an object" in rows["rows.jsonl"][-4]["error"]
    assert "nested too deeply" in rows["rows.jsonl"][-2]["error"]
    assert "a quote in it is never closed" in rows["never-closed.csv"][1]["error"]


def test_what_can_be_read_of_a_bad_row_is_kept(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert rows["ragged.csv"][2]["category"] == "politics"
    assert rows["rows.csv"][20]["text"] == "caf\ufffd society"
    assert rows["invalid-utf8.parquet"][1]["text"] == "caf\ufffd society"
    assert rows["rows.jsonl"][22]["text"] == "12.5"
    assert rows["binary-text.parquet"][1]["text"] == b"caf\xe9 society"


def test_null_and_repeated_ids_are_kept_as_they_are(
    rows: dict[str, list[dict[str, Any]]], make: "ModuleType"
) -> None:
    assert [row["id"] for row in rows["rows.parquet"]] == [row_id for row_id, *_ in make.ROWS]


def test_texts_come_through_unchanged_in_every_format(
    rows: dict[str, list[dict[str, Any]]], make: "ModuleType"
) -> None:
    texts = [text for *_, text in make.ROWS]
    assert [row["text"] for row in rows["rows.parquet"]] == texts
    assert [row["text"] for row in rows["rows.jsonl"][: len(texts)]] == texts
    assert [row["text"] for row in rows["rows.csv"][: len(texts)]] == [t or "" for t in texts]


def test_the_same_text_has_the_same_answer_in_every_format(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    for name in ("rows.csv", "rows.csv.gz", "rows.jsonl", "rows.jsonl.gz"):
        for expected, row in zip(rows["rows.parquet"], rows[name], strict=False):
            if expected["error"] is None:
                assert row["label"] == expected["label"]
                assert row["probs"] == pytest.approx(expected["probs"], abs=1e-5)
                assert row["n_tokens"] == expected["n_tokens"]


def test_quoted_line_breaks_stay_in_the_text(rows: dict[str, list[dict[str, Any]]]) -> None:
    first, second, *_ = rows["quoted.csv"]
    assert first["text"] == "First line\nsecond line\r\nthird, with a comma"
    assert second["text"] == 'She said "no" twice'


def test_a_byte_order_mark_is_no_part_of_a_name(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert rows["bom.csv"][0]["id"] == "bom"


def test_columns_that_collide_with_ours_are_renamed(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    first = rows["collide.parquet"][0]
    assert (first["input_row"], first["row"]) == (70, 0)
    assert (first["input_Score"], first["input_probs"]) == (0.5, [0.1, 0.9])
    assert (first["input_label"], first["input_input_label"]) == ("taken", "theirs")
    lowered = [name.lower() for name in first]
    assert len(set(lowered)) == len(lowered)


def test_nested_and_dictionary_columns_are_kept(
    rows: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    source = pq.read_table(HOSTILE / "nested.parquet")
    found = outputs.read_source(folder / "out", "nested.parquet").select(source.schema.names)
    assert found.schema.remove_metadata() == source.schema.remove_metadata()
    assert found.to_pylist() == source.to_pylist()
    assert pa.types.is_dictionary(found.schema.field("section").type)


def test_outputs_without_rows_have_the_declared_types(
    rows: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    full = outputs.read_source(folder / "out", "rows.parquet").schema
    for name in ("zero-rows.parquet", "zero-rows.csv", "zero-bytes.jsonl", "all-null.parquet"):
        assert rows[name] == [] or name == "all-null.parquet"
        schema = outputs.read_source(folder / "out", name).schema
        for field in ("row", "label", "score", "probs", "n_tokens", "truncated", "error"):
            assert schema.field(field) == full.field(field), name


def test_a_dataset_reader_takes_the_answers_of_all_files_together(
    rows: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    dataset = ds.dataset(outputs.fingerprint_folder(folder / "out"))
    answers = dataset.to_table(columns=["row", "label", "score", "error"])
    assert answers.num_rows == sum(map(len, LABELLED.values()))


def test_another_delimiter_is_an_option(classify: "Classify", tmp_path: Path) -> None:
    (tmp_path / "tabs.csv").write_text("id\ttext\na\tThe ferry, at last; is back\n")
    for name, delimiter in ((HOSTILE / "semicolons.csv", ";"), (tmp_path / "tabs.csv", r"\t")):
        done = classify(name, "--output", tmp_path / "out", "--delimiter", delimiter)
        assert done.returncode == 0, done.stderr
    found = [pq.read_table(path, partitioning=None) for path in tmp_path.rglob("*.parquet")]
    assert [(t["id"].to_pylist(), t["error"].to_pylist()) for t in found] == [(["a"], [None])] * 2
