"""The same rows get the same answers, however the work is cut, ordered, shared or interrupted."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from e2e import archives, outputs
from e2e.conftest import QUIET
from transformers import AutoModelForSequenceClassification, AutoTokenizer

if TYPE_CHECKING:
    from conftest import RunBatchclf, StartBatchclf
    from e2e.conftest import Classify

MAX_LENGTH = 64
NUM_WORKERS = 3
SCORE_TOLERANCE = 1e-5  # float32, between two ways of doing the same work
REFERENCE_TOLERANCE = 1e-4  # between our forward pass and that of transformers

# id -> label, probabilities, n_tokens, truncated, error
Answers = dict[str, tuple[str | None, dict[str, float] | None, int, bool, str | None]]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """300 articles: of 1 to some 200 tokens, repeats among them, and some that cannot be read."""
    rows = archives.articles(300, seed=7)
    for number in range(0, 300, 11):
        rows[number]["text"] = rows[(number * 7 + 3) % 300]["text"]
    for number, text in ((5, None), (6, " "), (7, "x"), (8, "<|endoftext|>"), (9, "a " * 500)):
        rows[number]["text"] = text
    return rows


@pytest.fixture(scope="module")
def news(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("news")
    return [
        archives.write(folder / "one.parquet", rows[:120], row_group_rows=50),
        archives.write(folder / "two.csv", rows[120:200]),
        archives.write(folder / "three.jsonl.gz", rows[200:]),
    ]


@pytest.fixture(scope="module")
def expected(
    classify: "Classify", news: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    output = tmp_path_factory.mktemp("expected") / "out"
    done = classify(*news, "--output", output)
    assert done.returncode == 0, done.stderr
    return answers(output)


def answers(output: Path) -> Answers:
    return {
        row["id"]: (row["label"], row["probs"], row["n_tokens"], row["truncated"], row["error"])
        for found in outputs.read_sources(output).values()
        for row in found
    }


def assert_same(found: Answers, expected: Answers) -> None:
    assert found.keys() == expected.keys()
    for name, (label, probs, *rest) in expected.items():
        found_label, found_probs, *found_rest = found[name]
        assert (found_label, found_rest) == (label, rest), name
        assert found_probs == pytest.approx(probs, abs=SCORE_TOLERANCE), name


@pytest.mark.parametrize(
    "options",
    [
        ("--max-batch-tokens", "1"),
        ("--max-batch-tokens", "333", "--rows-per-shard", "7"),
    ],
    ids=" ".join,
)
def test_answers_do_not_depend_on_batches_or_shards(
    classify: "Classify",
    news: list[Path],
    expected: Answers,
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    done = classify(*news, "--output", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert_same(answers(tmp_path / "out"), expected)


def test_answers_do_not_depend_on_the_order_of_files(
    classify: "Classify", news: list[Path], expected: Answers, tmp_path: Path
) -> None:
    done = classify(*reversed(news), "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert_same(answers(tmp_path / "out"), expected)


def test_answers_do_not_depend_on_the_number_of_workers(
    start_batchclf: "StartBatchclf",
    model: Path,
    news: list[Path],
    expected: Answers,
    tmp_path: Path,
) -> None:
    command: tuple[str | Path, ...] = (
        "classify",
        *news,
        *("--model", model, "--output", tmp_path / "out"),
        *("--dtype", "float32", "--rows-per-shard", "40", "--num-shards", str(NUM_WORKERS)),
    )
    workers = [
        start_batchclf(
            *command, "--shard-index", str(index), env=QUIET, log=tmp_path / f"{index}.log"
        )
        for index in range(NUM_WORKERS)
    ]
    assert [worker.wait() for worker in workers] == [0] * NUM_WORKERS
    assert_same(answers(tmp_path / "out"), expected)
    assert (outputs.fingerprint_folder(tmp_path / "out") / "_SUCCESS.json").exists()


def test_answers_do_not_depend_on_an_interruption(
    start_batchclf: "StartBatchclf",
    run_batchclf: "RunBatchclf",
    model: Path,
    news: list[Path],
    expected: Answers,
    tmp_path: Path,
) -> None:
    command: tuple[str | Path, ...] = (
        "classify",
        *news,
        *("--model", model, "--output", tmp_path / "out"),
        *("--dtype", "float32", "--rows-per-shard", "10", "--max-batch-tokens", "64"),
    )
    first = start_batchclf(*command, env=QUIET)
    assert first.stderr is not None
    assert any("committed" in line for line in first.stderr)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert len(outputs.output_files(tmp_path / "out")) < 31
    done = run_batchclf(*command, env=QUIET)
    assert done.returncode == 0, done.stderr
    assert_same(answers(tmp_path / "out"), expected)


def test_answers_are_those_of_transformers(
    rows: list[dict[str, Any]], model: Path, expected: Answers
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    labels = [reference.config.id2label[index] for index in range(reference.config.num_labels)]
    readable = [row for row in rows if expected[row["id"]][4] is None]
    assert len(readable) == len(rows) - 2
    for row in readable[::3]:
        inputs = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=MAX_LENGTH)
        with torch.inference_mode():
            probs = reference(**inputs).logits.softmax(-1)[0].tolist()
        label, found, n_tokens, *_ = expected[row["id"]]
        by_label = dict(zip(labels, probs, strict=True))
        assert found == pytest.approx(by_label, abs=REFERENCE_TOLERANCE), row["id"]
        assert label == max(by_label, key=by_label.__getitem__)
        assert n_tokens == inputs["input_ids"].shape[1]
    assert len({expected[row["id"]][0] for row in readable}) > 1, "the model tells texts apart"
