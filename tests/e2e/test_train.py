"""`batchclf train`: labelled files in, a model directory out that `classify` takes."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import RunBatchclf
from e2e import labelled, outputs
from e2e.conftest import QUIET
from e2e.labelled import articles, write
from safetensors.torch import load_file
from servers import Endpoint, fresh_bucket
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from batchclf.checkpoint import load

Splits = tuple[str | Path, ...]


@pytest.fixture
def splits(tmp_path: Path) -> Splits:
    return labelled.arguments(tmp_path)


def train(run_batchclf: RunBatchclf, *args: str | Path) -> Any:
    return run_batchclf("train", *args, env=QUIET)


def test_a_model_is_trained_from_scratch_and_labels_files(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    test = write(tmp_path / "test.csv", articles(20, start=160))
    trained = train(run_batchclf, *splits, "--test", test, "--log-format", "json")
    assert trained.returncode == 0, trained.stderr
    metrics = json.loads(trained.stdout)
    assert (metrics["val_accuracy"], metrics["test_accuracy"]) == (1.0, 1.0)
    assert {path.name for path in (tmp_path / "model" / "report").iterdir()} == {
        "metrics.json",
        "training-curve.png",
        "confusion-matrix.png",
        "reliability.png",
        "report.html",
    }
    report = json.loads((tmp_path / "model" / "report" / "metrics.json").read_text())
    assert report["measures"].keys() == {"test", "validation"}
    assert len(report["history"]["epochs"]) == 6
    options = ("--model", tmp_path / "model", "--output", tmp_path / "out")
    keep = ("--keep-columns", "category")
    run_batchclf("classify", tmp_path / "val.csv", *options, *keep, env=QUIET)
    rows = outputs.read_source(tmp_path / "out", "val.csv").to_pylist()
    assert [row["label"] for row in rows] == [row["category"] for row in rows]


def test_transformers_loads_the_trained_model_and_gives_its_logits(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    assert train(run_batchclf, *splits, "--epochs", "2").returncode == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert theirs.config.id2label == {0: "sport", 1: "tech"}
    checkpoint = load(tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("a goal in the cup")["input_ids"]
    assert ids == checkpoint.tokenizer.encode("a goal in the cup").ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        found = checkpoint.build_model()(torch.tensor([ids]), torch.tensor([len(ids)]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_empty_split_is_refused(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    write(tmp_path / "val.csv", [])
    refused = train(run_batchclf, *splits)
    assert refused.returncode == 65
    assert "--val" in refused.stderr
    assert "no labelled articles there" in refused.stderr


def test_spaces_around_labels_are_dropped_and_a_label_with_one_row_is_warned_of(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    rows = [(text, f" {label}  ") for text, label in articles(60)]
    write(tmp_path / "train.csv", [*rows, ("a song of songs", "music")])
    write(tmp_path / "val.csv", articles(1, start=120))
    trained = train(run_batchclf, *splits, "--epochs", "1")
    assert trained.returncode == 0, trained.stderr
    assert "warning: only 1 of the training articles have the label 'music'" in trained.stderr
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "music", "1": "sport", "2": "tech"}


def test_training_goes_on_from_a_model_with_a_new_head(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    assert train(run_batchclf, *splits, "--epochs", "1").returncode == 0
    more = ("--base-model", tmp_path / "model", "--output", tmp_path / "more")
    labels = ("--labels", "tech,sport")
    assert train(run_batchclf, *splits, *more, *labels).returncode == 0
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    assert config["id2label"] == {"0": "tech", "1": "sport"}


def test_an_unknown_label_names_itself_and_its_row(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    write(tmp_path / "val.csv", [*articles(4), ("a song", "music")])
    refused = train(run_batchclf, *splits, "--labels", "tech,sport")
    assert refused.returncode == 65
    assert "val.csv row 4: unknown label 'music'; known are tech, sport" in refused.stderr


def test_an_unknown_label_in_the_test_split_is_known_before_the_training(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    test = write(tmp_path / "test.csv", [*articles(2), ("a song", "Sport")])
    refused = train(run_batchclf, *splits, "--test", test)
    assert refused.returncode == 65
    assert "test.csv row 2: unknown label 'Sport'" in refused.stderr
    assert "'sport' differs in letter case alone" in refused.stderr
    assert "epoch" not in refused.stderr


def test_parquet_and_json_lines_on_s3_are_trained_on(
    run_batchclf: RunBatchclf, splits: Splits, moto: Endpoint, tmp_path: Path
) -> None:
    texts, labels = zip(*articles(60), strict=True)
    table = pa.table({"text": texts, "topic": pa.array(labels).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    with (tmp_path / "b.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"topic": label, "text": text}) + "\n"
            for text, label in articles(60, start=60)
        )
    with fresh_bucket(moto) as bucket:
        for name in ("a.parquet", "b.jsonl"):
            moto.s3.upload_file(str(tmp_path / name), bucket, f"train/{name}")
        given = ("--train", f"s3://{bucket}/train/", "--val", tmp_path / "b.jsonl")
        wanted = (*given, *splits[4:], "--label-column", "topic", "--epochs", "1")
        trained = run_batchclf("train", *wanted, env={**QUIET, **moto.env})
    assert trained.returncode == 0, trained.stderr
    note = json.loads((tmp_path / "model" / "batchclf.json").read_text())
    assert note["training"]["labels"] == {"sport": 60, "tech": 60}
    assert note["training"]["repeats"] == {"train_val": 60}


def test_a_language_model_loss_frozen_layers_and_patience_can_be_asked_for(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    assert train(run_batchclf, *splits, "--epochs", "1").returncode == 0
    wanted = ("--lm-weight", "0.5", "--freeze-layers", "1", "--patience", "1", "--epochs", "9")
    never_better = ("--learning-rate", "5", "--schedule", "linear", "--batch-tokens", "256")
    again = ("--base-model", tmp_path / "model", "--output", tmp_path / "again")
    trained = train(run_batchclf, *splits, *again, *wanted, *never_better)
    assert trained.returncode == 0, trained.stderr
    assert "stopped early: no lower validation loss in 1 epochs" in trained.stderr
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("model", "again")
    )
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    frozen = ("transformer.wte.", "transformer.wpe.", "transformer.h.0.")
    assert unchanged == {name for name in before if name.startswith(frozen)}


def test_a_loss_that_is_not_a_number_names_the_rows_of_its_batch(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    hopeless = ("--learning-rate", "1e30", "--clip-norm", "1e30", "--batch-tokens", "256")
    stopped = train(run_batchclf, *splits, *hopeless)
    assert stopped.returncode == 65
    assert re.search(
        r"(loss|gradient) is (nan|inf) at step \d+ of epoch 1, whose batch is \S*train\.csv row "
        r"\d+, ",
        stopped.stderr,
    )
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--output", "s3://bucket/model"), "--output s3://bucket/model: must be a folder on this"),
        (("--output", "train.csv/model"), "--output train.csv/model: "),
        (("--checkpoint-dir", "train.csv"), "--checkpoint-dir train.csv: Not a directory"),
        (("--learning-rate", "-1"), "Invalid value for '--learning-rate'"),
        (("--noise-share", "1"), "Invalid value for '--noise-share'"),
    ],
)
def test_what_cannot_be_written_or_done_is_known_before_the_training(
    run_batchclf: RunBatchclf,
    splits: Splits,
    tmp_path: Path,
    options: tuple[str, str],
    reason: str,
) -> None:
    before = outputs.contents(tmp_path)
    refused = run_batchclf("train", *splits, *options, env=QUIET, cwd=tmp_path)
    assert refused.returncode == 64
    assert reason in refused.stderr
    assert "training on" not in refused.stderr
    assert outputs.contents(tmp_path) == before


@pytest.mark.parametrize(
    ("values", "options", "reason"),
    [
        (["sport"], ("--label-column", "topic"), "Name one of them with --label-column"),
        ([["sport"]], (), "the label column cannot be read as text"),
    ],
)
def test_a_label_column_that_is_missing_or_no_text_is_named(
    run_batchclf: RunBatchclf,
    splits: Splits,
    tmp_path: Path,
    values: list[Any],
    options: tuple[str, ...],
    reason: str,
) -> None:
    pq.write_table(pa.table({"text": ["a"], "category": values}), tmp_path / "odd.parquet")
    refused = train(run_batchclf, *splits, "--train", tmp_path / "odd.parquet", *options)
    assert refused.returncode == 65
    assert reason in refused.stderr


def test_one_label_alone_is_refused(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    write(tmp_path / "train.csv", [row for row in articles(20) if row[1] == "sport"])
    refused = train(run_batchclf, *splits)
    assert (refused.returncode, "one label" in refused.stderr) == (65, True)


def test_articles_that_stand_in_both_splits_are_reported_and_dropped_on_demand(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    write(tmp_path / "val.csv", [*articles(10, start=120), *articles(3)])
    kept = train(run_batchclf, *splits, "--epochs", "1")
    assert "warning: 3 training articles also stand in the validation data" in kept.stderr
    train(run_batchclf, *splits, "--epochs", "1", "--drop-leaked", "--overwrite")
    note = json.loads((tmp_path / "model" / "batchclf.json").read_text())
    assert note["training"]["num_train"] == 117


def test_a_model_directory_is_not_replaced_unasked(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    assert train(run_batchclf, *splits, "--epochs", "1").returncode == 0
    before = outputs.contents(tmp_path / "model")
    refused = train(run_batchclf, *splits, "--epochs", "1")
    assert refused.returncode == 64
    assert outputs.contents(tmp_path / "model") == before


def test_a_flatten_head_is_trained_and_labels_files(
    run_batchclf: RunBatchclf, splits: Splits, tmp_path: Path
) -> None:
    assert train(run_batchclf, *splits, "--head", "flatten").returncode == 0
    options = ("--model", tmp_path / "model", "--output", tmp_path / "out")
    keep = ("--keep-columns", "category")
    run_batchclf("classify", tmp_path / "val.csv", *options, *keep, env=QUIET)
    rows = outputs.read_source(tmp_path / "out", "val.csv").to_pylist()
    assert sum(row["label"] == row["category"] for row in rows) >= 0.9 * len(rows)
