"""What `import_checkpoint` makes of files that are not what they should be."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from batchclf.errors import BatchclfError, CheckpointError
from batchclf.import_checkpoint import import_checkpoint

LENGTH = 16
ORDER = ("sport", "business", "tech", "politics", "entertainment")
CONFIG = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 400, "n_positions": 64}

State = dict[str, Any]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.make_hf_checkpoint(tmp_path_factory.mktemp("base") / "gpt2", layers=1)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def original() -> models.SimpleGPT2SequenceClassifier:
    return models.random_flatten_reference(max_seq_len=LENGTH, **CONFIG)


def run(file: Path, base_model: Path, output: Path, labels: tuple[str, ...] = ORDER) -> None:
    import_checkpoint(file, base_model=str(base_model), labels=labels, output=output)


def with_changes(**changes: Any) -> Callable[[State, Path], Any]:
    """The state with some tensors replaced, and those that are None left out."""

    def change(state: State, _folder: Path) -> Any:
        changed = state | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        return {name: tensor for name, tensor in changed.items() if tensor is not None}

    return change


def other_architecture(_state: State, _folder: Path) -> Any:
    return {"bert.embeddings.weight": torch.ones(3, 2), "classifier.weight": torch.ones(2, 2)}


def language_model(state: State, _folder: Path) -> Any:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc1")}


def training_checkpoint(state: State, _folder: Path) -> Any:
    return {"epoch": 3, "model": state}


def not_a_number(state: State, _folder: Path) -> Any:
    bias = state["fc1.bias"].clone()
    bias[2] = float("nan")
    return state | {"fc1.bias": bias}


class Touch:
    """Unpickled as it wants to be, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def code_among_tensors(state: State, folder: Path) -> Any:
    return state | {"fc1.bias": Touch(folder / "ran")}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_architecture, r"no tensor gpt2model\.wte\.weight.*bert\.embeddings\.weight"),
        (language_model, r"no tensor fc1\.weight"),
        (training_checkpoint, "'epoch' is a int, not a tensor"),
        (not_a_number, r"tensor fc1\.bias holds NaN"),
        (with_changes(gpt2model__ln_f__weight=None), r"no tensor gpt2model\.ln_f\.weight"),
        (with_changes(fc2__weight=torch.ones(2)), r"unexpected tensor fc2\.weight"),
        (with_changes(fc1__weight=torch.ones(5, 100)), "100 wide.*no multiple of the 32"),
        (with_changes(fc1__weight=torch.ones(5)), r"fc1\.weight has the shape \[5\]"),
        (with_changes(fc1__weight=torch.ones(4, 32 * 8)), "names 5 labels.*has 4"),
        (with_changes(fc1__weight=torch.ones(5, 32 * 200)), "head_length 200"),
        (with_changes(gpt2model__wpe__weight=torch.ones(200, 32)), r"gpt2model\.wpe\.weight"),
        (with_changes(fc1__bias=torch.ones(5, dtype=torch.int64)), "no plain floating point"),
        (with_changes(fc1__bias=torch.ones(5).to_sparse()), "no plain floating point"),
        (code_among_tensors, "asks for .*system"),
    ],
)
def test_what_is_not_the_original_model_is_refused_and_no_code_runs(
    base_model: Path,
    original: models.SimpleGPT2SequenceClassifier,
    tmp_path: Path,
    change: Callable[[State, Path], Any],
    reason: str,
) -> None:
    torch.save(change(dict(original.state_dict()), tmp_path), tmp_path / "model.pth")
    with pytest.raises(BatchclfError, match=f"(?s){reason}") as refused:
        run(tmp_path / "model.pth", base_model, tmp_path / "model")
    assert refused.value.exit_code == 64
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def saved(state: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def zip_of_something_else() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world\n",
        b"\x80",
        zip_of_something_else(),
        pickle.dumps({"a": 1}),
        saved([1, 2]),
        saved({}),
        saved({1: torch.ones(2)}),
    ],
    ids=["empty", "text", "byte", "zip", "pickle", "list", "nothing", "number"],
)
def test_a_file_that_is_no_state_dict_is_refused(
    base_model: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        run(tmp_path / "model.pth", base_model, tmp_path / "model")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_file_that_was_cut_short_is_refused(
    original: models.SimpleGPT2SequenceClassifier,
    base_model: Path,
    tmp_path: Path,
    share: float,
    is_zip: bool,
) -> None:
    whole = saved(original.state_dict(), _use_new_zipfile_serialization=is_zip)
    (tmp_path / "model.pth").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"copy it again|damaged"):
        run(tmp_path / "model.pth", base_model, tmp_path / "model")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=5),
    st.booleans(),
)
def test_damaged_bytes_are_refused_or_change_nothing_else(
    original: models.SimpleGPT2SequenceClassifier,
    base_model: Path,
    tmp_path: Path,
    damage: list[tuple[int, int]],
    is_zip: bool,
) -> None:
    content = bytearray(saved(original.state_dict(), _use_new_zipfile_serialization=is_zip))
    for place, value in damage:
        content[place] = value
    (tmp_path / "model.pth").write_bytes(content)
    try:
        import_checkpoint(
            tmp_path / "model.pth",
            base_model=str(base_model),
            labels=ORDER,
            output=tmp_path / "model",
            overwrite=True,
        )
    except BatchclfError as error:
        assert error.exit_code == 64  # noqa: PT017 - a file that still loads is fine too


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (ORDER[:4], "names 4 labels.*has 5"),
        (("sport", "sport", "tech", "politics", "music"), "names one twice"),
        (("sport", "", "tech", "politics", "music"), "empty label"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    original: models.SimpleGPT2SequenceClassifier,
    base_model: Path,
    tmp_path: Path,
    labels: tuple[str, ...],
    reason: str,
) -> None:
    torch.save(original.state_dict(), tmp_path / "model.pth")
    with pytest.raises(BatchclfError, match=reason) as refused:
        run(tmp_path / "model.pth", base_model, tmp_path / "model", labels)
    assert refused.value.exit_code == 64


def test_a_file_that_is_not_there_or_a_folder_is_refused(base_model: Path, tmp_path: Path) -> None:
    for file in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            run(file, base_model, tmp_path / "model")


def test_a_model_that_stands_there_is_not_replaced_unasked(
    original: models.SimpleGPT2SequenceClassifier, base_model: Path, tmp_path: Path
) -> None:
    torch.save(original.state_dict(), tmp_path / "model.pth")
    run(tmp_path / "model.pth", base_model, tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds a model already"):
        run(tmp_path / "model.pth", base_model, tmp_path / "model")
