"""`batchclf evaluate`: what it says is true of what `classify` writes."""

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import RunBatchclf
from e2e import archives, outputs
from e2e.conftest import QUIET
from models import LABELS
from servers import Endpoint, fresh_bucket

from batchclf.evaluation import MIN_SCORES

TEMPERATURE = 3.0
FLOAT32 = ("--dtype", "float32", "--device", "cpu")
HOSTILE = "<script>alert(1)</script> \x1b[31m red"

Row = dict[str, Any]


class Evaluate(Protocol):
    """Run `batchclf evaluate` with a tiny model of temperature 3."""

    def __call__(self, *args: str | Path) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="module")
def warm_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, less sure of itself."""
    folder = tmp_path_factory.mktemp("warm") / "model"
    shutil.copytree(model, folder)
    settings = {"format_version": 1, "temperature": TEMPERATURE}
    (folder / "batchclf.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def evaluate(run_batchclf: RunBatchclf, warm_model: Path) -> Evaluate:
    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        return run_batchclf("evaluate", *args, "--model", warm_model, *FLOAT32, env=QUIET)

    return run


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 150 rows; the label column has the name of one of ours, spaces, and a row that
    cannot be read has no label."""
    folder = tmp_path_factory.mktemp("news")
    rows = archives.articles(150, seed=5)
    for number, row in enumerate(rows):
        row["label"] = LABELS[number % 5]
    rows[3]["label"] = f"  {rows[3]['label']} "
    rows[7] |= {"title": None, "text": None, "label": None}
    rows[8] |= {"title": "", "text": "  "}
    for row in rows[20:30]:
        row["text"] = HOSTILE
    write(folder / "a.jsonl", rows[:100])
    write(folder / "b.csv", rows[100:])
    return folder


