"""`batchclf verify` finds whatever is wrong with an output, and nothing where nothing is."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from e2e import archives, outputs
from e2e.conftest import QUIET

from batchclf import sink

if TYPE_CHECKING:
    from conftest import RunBatchclf
    from e2e.conftest import Classify

NUM_SHARDS = 6
NUM_ROWS = 12


@dataclass(frozen=True)
class Job:
    """An input, and its complete output in six shards of two rows."""

    news: Path
    output: Path

    @property
    def folder(self) -> Path:
        return outputs.fingerprint_folder(self.output)

    @property
    def files(self) -> list[Path]:
        return outputs.output_files(self.output)

    @property
    def success(self) -> Path:
        return self.folder / "_SUCCESS.json"


@pytest.fixture(scope="module")
def original(classify: "Classify", tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("original")
    job = Job(archives.write(folder / "news.csv", archives.articles(NUM_ROWS)), folder / "out")
    label(classify, job.news, job.output)
    return job


@pytest.fixture
def job(original: Job, tmp_path: Path) -> Job:
    """A copy of the output that a test may spoil; the input is the original one."""
    return Job(original.news, Path(shutil.copytree(original.output, tmp_path / "out")))


def label(classify: "Classify", news: Path, output: Path, *options: str) -> None:
    done = classify(news, "--output", output, *(options or ("--rows-per-shard", "2")))
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Verdict:
    exit_code: int
    found: dict[str, Any]

    @property
    def problems(self) -> list[str]:
        problems: list[str] = self.found["problems"]
        assert self.exit_code == (65 if problems else 0)
        return problems

    @property
    def notes(self) -> list[str]:
        notes: list[str] = self.found["notes"]
        return notes


@pytest.fixture(scope="module")
def verify(run_batchclf: "RunBatchclf") -> Any:
    def run(*args: Path) -> Verdict:
        done = run_batchclf("verify", *args, "--log-format", "json", env=QUIET)
        assert done.stderr == ""
        return Verdict(done.returncode, json.loads(done.stdout))

    return run


@pytest.fixture(scope="module")
def say(run_batchclf: "RunBatchclf") -> Any:
    def run(*args: Path) -> subprocess.CompletedProcess[str]:
        return run_batchclf("verify", *args, env=QUIET)

    return run


def test_a_complete_output_is_complete_and_whole(say: Any, original: Job) -> None:
    done = say(original.output)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("complete and whole: 6 shards, 12 rows (12 labelled")
    assert str(original.folder) in done.stdout


def test_a_complete_output_is_so_against_its_inputs_too(verify: Any, original: Job) -> None:
    verdict = verify(original.folder, original.news)
    assert verdict.problems == []
    assert verdict.notes == []
    assert verdict.found["num_shards"] == NUM_SHARDS
    assert verdict.found["counts"]["num_rows"] == NUM_ROWS
    assert verdict.found["output"] == str(original.folder)


def test_a_missing_shard_is_named(verify: Any, say: Any, job: Job) -> None:
    gone = job.files[2]
    gone.unlink()
    (problem,) = verify(job.output).problems
    assert problem == f"missing: {gone.name}"
    done = say(job.output, job.news)
    assert done.returncode == 65
    assert f"missing: {job.news} rows 4 to 6" in done.stdout
    assert "1 problem" in done.stdout


def test_an_output_without_success_is_not_complete(verify: Any, job: Job) -> None:
    job.success.unlink()
    (problem,) = verify(job.output).problems
    assert "_SUCCESS.json" in problem
    assert "run it again" in problem
    against_inputs = verify(job.output, job.news)
    assert against_inputs.problems == []
    assert "_SUCCESS.json" in against_inputs.notes[0]


def test_an_output_of_another_input_is_no_problem_but_noted(
    verify: Any, classify: "Classify", job: Job, tmp_path: Path
) -> None:
    more = archives.write(tmp_path / "more.jsonl", archives.articles(3, seed=1))
    label(classify, more, job.output)
    verdict = verify(job.output, job.news)
    assert verdict.problems == []
    assert any("2 outputs are of other inputs" in note for note in verdict.notes)


def test_a_torn_output_is_found(verify: Any, job: Job) -> None:
    torn = job.files[1]
    torn.write_bytes(torn.read_bytes()[:-100])
    (problem,) = verify(job.output).problems
    assert torn.name in problem
    assert "not a whole Parquet file" in problem


def test_an_empty_output_file_is_found(verify: Any, job: Job) -> None:
    job.files[1].write_bytes(b"")
    (problem,) = verify(job.output).problems
    assert job.files[1].name in problem


@pytest.mark.parametrize("column", ["id", "score", "n_tokens"])
def test_a_flipped_byte_is_found(verify: Any, job: Job, column: str) -> None:
    spoilt = job.files[4]
    content = bytearray(spoilt.read_bytes())
    group = pq.read_metadata(spoilt).row_group(0)
    chunk = next(
        group.column(i)
        for i in range(group.num_columns)
        if group.column(i).path_in_schema == column
    )
    begin = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    content[begin + chunk.total_compressed_size - 1] ^= 1
    spoilt.write_bytes(content)
    (problem,) = verify(job.output).problems
    assert spoilt.name in problem


@pytest.mark.parametrize(
    ("place", "bit"),
    [(b"\x05label", 0x01), (b"\x05label", 0x80), (b"num_labelled", 0x80), (b"nonce", 0x80)],
    ids=["another column name", "a broken column name", "a key", "a key of no count"],
)
def test_a_flipped_byte_in_the_footer_of_a_file_is_found(
    verify: Any, job: Job, place: bytes, bit: int
) -> None:
    spoilt = job.files[4]
    content = bytearray(spoilt.read_bytes())
    content[content.index(place, content.rindex(b"\x06schema")) + 1] ^= bit
    spoilt.write_bytes(content)
    (problem,) = verify(job.output).problems
    assert spoilt.name in problem


def test_overlapping_cuts_are_found(
    verify: Any, classify: "Classify", job: Job, tmp_path: Path
) -> None:
    label(classify, job.news, tmp_path / "other", "--rows-per-shard", "3")
    for path in outputs.output_files(tmp_path / "other")[1:2]:
        shutil.copy(path, job.folder)
    problems = verify(job.output).problems
    assert f"{job.news.as_uri()}: rows 3 to 4 stand twice" in problems
    assert f"{job.news.as_uri()}: rows 4 to 6 stand twice" in problems


def test_outputs_of_a_replaced_input_are_found(
    verify: Any, classify: "Classify", tmp_path: Path
) -> None:
    rows = archives.articles(4)
    news, output = archives.write(tmp_path / "news.csv", rows), tmp_path / "out"
    label(classify, news, output)
    archives.write(news, rows[::-1])
    verdict = verify(output, news)
    assert len([p for p in verdict.problems if p.startswith(f"missing: {news}")]) == 2
    assert "2 outputs are of other inputs than the plan's" in verdict.notes
    label(classify, news, output)
    (problem,) = verify(output).problems
    assert problem.startswith(f"{news.as_uri()}: was replaced, and outputs of 2 versions")


def test_several_fingerprints_under_one_output_are_refused_and_each_alone_is_fine(
    verify: Any, say: Any, classify: "Classify", job: Job
) -> None:
    first = job.folder
    label(classify, job.news, job.output, "--max-length", "16")
    done = say(job.output)
    assert done.returncode == 65
    for folder in job.output.glob("fp=*"):
        assert str(folder) in done.stderr
    assert verify(first).problems == []


def test_a_foreign_parquet_file_is_found(verify: Any, job: Job) -> None:
    pq.write_table(pa.table({"row": [0, 1]}), job.folder / "mine.parquet")
    (problem,) = verify(job.output).problems
    assert "mine.parquet" in problem
    assert "not written by batchclf" in problem


def test_an_output_with_other_rows_than_its_footer_says_is_found(verify: Any, job: Job) -> None:
    spoilt, other = job.files[:2]
    metadata = {**pq.read_metadata(spoilt).metadata, sink._SEAL.encode(): sink._UNSEALED.encode()}
    pq.write_table(
        pq.read_table(other, partitioning=None).replace_schema_metadata(metadata), spoilt
    )
    with spoilt.open("r+b") as file:
        sink._seal(file)
    (problem,) = verify(job.output).problems
    assert spoilt.name in problem
    assert "rows are not 0 to 2" in problem


def test_an_output_of_another_fingerprint_is_found(
    verify: Any, classify: "Classify", job: Job, tmp_path: Path
) -> None:
    label(classify, job.news, tmp_path / "other", "--rows-per-shard", "2", "--max-length", "16")
    stray = outputs.output_files(tmp_path / "other")[0]
    shutil.copy(stray, job.folder)
    problems = verify(job.output).problems
    other = outputs.fingerprint_folder(tmp_path / "other").name.removeprefix("fp=")
    assert any(stray.name in problem and other in problem for problem in problems)


def test_what_other_tools_leave_beside_the_outputs_is_passed_over(verify: Any, job: Job) -> None:
    for name in ("_SUCCESS", "_metadata", ".part.parquet.crc"):
        (job.folder / name).write_bytes(b"")
    assert verify(job.output).problems == []


@pytest.mark.parametrize("output", ["nothing", "empty", "news.csv"])
def test_a_folder_without_output_is_an_error(say: Any, tmp_path: Path, output: str) -> None:
    (tmp_path / "empty").mkdir()
    archives.write(tmp_path / "news.csv", [])
    done = say(tmp_path / output)
    assert done.returncode == 65, done.stderr
    assert str(tmp_path / output) in done.stderr
    assert "fp=" in done.stderr


def test_an_input_that_is_not_there_is_an_error(say: Any, original: Job, tmp_path: Path) -> None:
    done = say(original.output, tmp_path / "gone.csv")
    assert done.returncode == 65
    assert "gone.csv: no such file" in done.stderr
