"""`batchclf verify --fix` prints what completes an output; run as it stands, it does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from e2e import archives, outputs
from e2e.conftest import QUIET
from servers import clean_environment

if TYPE_CHECKING:
    from conftest import RunBatchclf

OPTIONS = (
    *("--text-column", "title", "--text-column", "text", "--id-column", "url"),
    *("--keep-columns", "published,id", "--min-score", "0.25", "--no-probs", "--max-length", "20"),
    *("--rows-per-shard", "2", "--limit", "15", "--max-batch-tokens", "512"),
)


def read(folder: Path) -> dict[str, pa.Table]:
    files = sorted(folder.glob("*.parquet"))
    return {path.name: pq.read_table(path, partitioning=None) for path in files}


def break_it(folder: Path) -> set[str]:
    """Spoil an output of eight shards in several ways; returns the names to be removed."""
    files = sorted(folder.glob("*.parquet"))
    (folder / "_SUCCESS.json").unlink()
    files[0].unlink()
    cut, flipped, copied = files[1], files[2], files[3]
    cut.write_bytes(cut.read_bytes()[:-20])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 3] ^= 1
    flipped.write_bytes(content)
    twice = folder / "it's a copy.parquet"
    shutil.copy(copied, twice)
    foreign = folder / "-not ours.parquet"
    foreign.write_text("not Parquet")
    return {cut.name, flipped.name, twice.name, foreign.name}


def test_the_printed_commands_complete_a_broken_output(
    run_batchclf: "RunBatchclf", model: Path, tmp_path: Path
) -> None:
    there = tmp_path / "a folder"
    there.mkdir()
    archives.write(there / "o'brien.csv", archives.articles(17))
    shutil.copytree(model, there / "my model")
    command = ("classify", "o'brien.csv", "--model", "my model", "--output", "out", *OPTIONS)
    done = run_batchclf(*command, env=QUIET, cwd=there)
    assert done.returncode == 0, done.stderr
    folder = outputs.fingerprint_folder(there / "out")
    before = read(folder)
    removed = break_it(folder)

    asked = run_batchclf("verify", there / "out", there / "o'brien.csv", "--fix", env=QUIET)
    assert asked.returncode == 65, asked.stderr
    lines = asked.stdout.splitlines()
    assert sum(line.startswith("rm -- ") for line in lines) == len(removed)
    assert {path.name for path in folder.glob("*.parquet")} >= removed  # nothing was done yet

    bin_folder = Path(sys.executable).parent
    env = {**clean_environment(QUIET), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(
        ["sh", "-e"],
        input=asked.stdout,
        env=env,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    after = read(folder)
    assert after == before
    proved = run_batchclf("verify", there / "out", "--fix", "--log-format", "json", env=QUIET)
    assert proved.returncode == 0, proved.stdout
    verdict = json.loads(proved.stdout)
    assert (verdict["problems"], verdict["fix"]) == ([], [])
