"""`batchclf.load(model).classify(texts)`: what a notebook sees."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import models
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchclf
from batchclf.classifier import Classifier
from batchclf.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from conftest import RunBatchclf

HEAVY = ("torch", "pyarrow", "numpy", "transformers", "boto3", "click")
COLUMNS = ["label", "score", "probs", "n_tokens", "truncated", "error"]
CONTAINERS: dict[str, Callable[[list[str | None]], Iterable[object]]] = {
    "a generator": iter,
    "a pandas Series": pd.Series,
    "a pandas categorical": lambda texts: pd.Series(texts, dtype="category"),
    "a polars Series": pl.Series,
    "a NumPy array": lambda texts: np.array(texts, dtype=object),
    "an Arrow array": pa.array,
    "a chunked Arrow array": lambda texts: pa.chunked_array([texts[:1], texts[1:]]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_hf_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def classifier(model: Path) -> Iterator[Classifier]:
    with batchclf.load(model, dtype="float32") as loaded:
        yield loaded


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, batchclf; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_model_says_its_labels_and_its_length(classifier: Classifier) -> None:
    assert list(classifier.labels) == models.label_names(5)
    assert classifier.max_length == 64


def test_texts_are_labelled_as_classify_labels_them(
    classifier: Classifier, model: Path, run_batchclf: "RunBatchclf", tmp_path: Path
) -> None:
    texts = [*models.CORPUS, None, "", " \t", "word " * 500, *(f"{n} news" for n in range(1100))]
    rows = [text if text is None else text.encode() for text in texts]
    rows.append(b"caf\xe9")
    pq.write_table(pa.table({"text": pa.array(rows, pa.binary())}), tmp_path / "news.parquet")
    done = run_batchclf(
        *("classify", tmp_path / "news.parquet", "--model", model, "--dtype", "float32"),
        *("--output", tmp_path / "out"),
        env={"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    written = pq.read_table(next((tmp_path / "out").rglob("news*.parquet"))).drop_columns("row")

    table = classifier.classify(rows)
    assert table.schema.equals(written.schema)
    for name in ("label", "n_tokens", "truncated", "error"):
        assert table[name].to_pylist() == written[name].to_pylist()
    for name in ("score", *classifier.labels):
        ours, theirs = (
            t[name] if name == "score" else pa.chunked_array(t["probs"].chunks).flatten()[index]
            for index, t in ((_index(classifier, name), t) for t in (table, written))
        )
        np.testing.assert_allclose(ours.to_numpy(), theirs.to_numpy(), atol=1e-6)


def _index(classifier: Classifier, name: str) -> int:
    return classifier.labels.index(name) if name in classifier.labels else -1


@pytest.mark.parametrize("kind", CONTAINERS)
def test_texts_come_from(kind: str, classifier: Classifier) -> None:
    texts = ["Shares fell.", None, "The striker scored."]
    table = classifier.classify(CONTAINERS[kind](texts))
    assert table.equals(classifier.classify(texts))
    assert table["label"].is_null().to_pylist() == [False, True, False]


def test_a_row_that_is_no_text_is_marked_and_the_others_are_labelled(
    classifier: Classifier,
) -> None:
    texts = ["fine", 5, float("nan"), pd.NA, None, b"bytes", b"\xff", "\ud800", ["list"], 2**100]
    table = classifier.classify(texts)
    codes = [
        None if error is None else error.partition(":")[0] for error in table["error"].to_pylist()
    ]
    null, wrong, undecodable = "null_text", "not_text", "invalid_utf8"
    assert codes == [
        *(None, wrong, null, null, null, None),
        *(undecodable, undecodable, wrong, wrong),
    ]
    assert table["score"].is_null().to_pylist() == [code is not None for code in codes]


def test_no_texts_give_no_rows_and_the_same_columns(classifier: Classifier) -> None:
    table = classifier.classify([])
    assert (table.num_rows, table.column_names) == (0, COLUMNS)
    assert table.schema.equals(classifier.classify(["one"]).schema)


def test_below_the_least_score_a_label_is_null_and_its_score_is_not(model: Path) -> None:
    with batchclf.load(model, min_score=1.0) as unsure:
        row = unsure.classify(["Shares fell."]).to_pylist()[0]
    assert row["label"] is None
    assert row["error"] is None
    assert 0 < row["score"] < 1


def test_fewer_tokens_are_read_where_that_is_asked_for(model: Path) -> None:
    with batchclf.load(model, max_length=3) as short:
        row = short.classify(["Shares fell on Monday after the bank said so."]).to_pylist()[0]
    assert (row["n_tokens"], row["truncated"]) == (3, True)


@pytest.mark.parametrize(
    "texts",
    ["one text", b"one text", pa.table({"a": ["b"]}), pd.DataFrame({"a": ["b"]}), {"a": "b"}],
)
def test_one_text_or_a_table_is_refused_rather_than_taken_apart(
    texts: Iterable[object], classifier: Classifier
) -> None:
    with pytest.raises(TypeError, match=r"give a list of one|give one column"):
        classifier.classify(texts)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_score": 2.0}, "min-score"),
        ({"max_length": 10**6}, "maximum length"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"dtype": "int8"}, "int8"),
        ({"device": "tpu"}, "tpu"),
        ({"backend": "magic"}, "magic"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    options: dict[str, object], reason: str, model: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        batchclf.load(model, **options)  # type: ignore[arg-type]


def test_a_model_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model directory"):
        batchclf.load(tmp_path / "none")
