"""The model and the archive that come along: what `make demo` shows."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import RunBatchclf
from e2e import outputs
from e2e.conftest import QUIET

DATA = Path(__file__).resolve().parents[2] / "data"
MODEL = DATA / "models" / "bbc-small"
LABELS = ["business", "entertainment", "politics", "sport", "tech"]


def measures(run_batchclf: RunBatchclf, articles: Path) -> dict[str, Any]:
    options = ("--model", MODEL, "--dtype", "float32", "--log-format", "json")
    run = run_batchclf("evaluate", articles, *options, env=QUIET)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def unseen(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation articles that do not stand in the training split too."""
    folder, path = shared / "bbc", tmp_path_factory.mktemp("bbc") / "unseen.csv"
    with (folder / "train.csv").open(newline="", encoding="utf-8") as file:
        seen = {" ".join(row["text"].lower().split()) for row in csv.DictReader(file)}
    with (
        (folder / "val.csv").open(newline="", encoding="utf-8") as file,
        path.open("w", newline="", encoding="utf-8") as out,
    ):
        writer = csv.writer(out)
        writer.writerow(["text", "category"])
        for row in csv.DictReader(file):
            if " ".join(row["text"].lower().split()) not in seen:
                writer.writerow([row["text"], row["category"]])
    return path


def test_the_small_model_labels_the_sample_archive(run_batchclf: RunBatchclf) -> None:
    assert measures(run_batchclf, DATA / "sample")["accuracy"] >= 0.88


def test_the_small_model_labels_bbc_articles_that_it_has_not_seen(
    run_batchclf: RunBatchclf, unseen: Path
) -> None:
    assert measures(run_batchclf, unseen)["accuracy"] >= 0.965


def test_the_probabilities_of_the_small_model_are_calibrated(
    run_batchclf: RunBatchclf, unseen: Path
) -> None:
    assert measures(run_batchclf, unseen)["ece"] <= 0.03


def test_the_small_model_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 6_000_000


def test_the_sample_archive_has_twenty_articles_or_more_of_each_label_in_every_format(
    run_batchclf: RunBatchclf, tmp_path: Path
) -> None:
    options = ("--model", MODEL, "--output", tmp_path, "--keep-columns", "all")
    run_batchclf("classify", DATA / "sample", *options, env=QUIET)
    sources = outputs.read_sources(tmp_path)
    assert {name.split(".", 1)[1] for name in sources} == {"parquet", "csv", "csv.gz", "jsonl"}
    rows = [row for rows in sources.values() for row in rows]
    for label in LABELS:
        assert sum(row["category"] == label for row in rows) >= 20
    assert len({row["id"] for row in rows}) == len(rows) >= 100
    assert all(row["error"] is None for row in rows)


@pytest.mark.parametrize("name", ["config.json", "batchclf.json", "README.md"])
def test_the_small_model_carries(name: str) -> None:
    assert (MODEL / name).stat().st_size > 0
