"""A tiny model, a small archive, and the console script on them."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import models
import pytest
from e2e import archives

if TYPE_CHECKING:
    from conftest import RunBatchclf

# Two cores are shared by several processes of one small model each.
QUIET = {"OMP_NUM_THREADS": "1"}


class Classify(Protocol):
    """Run `batchclf classify` with the tiny model in float32 to its end."""

    def __call__(
        self, *args: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of five labels that reads 64 tokens."""
    return models.make_hf_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 35 rows in every format; nobody may change it.

    `a.parquet` has 10 rows in row groups of 4, 4 and 2, and `g.parquet` none. Row 3 of the first
    has no text, and row 2 of `b.csv` an empty one.
    """
    folder = tmp_path_factory.mktemp("archive") / "news"
    (folder / "2024").mkdir(parents=True)
    rows = archives.articles(35)
    rows[3]["text"] = None
    rows[12]["text"] = ""
    archives.write(folder / "2024" / "f.parquet", rows[32:])
    archives.write(folder / "a.parquet", rows[:10], row_group_rows=4)
    archives.write(folder / "b.csv", rows[10:17])
    archives.write(folder / "c.csv.gz", rows[17:22])
    archives.write(folder / "d.jsonl", rows[22:28])
    archives.write(folder / "e.jsonl.gz", rows[28:32])
    archives.write(folder / "g.parquet", [])
    for passed_over in ("_notes.csv", ".hidden.csv", "readme.txt"):
        (folder / passed_over).write_text("not for us\n")
    return folder


@pytest.fixture(scope="session")
def classify(run_batchclf: "RunBatchclf", model: Path) -> Classify:
    def run(
        *args: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = ("classify", *args, "--model", model, "--dtype", "float32")
        return run_batchclf(*command, env={**QUIET, **(env or {})}, cwd=cwd)

    return run
