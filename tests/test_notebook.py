"""The notebook for Colab and SageMaker: committed clean, and it runs from top to bottom."""

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import servers
from conftest import REPOSITORY
from nbclient import NotebookClient

NOTEBOOK = REPOSITORY / "jobs" / "notebooks" / "train_and_classify.ipynb"
CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 2, "n_positions": 64}
TIMEOUT_S = 300  # of one cell
# Starts of AWS, Hugging Face, GitHub and OpenAI keys, and folders of somebody's machine.
PRIVATE = r"AKIA|ASIA|hf_\w{20}|gh[pousr]_\w{20}|sk-\w{20}|(?<![\w.])/(home|root|Users|work|tmp)/"


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def sources(notebook: Any, kind: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def test_the_notebook_is_committed_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_notebook_holds_no_key_and_no_folder_of_a_machine() -> None:
    assert re.search(PRIVATE, NOTEBOOK.read_text()) is None


def test_the_first_code_cell_holds_the_parameters(notebook: Any) -> None:
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.metadata["tags"] == ["parameters"]
    assert 'parameter("BASE_MODEL", "gpt2")' in first.source


def test_every_step_of_the_notebook_has_a_heading(notebook: Any) -> None:
    headings = [line for text in sources(notebook, "markdown") for line in text.splitlines()]
    wanted = ["# Train on labelled news, then label an archive"]
    wanted += [f"## {step}" for step in ("Install", "The articles", "Train", "Label")]
    wanted += ["## Look at the result", "## Measure"]
    assert [line for line in headings if line.startswith("#")] == wanted


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    work = tmp_path / "my work"
    environment = {
        "NOTEBOOK_BASE_MODEL": str(config),
        "NOTEBOOK_EPOCHS": "10",
        "NOTEBOOK_MAX_LENGTH": "64",
        "NOTEBOOK_TRAIN_OPTIONS": "--vocab-size 600 --learning-rate 0.003 --device cpu",
        "NOTEBOOK_WORK": str(work),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
    }
    for name in set(os.environ) - set(servers.clean_environment()):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=folder).execute()
    shown = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "of 25 labels are right" in shown
    assert (work / "model" / "model.safetensors").is_file()
    assert list((work / "labelled").rglob("test.csv*.parquet"))
    assert (work / "evaluation" / "evaluation.json").is_file()
