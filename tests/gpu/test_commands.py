"""The commands on a CUDA device, in processes of their own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow.dataset as ds
import pytest
import torch
from gpu.conftest import SAMPLE, SMALL_MODEL, batchclf

if TYPE_CHECKING:
    from pathlib import Path

NUM_ROWS = 125  # of the sample


def labels(output: Path) -> dict[str, str]:
    table = ds.dataset(output, ignore_prefixes=["_"]).to_table(columns=["id", "label", "error"])
    assert table.num_rows == NUM_ROWS
    assert table["error"].null_count == NUM_ROWS
    return dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))


def classify(output: Path, cache: Path, *options: str) -> tuple[dict[str, str], dict[str, object]]:
    where = ("--model", SMALL_MODEL, "--output", output, "--log-format", "json")
    run = batchclf("classify", SAMPLE, *where, *options, cache=cache)
    assert run.returncode == 0, run.stderr
    return labels(output), json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_classify_labels_on_the_device_as_on_the_cpu(dtype: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected, _ = classify(tmp_path / "cpu", cache, "--device", "cpu", "--dtype", "float32")
    found, summary = classify(tmp_path / "cuda", cache, "--device", "cuda", "--dtype", dtype)
    assert str(summary["device"]).startswith("cuda")
    differing = [key for key in expected if found[key] != expected[key]]
    assert len(differing) <= (0 if dtype == "float32" else 1)


def test_device_all_labels_each_row_once_with_a_process_for_each_device(tmp_path: Path) -> None:
    options = ("--device", "all", "--rows-per-shard", "4")
    _, summary = classify(tmp_path / "out", tmp_path / "cache", *options)
    assert summary["complete"]
    notes = list((tmp_path / "out").glob("fp=*/_runs/*.json"))
    assert len(notes) == torch.cuda.device_count()


def test_a_device_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    device = f"cuda:{torch.cuda.device_count()}"
    where = ("--model", SMALL_MODEL, "--output", tmp_path / "out", "--device", device)
    run = batchclf("classify", SAMPLE, *where, cache=tmp_path / "cache")
    assert run.returncode == 64
    assert "torch sees" in run.stderr
