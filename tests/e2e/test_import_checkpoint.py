"""`batchclf import-checkpoint`: the original project's model.pth becomes a model directory."""

import json
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any, Protocol

import models
import pytest
import torch
from conftest import RunBatchclf
from e2e import archives, outputs
from e2e.conftest import QUIET
from transformers import AutoTokenizer

LENGTH = 128  # tokens that the original reads
ORDER = ("sport", "business", "tech", "politics", "entertainment")
CONFIG = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 400, "n_positions": 160}
TOLERANCE = 1e-4

State = dict[str, Any]


class Import(Protocol):
    """Run `batchclf import-checkpoint` on a file with the base model and five labels."""

    def __call__(
        self, file: Path, output: Path, *args: str | Path
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration and tokenizer of the GPT-2 that was fine-tuned; no weights."""
    folder = models.make_hf_checkpoint(tmp_path_factory.mktemp("base") / "gpt2", max_positions=160)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def original() -> models.SimpleGPT2SequenceClassifier:
    return models.random_flatten_reference(max_seq_len=LENGTH, **CONFIG)


@pytest.fixture(scope="module")
def import_file(run_batchclf: RunBatchclf, base_model: Path) -> Import:
    def run(file: Path, output: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
        options = ("--base-model", base_model, "--labels", ",".join(ORDER), "--output", output)
        return run_batchclf("import-checkpoint", file, *options, *args, env=QUIET)

    return run


def old_state(original: models.SimpleGPT2SequenceClassifier) -> State:
    """As old transformers and DataParallel wrote it: with causal masks, and a prefix."""
    state = dict(original.state_dict())
    for layer in range(CONFIG["n_layer"]):
        mask = torch.ones(1, 1, 160, 160, dtype=torch.uint8).tril()
        state[f"gpt2model.h.{layer}.attn.bias"] = mask
        state[f"gpt2model.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return {f"module.{name}": tensor for name, tensor in state.items()}


@torch.inference_mode()
def original_probs(
    original: models.SimpleGPT2SequenceClassifier, tokenizer: Any, text: str
) -> dict[str, float]:
    """What the original project's inference does with a text."""
    text = " ".join(text.lower().split())
    given = tokenizer(
        text, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    logits = original(given["input_ids"], given["attention_mask"])
    return dict(zip(ORDER, logits.softmax(-1)[0].tolist(), strict=True))


def test_the_imported_model_answers_as_the_original_did(
    run_batchclf: RunBatchclf,
    import_file: Import,
    original: models.SimpleGPT2SequenceClassifier,
    base_model: Path,
    tmp_path: Path,
) -> None:
    torch.save(original.state_dict(), tmp_path / "model.pth")
    done = import_file(tmp_path / "model.pth", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    rows = archives.articles(60, seed=3)
    for number, text in enumerate(("X", "  Two\n\n  LINES ", "word " * 400)):
        rows[number]["text"] = text
    archives.write(tmp_path / "news.parquet", rows)
    output = ("--output", tmp_path / "out", "--dtype", "float32", "--device", "cpu")
    model = ("--model", tmp_path / "model")
    labelled = run_batchclf("classify", tmp_path / "news.parquet", *model, *output, env=QUIET)
    assert labelled.returncode == 0, labelled.stderr
    tokenizer = AutoTokenizer.from_pretrained(base_model, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    found = outputs.read_source(tmp_path / "out", "news.parquet").to_pylist()
    for row, answer in zip(rows, found, strict=True):
        expected = original_probs(original, tokenizer, row["text"])
        assert answer["probs"] == pytest.approx(expected, abs=TOLERANCE), row["id"]
        assert answer["label"] == max(expected, key=expected.__getitem__)
    assert len({answer["label"] for answer in found}) > 1, "the model tells texts apart"
    assert [found[2]["n_tokens"], found[2]["truncated"]] == [LENGTH, True]


def test_an_old_file_gives_the_same_model_as_a_new_one(
    import_file: Import, original: models.SimpleGPT2SequenceClassifier, tmp_path: Path
) -> None:
    torch.save(original.state_dict(), tmp_path / "new.pth")
    torch.save(old_state(original), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for age in ("old", "new"):
        done = import_file(tmp_path / f"{age}.pth", tmp_path / age, "--log-format", "json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["labels"] == list(ORDER)
    weights = [(tmp_path / age / "model.safetensors").read_bytes() for age in ("old", "new")]
    assert weights[0] == weights[1]


def test_a_file_that_would_run_code_is_refused_and_runs_none(
    import_file: Import, tmp_path: Path
) -> None:
    (tmp_path / "model.pth").write_bytes(pickle.dumps(Touch(tmp_path / "ran"), protocol=2))
    refused = import_file(tmp_path / "model.pth", tmp_path / "model")
    assert refused.returncode == 64
    assert "asks for" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_an_output_that_is_no_folder_here_is_refused(
    run_batchclf: RunBatchclf, base_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.pth").write_bytes(b"")
    wanted = ("--base-model", base_model, "--labels", "a,b", "--output", "s3://bucket/model")
    refused = run_batchclf("import-checkpoint", tmp_path / "model.pth", *wanted, cwd=tmp_path)
    assert refused.returncode == 64
    assert "must be a folder on this machine" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


class Touch:
    """Unpickled as it wants to be, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)
