"""Memory does not grow with the archive, and one row group may hold all of it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from e2e import archives, outputs
from e2e.conftest import QUIET

pytestmark = pytest.mark.slow

FEW, MANY = 100_000, 1_000_000
NUM_TEXTS = 500
MOST_GROWTH = 1.1
LINES_AFTER_S = 25.0  # by then a line of progress, one every 10 s, must have come


@dataclass(frozen=True)
class Run:
    summary: dict[str, Any]
    log: list[dict[str, Any]]
    peak_rss_kib: int
    output: Path


# Linux counts what a process had before its exec, and between vfork and exec that is the memory of
# its parent: all of pytest. So a small process stands between, and says what the next one took.
_MEASURE = """
import ctypes, os, signal, sys
child = os.fork()
if child == 0:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def label(model: Path, folder: Path, num_rows: int) -> Run:
    """Label so many rows of one row group in a process of its own."""
    texts = [row["text"][:30] for row in archives.articles(NUM_TEXTS)]
    news, output = folder / f"{num_rows}.parquet", folder / f"out-{num_rows}"
    # in no order, so that no two windows are alike
    order = np.random.default_rng(0).integers(NUM_TEXTS, size=num_rows)
    table = pa.table({"id": np.arange(num_rows), "text": pa.array(texts).take(order)})
    pq.write_table(table, news, row_group_size=num_rows)
    done = subprocess.run(
        servers.tethered(
            [
                *(sys.executable, "-I", "-S", "-c", _MEASURE, servers.script("batchclf")),
                *("classify", news, "--model", model, "--output", output),
                *("--dtype", "float32", "--log-format", "json"),
            ]
        ),
        capture_output=True,
        text=True,
        env=servers.clean_environment(QUIET),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary, peak_rss_kib = map(json.loads, done.stdout.splitlines())
    return Run(
        summary, [json.loads(line) for line in done.stderr.splitlines()], peak_rss_kib, output
    )


@pytest.mark.timeout(900)
def test_ten_times_the_rows_in_one_row_group_take_hardly_more_memory(
    model: Path, tmp_path: Path
) -> None:
    few = label(model, tmp_path, FEW)
    many = label(model, tmp_path, MANY)
    assert many.peak_rss_kib <= MOST_GROWTH * few.peak_rss_kib
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
