"""Inputs, outputs and models that are too large, too many, not there or not what is wanted."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from e2e import archives, outputs
from e2e.conftest import QUIET
from models import byte_level_tokenizer, edit_json
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from conftest import RunBatchclf
    from e2e.conftest import Classify

MIB = 1 << 20
NUM_COLUMNS = 2000
NUM_TINY_FILES = 1000


def spoken(num_bytes: int) -> str:
    """An article of so many bytes."""
    phrase = "The council voted on Tuesday. "
    return (phrase * (num_bytes // len(phrase) + 1))[:num_bytes]


@pytest.mark.slow
def test_rows_of_64_mib_are_labelled_where_they_can_be_cut_and_marked_where_not(
    classify: "Classify", tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [{"id": name} for name in ("words", "unbroken", "no-spaces", "short")]
    texts = (spoken(64 * MIB), "a" * (64 * MIB), "b" * MIB, "Two goals.")
    for row, text in zip(rows, texts, strict=True):
        row["text"] = text
    archives.write(folder / "a.parquet", rows)
    archives.write(folder / "b.csv", [rows[0], *rows[2:]])
    archives.write(folder / "c.jsonl.gz", [rows[0], *rows[2:]])
    done = classify(folder, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for name, found in outputs.read_sources(tmp_path / "out").items():
        by_id = {row["id"]: row for row in found}
        for row_id in ("words", "no-spaces"):
            assert by_id[row_id]["error"] is None, (name, row_id)
            assert (by_id[row_id]["n_tokens"], by_id[row_id]["truncated"]) == (64, True)
        assert by_id["short"]["label"] is not None
        if name == "a.parquet":
            assert by_id["unbroken"]["error"].startswith("unbroken_text: ")
            assert by_id["unbroken"]["label"] is None


def test_2000_columns_are_kept(classify: "Classify", tmp_path: Path) -> None:
    columns = {f"column {number}": [number, None] for number in range(NUM_COLUMNS)}
    table = pa.table({"text": ["Two goals.", "No goals."], **columns})
    pq.write_table(table, tmp_path / "wide.parquet")
    done = classify(
        tmp_path / "wide.parquet", "--output", tmp_path / "out", "--keep-columns", "all"
    )
    assert done.returncode == 0, done.stderr
    found = outputs.read_source(tmp_path / "out", "wide.parquet")
    assert found.num_columns == NUM_COLUMNS + 1 + 7
    assert found.select(table.schema.names).equals(table)


def test_a_missing_column_among_2000_is_told_of_in_few_words(
    classify: "Classify", tmp_path: Path
) -> None:
    pq.write_table(
        pa.table({f"column {number}": [number] for number in range(NUM_COLUMNS)}),
        tmp_path / "wide.parquet",
    )
    done = classify(tmp_path / "wide.parquet", "--output", tmp_path / "out")
    assert done.returncode == 65
    assert "column 0, column 1" in done.stderr
    assert "more" in done.stderr
    assert len(done.stderr) < 1000


@pytest.mark.slow
def test_a_thousand_tiny_files_are_a_thousand_outputs(classify: "Classify", tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, row in enumerate(archives.articles(NUM_TINY_FILES)):
        archives.write(folder / f"{number:04}.jsonl", [row])
    done = classify(folder, "--output", tmp_path / "out", "--log-format", "json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["num_shards"]["committed"] == NUM_TINY_FILES
    assert summary["counts"]["num_rows"] == NUM_TINY_FILES
    assert summary["complete"]
    assert len(outputs.output_files(tmp_path / "out")) == NUM_TINY_FILES


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gone.csv", "gone.csv: no such file or folder"),
        ("empty", "no .parquet, .csv, .csv.gz, .jsonl or .jsonl.gz files"),
        ("*.parquet", "no .parquet, .csv, .csv.gz, .jsonl or .jsonl.gz files"),
        ("notes.txt", "not a .parquet, .csv"),
        ("long" * 100 + ".csv", "File name too long"),
    ],
)
def test_an_input_that_is_not_there_ends_the_run_at_once(
    classify: "Classify", tmp_path: Path, given: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes\n")
    done = classify(given, "--output", "out", cwd=tmp_path)
    assert done.returncode == 65
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_named_twice_is_read_once(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    inputs = (archive / "a.parquet", archive / "*.parquet", archive / "a.parquet")
    done = classify(*inputs, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(outputs.read_sources(tmp_path / "out")["a.parquet"]) == 10


def test_odd_file_names_are_no_trouble(
    classify: "Classify", run_batchclf: "RunBatchclf", tmp_path: Path
) -> None:
    names = ["ä ö+%?#.csv", "-.csv", "x" * 240 + ".csv", "new\nline.csv", "UPPER.CSV", "a[1].csv"]
    (tmp_path / "in").mkdir()
    for number, name in enumerate(names):
        archives.write(tmp_path / "in" / name, archives.articles(2, seed=number))
    done = classify("in", "in/a[1].csv", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("in 'in/a[1].csv'"), "to be pasted into a shell"
    assert sorted(outputs.read_sources(tmp_path / "out")) == sorted(names)
    verdict = run_batchclf("verify", "out", "in", env=QUIET, cwd=tmp_path)
    assert verdict.returncode == 0, verdict.stdout


@pytest.mark.parametrize("output", ["in", "in/out", "other/../in/out", "link/out"])
def test_an_output_inside_the_input_is_refused(
    classify: "Classify", tmp_path: Path, output: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    archives.write(tmp_path / "in" / "news.csv", archives.articles(2))
    done = classify("in", "--output", output, cwd=tmp_path)
    assert done.returncode == 64
    assert "inside the input" in done.stderr
    assert "choose an output beside it" in done.stderr
    assert list((tmp_path / "in").iterdir()) == [tmp_path / "in" / "news.csv"]


def test_an_output_that_is_the_input_file_is_refused(classify: "Classify", tmp_path: Path) -> None:
    news = archives.write(tmp_path / "news.csv", archives.articles(2))
    before = news.read_bytes()
    done = classify(news, "--output", news)
    assert done.returncode == 64, done.stderr
    assert f"inside the input {news}" in done.stderr
    assert news.read_bytes() == before


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    yield folder
    folder.chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_may_not_be_written_is_refused(
    classify: "Classify", archive: Path, read_only: Path
) -> None:
    done = classify(archive, "--output", read_only / "out")
    assert done.returncode == 64
    assert "Permission denied" in done.stderr
    assert "may write to" in done.stderr


def test_an_output_below_a_file_is_refused(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder\n")
    done = classify(archive, "--output", tmp_path / "file" / "out")
    assert done.returncode == 64
    assert str(tmp_path / "file") in done.stderr
    assert "choose a folder" in done.stderr


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def with_a_larger_tokenizer(model: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<too>", "<many>"])
    tokenizer.save(str(model / "tokenizer.json"))


def with_nan(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def of_another_kind(model: Path) -> None:
    edit_json(
        model / "config.json",
        model_type="bert",
        architectures=["BertForSequenceClassification"],
    )


def with_a_pickle_only(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def cut_short(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def that_is_empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def that_is_not_there(model: Path) -> None:
    shutil.rmtree(model)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_tokenizer, ("no tokenizer", "tokenizer.json", "save_pretrained")),
        (with_a_larger_tokenizer, ("tokenizer.json", "'<many>'", "below 400")),
        (with_nan, ("transformer.h.0.mlp.c_fc.weight", "NaN")),
        (of_another_kind, ("config.json", "bert", "gpt2")),
        (with_a_pickle_only, ("pickle", "pytorch_model.bin", "save_pretrained")),
        (cut_short, ("model.safetensors", "cut short")),
        (that_is_empty, ("config.json",)),
        (that_is_not_there, ("no model directory",)),
    ],
)
def test_a_model_directory_that_is_no_good_is_refused(
    run_batchclf: "RunBatchclf",
    model: Path,
    archive: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    words: tuple[str, ...],
) -> None:
    bad = Path(shutil.copytree(model, tmp_path / "bad model"))
    spoil(bad)
    done = run_batchclf(
        *("classify", archive, "--model", bad, "--output", tmp_path / "out"), env=QUIET
    )
    assert done.returncode == 64, done.stderr
    (message,) = done.stderr.splitlines()
    assert message.startswith("Error: ")
    assert str(bad) in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_that_cannot_be_had_is_refused(
    run_batchclf: "RunBatchclf", archive: Path, tmp_path: Path
) -> None:
    done = run_batchclf(
        *("classify", archive, "--model", "nobody/nothing", "--output", tmp_path / "out"),
        env={**QUIET, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 64, done.stderr
    assert "nobody/nothing" in done.stderr


def test_a_maximum_length_that_the_model_cannot_read_is_refused(
    classify: "Classify", archive: Path, tmp_path: Path
) -> None:
    done = classify(archive, "--output", tmp_path / "out", "--max-length", "65")
    assert done.returncode == 64
    assert "1 to 64" in done.stderr
