"""The model and the archive that come along: what `make demo` shows."""

from pathlib import Path

import pyarrow.dataset as ds
import pytest
from conftest import RunBatchclf
from e2e import outputs
from e2e.conftest import QUIET

DATA = Path(__file__).resolve().parents[2] / "data"
MODEL = DATA / "models" / "bbc-small"
LABELS = ["business", "entertainment", "politics", "sport", "tech"]


def accuracy(run_batchclf: RunBatchclf, articles: Path, output: Path) -> float:
    options = ("--model", MODEL, "--output", output, "--keep-columns", "category")
    run = run_batchclf("classify", articles, *options, env=QUIET)
    assert run.returncode == 0, run.stderr
    table = ds.dataset(outputs.fingerprint_folder(output)).to_table(["category", "label"])
    rows = table.to_pylist()
    return sum(row["category"] == row["label"] for row in rows) / len(rows)


def test_the_small_model_labels_the_sample_archive(
    run_batchclf: RunBatchclf, tmp_path: Path
) -> None:
    assert accuracy(run_batchclf, DATA / "sample", tmp_path) >= 0.85


def test_the_small_model_labels_bbc_articles(
    run_batchclf: RunBatchclf, shared: Path, tmp_path: Path
) -> None:
    assert accuracy(run_batchclf, shared / "bbc" / "val.csv", tmp_path) >= 0.95


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
