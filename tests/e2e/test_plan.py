"""What `batchclf plan` shows in a terminal and as JSON, of every format, locally and on S3."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from e2e import archives
from e2e.conftest import QUIET
from servers import Endpoint, fresh_bucket

if TYPE_CHECKING:
    from conftest import RunBatchclf

COLUMNS = 80


def test_a_local_archive_as_json_with_a_file_that_cannot_be_read(
    run_batchclf: "RunBatchclf", model: Path, archive: Path, tmp_path: Path
) -> None:
    inputs = shutil.copytree(archive, tmp_path / "in")
    (inputs / "h.parquet").write_bytes(b"PAR1 torn")
    before = sorted(tmp_path.rglob("*"))
    done = run_batchclf(
        *("plan", inputs, "--model", model, "--price-per-hour", "3.6", "--log-format", "json"),
        env={**QUIET, "XDG_CACHE_HOME": str(tmp_path / "in")},
    )
    assert done.returncode == 65, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert any("h.parquet" in json.loads(line)["message"] for line in done.stderr.splitlines())
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["num_files"], found["num_rows"], found["num_sampled"]) == (8, 35, 35)
    assert found["kinds"][".parquet"] == 4
    assert found["num_mine"] == 7
    assert {code: rows["value"] for code, rows in found["error_rows"].items()} == pytest.approx(
        {"null_text": 1, "empty_text": 1}
    )
    assert sum(each["share"] for each in found["lengths"]) == pytest.approx(1)
    assert [row["max_length"] for row in found["truncation"]] == [64]
    assert found["time"]["is_measured"]
    total_s = found["time"]["start_s"] + found["time"]["run_s"]["value"]
    assert found["time"]["cost"]["value"] == pytest.approx(total_s / 1000)


def test_a_sample_of_a_prefix_on_s3_drawn_in_a_plain_terminal(
    run_batchclf: "RunBatchclf", model: Path, moto: Endpoint, tmp_path: Path
) -> None:
    rows = archives.articles(3000)
    paths = [
        archives.write(tmp_path / "a.parquet", rows[:1000], row_group_rows=100),
        archives.write(tmp_path / "b.csv.gz", rows[1000:1500]),
        archives.write(tmp_path / "c.jsonl", rows[1500:]),
    ]
    with fresh_bucket(moto) as bucket:
        for path in paths:
            moto.s3.upload_file(str(path), bucket, f"in/{path.name}")
        done = run_batchclf(
            *("plan", f"s3://{bucket}/in/", "--model", model, "--sample", "600"),
            *("--workers", "2", "--price-per-hour", "1.5", "--tokens-per-second", "1000"),
            env={**QUIET, **moto.env, "PYTHONIOENCODING": "ascii"},
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= COLUMNS
    shown = {line[:10].strip(): line[10:].strip() for line in lines}
    assert shown["input"] == "3 files (1 .csv.gz, 1 .jsonl, 1 .parquet)"
    assert shown["sample"] == "600 rows from 150 places; +- is a 95% interval"
    assert shown["repeats"].startswith("at least ")
    assert shown["speed"] == "1,000 tokens/s of a worker"
    assert "with 2 workers" in shown["time"]
    assert "cost" in shown
    assert any("####" in line for line in lines)
    assert any("the model sees no more than 64" in line for line in lines)