def write(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


COLUMNS = ("--text-column", "title", "--text-column", "text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation") / "new"


@pytest.fixture(scope="module")
def evaluation(evaluate: Evaluate, news: Path, folder: Path) -> Row:
    """What one run said on standard output."""
    wanted = ("--label-column", "label", "--output", folder, "--log-format", "json")
    done = evaluate(news, *COLUMNS, *wanted)
    assert done.returncode == 0, done.stderr
    found: Row = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def classified(
    run_batchclf: RunBatchclf,
    warm_model: Path,
    news: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Row]:
    """The rows as `classify` writes them, those with an error left out."""
    output = tmp_path_factory.mktemp("classified") / "out"
    wanted = ("--keep-columns", "label", "--output", output)
    run_batchclf("classify", news, *COLUMNS, *wanted, "--model", warm_model, *FLOAT32, env=QUIET)
    tables = [pq.ParquetFile(path).read() for path in outputs.output_files(output)]
    rows = [row for table in tables for row in table.to_pylist() if row["error"] is None]
    return [row | {"true": row["input_label"].strip()} for row in rows]


def test_measures_are_those_of_what_classify_writes(evaluation: Row, classified: list[Row]) -> None:
    right = [row["label"] == row["true"] for row in classified]
    assert evaluation["num_examples"] == len(classified) == 148
    assert evaluation["accuracy"] == pytest.approx(sum(right) / len(right))
    for true, row in zip(LABELS, evaluation["confusion"], strict=True):
        for predicted, count in zip(LABELS, row, strict=True):
            pairs = [
                each for each in classified if (each["true"], each["label"]) == (true, predicted)
            ]
            assert count == len(pairs)
    assert 0 < sum(right) < len(right), "right and wrong ones among them"


def test_coverage_is_what_classify_keeps_at_each_min_score(
    evaluation: Row, classified: list[Row]
) -> None:
    for min_score, found in zip(MIN_SCORES, evaluation["risk_coverage"], strict=True):
        kept = [row for row in classified if row["score"] >= min_score]
        assert found["num_kept"] == len(kept)
        if kept:
            right = sum(row["label"] == row["true"] for row in kept)
            assert found["accuracy"] == pytest.approx(right / len(kept))


def test_calibration_error_is_told_before_and_after_the_temperature(
    evaluation: Row, classified: list[Row]
) -> None:
    probs = np.array([[row["probs"][label] for label in LABELS] for row in classified], np.float64)
    right = np.array([row["label"] == row["true"] for row in classified])
    cold = probs**TEMPERATURE / (probs**TEMPERATURE).sum(axis=1, keepdims=True)
    after, before = calibration_error(probs, right), calibration_error(cold, right)
    assert evaluation["temperature"] == TEMPERATURE
    assert evaluation["ece"] == pytest.approx(after, abs=1e-5)
    assert evaluation["ece_before_temperature"] == pytest.approx(before, abs=1e-5)
    assert before > after + 0.05


def calibration_error(probs: Any, right: Any) -> float:
    scores = probs.max(axis=1)
    total = 0.0
    for place in range(15):
        inside = (scores > place / 15) & (scores <= (place + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(scores[inside].mean() - right[inside].mean())
    return float(total)


def test_rows_that_cannot_be_labelled_are_counted_by_their_code(evaluation: Row) -> None:
    assert evaluation["num_rows"] == 150
    assert evaluation["failed"] == {"null_text": 1, "empty_text": 1}
    assert "a.jsonl row 7: null_text" in evaluation["failed_examples"]["null_text"][0]


def test_the_most_confident_mistakes_come_with_place_and_text(
    evaluation: Row, classified: list[Row], news: Path
) -> None:
    wrong = [row["score"] for row in classified if row["label"] != row["true"]]
    found = evaluation["mistakes"]
    assert [each["score"] for each in found] == pytest.approx(sorted(wrong, reverse=True)[:20])
    rows = [json.loads(line) for line in (news / "a.jsonl").read_text().splitlines()]
    in_first = [each for each in found if "a.jsonl" in each["place"]]
    assert in_first
    for each in in_first:
        row = rows[int(each["place"].rpartition(" ")[2])]
        assert each["label"] == row["label"].strip()
        assert each["text"].startswith(row["title"])


def test_json_and_page_are_written(evaluation: Row, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "evaluation.html"}
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["accuracy"] == evaluation["accuracy"]
    page = (folder / "evaluation.html").read_text()
    assert f"{evaluation['accuracy']:.4f}" in page
    assert "<script" not in page
    assert "null_text" in page


def test_the_summary_fits_a_terminal_and_moves_no_cursor(evaluate: Evaluate, news: Path) -> None:
    done = evaluate(news / "a.jsonl", *COLUMNS, "--label-column", "label", "--limit", "60")
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines() if str(news) not in line) <= 80
    assert all(letter.isprintable() or letter == "\n" for letter in done.stdout)
    for words in (
        "macro-F1",
        "calibration error",
        "--min-score",
        "58 rows measured",
        "2 could not",
    ):
        assert words in done.stdout


def test_labelled_files_on_s3_are_measured_and_the_result_put_there(
    run_batchclf: RunBatchclf, warm_model: Path, moto: Endpoint, tmp_path: Path
) -> None:
    rows = [{"text": f"article {number}", "category": LABELS[number % 5]} for number in range(9)]
    with fresh_bucket(moto) as bucket:
        moto.s3.upload_file(str(write(tmp_path / "a.csv", rows)), bucket, "in/a.csv")
        places = (f"s3://{bucket}/in/", "--output", f"s3://{bucket}/out")
        env = {**QUIET, **moto.env}
        done = run_batchclf("evaluate", *places, "--model", warm_model, *FLOAT32, env=env)
        assert done.returncode == 0, done.stderr
        written = moto.s3.get_object(Bucket=bucket, Key="out/evaluation.json")["Body"].read()
        listed = moto.s3.list_objects_v2(Bucket=bucket, Prefix="out/")["Contents"]
    assert json.loads(written)["num_examples"] == 9
    assert [each["Key"] for each in listed] == ["out/evaluation.html", "out/evaluation.json"]


@pytest.mark.parametrize(
    ("label", "reason"),
    [("music", "news.csv row 1: unknown label 'music'"), (" ", "news.csv row 1: has no label")],
)
def test_a_label_that_is_unknown_or_missing_names_its_row(
    evaluate: Evaluate, tmp_path: Path, label: str, reason: str
) -> None:
    rows = [{"text": "one", "category": "tech"}, {"text": "two", "category": label}]
    refused = evaluate(write(tmp_path / "news.csv", rows), "--output", tmp_path / "out")
    assert refused.returncode == 65
    assert reason in refused.stderr
    assert not list((tmp_path / "out").iterdir())


def test_an_input_without_the_label_column_is_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    refused = evaluate(write(tmp_path / "news.csv", [{"text": "one", "topic": "tech"}]))
    assert refused.returncode == 65
    assert "no column 'category'" in refused.stderr


def test_an_input_without_a_readable_row_is_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    refused = evaluate(write(tmp_path / "news.csv", [{"text": " ", "category": "tech"}]))
    assert refused.returncode == 65
    assert "none of the 1 rows" in refused.stderr


def test_an_output_that_cannot_be_written_is_known_before_the_work(
    evaluate: Evaluate, news: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    refused = evaluate(news, "--label-column", "label", "--output", tmp_path / "file")
    assert refused.returncode == 64
    assert "labelling" not in refused.stderr
