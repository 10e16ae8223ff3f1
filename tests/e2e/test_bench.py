"""`batchclf bench`: ratios of one run, and one JSON object at the end."""

import json
from pathlib import Path

import pytest
from conftest import RunBatchclf
from e2e.conftest import QUIET


def test_bench_measures_both_at_every_length(run_batchclf: RunBatchclf, model: Path) -> None:
    rows = ("--rows", "12", "--peer-rows", "4", "--repeats", "2")
    lengths = ("--max-length", "16", "--max-length", "32")
    run = run_batchclf("bench", "--model", model, *rows, *lengths, env=QUIET)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert [result["max_length"] for result in found["results"]] == [16, 32]
    for result in found["results"]:
        ours = result["batchclf"]
        for peer in result["peers"].values():
            assert len(ours["runs"]) == len(peer["runs"]) == 2
            assert peer["ratio"] == pytest.approx(
                ours["articles_per_s"] / peer["articles_per_s"], rel=0.02
            )
        assert ours["peak_rss_mib"] > 0
        assert result["ceiling_gflops"] > 0
        assert 0 <= result["share_of_ceiling"] < 1
        assert 0 <= result["padding_waste"] < 0.5
        assert result["largest_change_of_a_probability_alone"] < 0.02


def test_bench_takes_articles_from_a_file(
    run_batchclf: RunBatchclf, model: Path, archive: Path
) -> None:
    options = ("--input", archive / "d.jsonl", "--rows", "5", "--peer-rows", "2")
    run = run_batchclf("bench", "--model", model, *options, "--max-length", "16", env=QUIET)
    assert run.returncode == 0, run.stderr
    assert "x as fast" in run.stdout


def test_bench_measures_openvino_where_it_is_installed(
    run_batchclf: RunBatchclf, model: Path
) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    options = ("--backend", "openvino", "--rows", "5", "--peer-rows", "2", "--max-length", "16")
    run = run_batchclf("bench", "--model", model, *options, "--dtype", "float32", env=QUIET)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["settings"]["backend"] == "openvino"
    assert found["results"][0]["peers"]["openvino_static"]["articles_per_s"] > 0
