"""`batchclf build` and `classify --backend openvino`: int8, kept only if it agrees with float32."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from e2e import archives, outputs
from e2e.conftest import QUIET
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from conftest import RunBatchclf

pytest.importorskip("nncf", reason="the extra openvino is not installed")

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE = REPOSITORY / "data" / "sample"
SMALL_MODEL = REPOSITORY / "data" / "models" / "bbc-small"
FLOAT32_TOLERANCE = 1e-5
INT8_TOLERANCE = 0.2  # of a probability
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model; the tests of this file give it a build."""
    return shutil.copytree(SMALL_MODEL, tmp_path_factory.mktemp("build") / "small")


@pytest.fixture(scope="module")
def built(run_batchclf: "RunBatchclf", model: Path) -> Done:
    # half of the 125 articles calibrate, so one other label is more than the default allows
    return run_batchclf(
        *("build", "--model", model, "--calibrate", SAMPLE, "--text-column", "title"),
        *("--text-column", "text", "--min-agreement", "0.95"),
        env=QUIET,
    )


@pytest.fixture(scope="module")
def label(run_batchclf: "RunBatchclf", model: Path, built: Done) -> Any:
    def run(output: Path, *args: str | Path) -> dict[str, Any]:
        assert built.returncode == 0, built.stderr
        done = run_batchclf(
            *("classify", SAMPLE, "--model", model, "--output", output, "--log-format", "json"),
            *args,
            env=QUIET,
        )
        assert done.returncode == 0, done.stderr
        summary: dict[str, Any] = json.loads(done.stdout)
        return summary

    return run


def probs(output: Path) -> dict[tuple[str, int], dict[str, float]]:
    return {
        (source, row["row"]): row["probs"]
        for source, rows in outputs.read_sources(output).items()
        for row in rows
    }


def largest_change(one: Path, other: Path) -> float:
    expected, found = probs(one), probs(other)
    assert expected.keys() == found.keys()
    return max(
        abs(found[key][name] - value)
        for key, values in expected.items()
        for name, value in values.items()
    )


@pytest.fixture(scope="module")
def exact(label: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exact") / "out"
    label(output, "--dtype", "float32")
    return output


def test_a_build_says_how_well_it_agrees_with_float32(built: Done, model: Path) -> None:
    assert built.returncode == 0, built.stderr
    said = json.loads(built.stdout.splitlines()[-1])
    note = json.loads((model / "openvino" / "int8" / "build.json").read_text())
    assert said["agreement"] == note["agreement"]
    assert said["agreement"]["labels"] >= 0.95
    assert said["agreement"]["num_texts"] + said["calibration_texts"] == 125


def test_openvino_in_float32_has_the_probabilities_of_torch(
    label: Any, exact: Path, tmp_path: Path
) -> None:
    label(tmp_path / "out", "--backend", "openvino", "--dtype", "float32")
    assert largest_change(exact, tmp_path / "out") <= FLOAT32_TOLERANCE


def test_auto_takes_the_build_and_writes_into_a_folder_of_its_own(
    label: Any, exact: Path, tmp_path: Path
) -> None:
    summary = label(tmp_path / "out", "--backend", "openvino")
    assert summary["dtype"] == "int8"
    assert Path(summary["output"]).name != outputs.fingerprint_folder(exact).name
    assert 0 < largest_change(exact, tmp_path / "out") <= INT8_TOLERANCE


def test_int8_labels_depend_on_no_batch(label: Any, tmp_path: Path) -> None:
    label(tmp_path / "one", "--backend", "openvino", "--dtype", "int8")
    label(tmp_path / "other", *("--backend", "openvino", "--max-batch-tokens", "256"))
    assert largest_change(tmp_path / "one", tmp_path / "other") <= INT8_TOLERANCE / 10


def test_a_model_without_a_build_names_the_command_that_makes_one(
    run_batchclf: "RunBatchclf", tmp_path: Path
) -> None:
    done = run_batchclf(
        *("classify", SAMPLE, "--model", SMALL_MODEL, "--output", tmp_path / "out"),
        *("--backend", "openvino", "--dtype", "int8"),
        env=QUIET,
    )
    assert done.returncode == 64
    assert "batchclf build --model" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--dtype", "int8"), "needs --backend openvino"),
        (("--backend", "openvino", "--dtype", "float16"), "knows auto, int8, bfloat16 and float32"),
        (("--backend", "openvino", "--device", "cuda"), "computes on the CPU"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    run_batchclf: "RunBatchclf", tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    done = run_batchclf(
        *("classify", SAMPLE, "--model", SMALL_MODEL, "--output", tmp_path / "out", *options),
        env=QUIET,
    )
    assert (done.returncode, reason in done.stderr) == (64, True), done.stderr


def test_a_build_that_disagrees_is_refused_and_nothing_is_kept(
    run_batchclf: "RunBatchclf", tmp_path: Path
) -> None:
    undecided = models.make_hf_checkpoint(tmp_path / "undecided")
    weights = load_file(undecided / "model.safetensors")
    torch.manual_seed(0)
    # labels so close to each other that any rounding decides between them
    first = weights["score.weight"][:1]
    weights["score.weight"] = first + torch.randn_like(weights["score.weight"]) * 1e-3
    save_file(weights, undecided / "model.safetensors", {"format": "pt"})
    news = archives.write(tmp_path / "news.csv", archives.articles(200))
    done = run_batchclf("build", "--model", undecided, "--calibrate", news, env=QUIET)
    assert done.returncode == 64, done.stderr
    assert "fewer than --min-agreement 0.995" in done.stderr
    assert not list(undecided.glob("openvino/*"))


def test_too_few_articles_to_compare_on_are_an_error(
    run_batchclf: "RunBatchclf", model: Path, tmp_path: Path
) -> None:
    few = archives.write(tmp_path / "few.csv", archives.articles(5))
    done = run_batchclf("build", "--model", model, "--calibrate", few, env=QUIET)
    assert done.returncode == 65
    assert "at least 10" in done.stderr


@pytest.mark.parametrize("spoil", ["graph.bin", "build.json"])
def test_a_damaged_build_is_refused(
    run_batchclf: "RunBatchclf", built: Done, model: Path, tmp_path: Path, spoil: str
) -> None:
    spoilt = shutil.copytree(model, tmp_path / "spoilt")
    path = spoilt / "openvino" / "int8" / spoil
    path.write_bytes(path.read_bytes()[:-7])
    done = run_batchclf(
        *("classify", SAMPLE, "--model", spoilt, "--output", tmp_path / "out"),
        *("--backend", "openvino"),
        env=QUIET,
    )
    assert done.returncode == 64
    assert spoil.partition(".")[0] in done.stderr or "build" in done.stderr


def test_a_build_of_other_weights_is_refused(
    run_batchclf: "RunBatchclf", built: Done, model: Path, tmp_path: Path
) -> None:
    other = models.make_hf_checkpoint(tmp_path / "other")
    shutil.copytree(model / "openvino", other / "openvino")
    done = run_batchclf(
        *("classify", SAMPLE, "--model", other, "--output", tmp_path / "out"),
        *("--backend", "openvino"),
        env=QUIET,
    )
    assert done.returncode == 64
    assert "other weights" in done.stderr
