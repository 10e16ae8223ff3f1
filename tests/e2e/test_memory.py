"""Memory does not grow with the archive, and one row group may hold all of it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from e2e import archives, outputs
from e2e.conftest import QUIET

if TYPE_CHECKING:
    from conftest import StartBatchclf

pytestmark = [pytest.mark.xdist_group("e2e memory"), pytest.mark.slow]

FEW, MANY = 100_000, 1_000_000
NUM_TEXTS = 500
MOST_GROWTH = 1.1
LINES_AFTER_S = 25.0  # by then a line of progress, one every 10 s, must have come


@dataclass(frozen=True)
class Run:
    summary: dict[str, Any]
    log: list[dict[str, Any]]
    peak_rss_bytes: int
    output: Path


def label(start_batchclf: "StartBatchclf", model: Path, folder: Path, num_rows: int) -> Run:
    """Label so many rows of one row group in a process of its own."""
    texts = [row["text"][:30] for row in archives.articles(NUM_TEXTS)]
    news = folder / f"{num_rows}.parquet"
    columns = {
        "id": np.arange(num_rows),
        # in another order each time, so that no two windows are alike
        "text": pa.array(texts).take(np.random.default_rng(0).integers(NUM_TEXTS, size=num_rows)),
    }
    pq.write_table(pa.table(columns), news, row_group_size=num_rows)
    log = folder / f"{num_rows}.log"
    process = start_batchclf(
        *("classify", news, "--model", model, "--output", folder / f"out-{num_rows}"),
        *("--dtype", "float32", "--log-format", "json"),
        env=QUIET,
        log=log,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, log.read_text()
    *lines, summary = map(json.loads, log.read_text().splitlines())
    return Run(summary, lines, usage.ru_maxrss * 1024, folder / f"out-{num_rows}")


@pytest.mark.timeout(900)
def test_ten_times_the_rows_in_one_row_group_take_hardly_more_memory(
    start_batchclf: "StartBatchclf", model: Path, tmp_path: Path
) -> None:
    few = label(start_batchclf, model, tmp_path, FEW)
    many = label(start_batchclf, model, tmp_path, MANY)
    assert many.peak_rss_bytes <= MOST_GROWTH * few.peak_rss_bytes
    assert many.summary["counts"]["num_labelled"] == MANY
    assert len(outputs.output_files(many.output)) == MANY // FEW
    rows = [
        pq.read_table(path, columns=["row"], partitioning=None)["row"].to_numpy()
        for path in outputs.output_files(many.output)
    ]
    assert np.array_equal(np.concatenate(rows), np.arange(MANY))
    if many.summary["seconds"] > LINES_AFTER_S:
        progress = [line for line in many.log if "left_s" in line]
        assert progress
        assert {"rows", "of", "rows_per_s", "tokens_per_s"} <= progress[0].keys()
        assert progress[0]["of"] == MANY
