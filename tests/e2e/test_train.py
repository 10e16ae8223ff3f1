"""`batchclf train`: labelled files in, a model directory out that `classify` takes."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import RunBatchclf
from e2e import outputs
from e2e.conftest import QUIET
from transformers import AutoModelForSequenceClassification

WORDS = {"sport": "goal match cup team", "tech": "phone software chip web"}
CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category"])
        writer.writerows(rows)
    return path


def articles(count: int, start: int = 0) -> list[tuple[str, str]]:
    """Two labels that no word is shared by."""
    rows = []
    for number in range(start, start + count):
        label = ("sport", "tech")[number % 2]
        words = WORDS[label].split()
        text = " ".join(words[(number + step * (1 + number % 3)) % 4] for step in range(12))
        rows.append((f"{text} {number}", label))
    return rows


@pytest.fixture
def splits(tmp_path: Path) -> tuple[str | Path, ...]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return (
        *("--train", write(tmp_path / "train.csv", articles(120))),
        *("--val", write(tmp_path / "val.csv", articles(40, start=120))),
        *("--base-model", tmp_path / "config.json", "--vocab-size", "300", "--max-length", "32"),
        *("--learning-rate", "0.003", "--epochs", "6", "--output", tmp_path / "model"),
    )


def train(run_batchclf: RunBatchclf, *args: str | Path) -> Any:
    return run_batchclf("train", *args, env=QUIET)


def test_a_model_is_trained_from_scratch_and_labels_files(
    run_batchclf: RunBatchclf, splits: tuple[str | Path, ...], tmp_path: Path
) -> None:
    trained = train(run_batchclf, *splits, "--log-format", "json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["val_accuracy"] == 1.0
    options = ("--model", tmp_path / "model", "--output", tmp_path / "out")
    keep = ("--keep-columns", "category")
    run_batchclf("classify", tmp_path / "val.csv", *options, *keep, env=QUIET)
    rows = outputs.read_source(tmp_path / "out", "val.csv").to_pylist()
    assert [row["label"] for row in rows] == [row["category"] for row in rows]


def test_transformers_loads_the_trained_model(
    run_batchclf: RunBatchclf, splits: tuple[str | Path, ...], tmp_path: Path
) -> None:
    assert train(run_batchclf, *splits, "--epochs", "1").returncode == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "sport", 1: "tech"}


def test_training_goes_on_from_a_model_with_a_new_head(
    run_batchclf: RunBatchclf, splits: tuple[str | Path, ...], tmp_path: Path
) -> None:
    assert train(run_batchclf, *splits, "--epochs", "1").returncode == 0
    more = ("--base-model", tmp_path / "model", "--output", tmp_path / "more")
    labels = ("--labels", "tech,sport")
    assert train(run_batchclf, *splits, *more, *labels).returncode == 0
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    assert config["id2label"] == {"0": "tech", "1": "sport"}


def test_an_unknown_label_names_itself_and_its_row(
    run_batchclf: RunBatchclf, splits: tuple[str | Path, ...], tmp_path: Path
) -> None:
    write(tmp_path / "val.csv", [*articles(4), ("a song", "music")])
    refused = train(run_batchclf, *splits)
    assert refused.returncode == 65
    assert "'music'" in refused.stderr
    assert "val.csv row 4" in refused.stderr


def test_one_label_alone_is_refused(
    run_batchclf: RunBatchclf, splits: tuple[str | Path, ...], tmp_path: Path
) -> None:
    write(tmp_path / "train.csv", [row for row in articles(20) if row[1] == "sport"])
    refused = train(run_batchclf, *splits)
    assert (refused.returncode, "one label" in refused.stderr) == (65, True)


def test_articles_that_stand_in_both_splits_are_reported_and_dropped_on_demand(
    run_batchclf: RunBatchclf, splits: tuple[str | Path, ...], tmp_path: Path
) -> None:
    write(tmp_path / "val.csv", [*articles(10, start=120), *articles(3)])
    kept = train(run_batchclf, *splits, "--epochs", "1")
    assert "3 training articles also stand in the validation data" in kept.stderr
    train(run_batchclf, *splits, "--epochs", "1", "--drop-leaked", "--overwrite")
    note = json.loads((tmp_path / "model" / "batchclf.json").read_text())
    assert note["training"]["num_train"] == 117


def test_a_model_directory_is_not_replaced_unasked(
    run_batchclf: RunBatchclf, splits: tuple[str | Path, ...], tmp_path: Path
) -> None:
    assert train(run_batchclf, *splits, "--epochs", "1").returncode == 0
    before = outputs.contents(tmp_path / "model")
    refused = train(run_batchclf, *splits, "--epochs", "1")
    assert refused.returncode == 64
    assert outputs.contents(tmp_path / "model") == before


def test_a_flatten_head_is_trained_and_labels_files(
    run_batchclf: RunBatchclf, splits: tuple[str | Path, ...], tmp_path: Path
) -> None:
    assert train(run_batchclf, *splits, "--head", "flatten").returncode == 0
    options = ("--model", tmp_path / "model", "--output", tmp_path / "out")
    keep = ("--keep-columns", "category")
    run_batchclf("classify", tmp_path / "val.csv", *options, *keep, env=QUIET)
    rows = outputs.read_source(tmp_path / "out", "val.csv").to_pylist()
    assert sum(row["label"] == row["category"] for row in rows) >= 0.9 * len(rows)
