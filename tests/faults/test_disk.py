"""Fault 28: no space left."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
import servers
from faults.commands import END_S, QUIET, Classify
from faults.inputs import as_parquet, with_blob
from faults.places import LocalPlace, Place, S3Place, temporary
from faults.queues import HELD_FOR_LONG, shard_message, wait_for_visible
from servers import Queue

WIDE_BYTES = 4 << 20  # of an output, or of an input
DISK_BYTES = 2 << 20

# Mounts a small disk that only the command sees, and lists what the command left on it.
ON_A_SMALL_DISK = f"""
mount -t tmpfs -o size={DISK_BYTES} tmpfs "$1" || exit 99
folder=$1 list=$2; shift 2
"$@"
code=$?
find "$folder" -type f > "$list"
exit $code
"""


@pytest.fixture(scope="session")
def wide() -> pa.Table:
    return with_blob(WIDE_BYTES)


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A folder to mount on; skips where an ordinary user may not mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if under_small_disk(disk, ["/bin/true"]).returncode != 0:
        pytest.skip("no user namespaces here, so no small disk can be mounted")
    return disk


def under_small_disk(
    disk: Path, command: Sequence[str | Path], env: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    unshare = shutil.which("unshare") or "/usr/bin/unshare"
    namespaces = ["--user", "--map-root-user", "--mount"]
    shell = ["sh", "-c", ON_A_SMALL_DISK, "sh", str(disk), str(left_on(disk))]
    wrapped: list[str | Path] = [unshare, *namespaces, *shell, *command]
    return run_to_end(wrapped, env or {})


def left_on(disk: Path) -> Path:
    """The file with the names of what a command left on the disk."""
    return disk.with_suffix(".list")


def run_to_end(
    command: Sequence[str | Path], env: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        servers.tethered(command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=servers.clean_environment(QUIET | env),
        timeout=END_S,
        check=False,
    )


def command_line(source: str, output: str | Path, model: Path) -> list[str | Path]:
    to: list[str | Path] = ["--model", model, "--output", output]
    options = ["--keep-columns", "blob", "--dtype", "float32"]
    return [servers.script("batchclf"), "classify", source, *to, *options]


def keep_blob(classify: Classify, place: Place, source: str) -> int:
    return classify(place, source, "--keep-columns", "blob").exit_code


def test_28_a_file_that_may_not_grow_ends_in_try_again_and_leaves_no_part(
    local: LocalPlace, classify: Classify, model: Path, wide: pa.Table
) -> None:
    source = local.write("wide.parquet", as_parquet(wide))
    prlimit = shutil.which("prlimit") or "/usr/bin/prlimit"
    limited = [prlimit, f"--fsize={DISK_BYTES}"]
    run = run_to_end([*limited, *command_line(source, local.output, model)], {})
    assert run.returncode == 75
    assert "File too large; free some space and run the same command again" in run.stderr
    assert (local.visible(), temporary(local)) == ([], [])
    assert keep_blob(classify, local, source) == 0


def test_28_a_full_disk_under_the_output_ends_in_try_again_and_leaves_no_part(
    local: LocalPlace, small_disk: Path, model: Path, wide: pa.Table
) -> None:
    source = local.write("wide.parquet", as_parquet(wide))
    run = under_small_disk(small_disk, command_line(source, small_disk / "out", model))
    assert run.returncode == 75
    assert "No space left on device; free some space" in run.stderr
    left = left_on(small_disk).read_text().splitlines()
    assert [name for name in left if "/_runs/" not in name] == []


@pytest.mark.parametrize("needed_for", ["input", "output"])
def test_28_a_full_disk_for_scratch_files_ends_in_try_again_and_nothing_is_visible_on_s3(
    s3: S3Place,
    local: LocalPlace,
    classify: Classify,
    small_disk: Path,
    model: Path,
    wide: pa.Table,
    needed_for: str,
) -> None:
    # a local input needs no scratch space
    source = (s3 if needed_for == "input" else local).write("wide.parquet", as_parquet(wide))
    env = {**s3.env, "TMPDIR": str(small_disk)}
    run = under_small_disk(small_disk, command_line(source, s3.output, model), env)
    assert run.returncode == 75
    assert f"scratch space in {small_disk}: No space left on device" in run.stderr
    assert s3.visible() == []
    assert left_on(small_disk).read_text() == ""
    assert keep_blob(classify, s3, source) == 0


def test_28_a_full_disk_for_scratch_files_ends_a_worker_with_its_message_given_back(
    s3: S3Place, queue: Queue, small_disk: Path, model: Path, wide: pa.Table
) -> None:
    source = s3.write("wide.parquet", as_parquet(wide))
    queue.send(shard_message(s3, source, wide.num_rows))
    command: list[str | Path] = [
        *(servers.script("batchclf"), "work", "--queue", queue.url, "--model", model),
        *("--output", s3.output, "--allow-source", f"s3://{s3.bucket}/in", *HELD_FOR_LONG),
    ]
    run = under_small_disk(small_disk, command, {**s3.env, "TMPDIR": str(small_disk)})
    assert run.returncode == 75
    assert f"scratch space in {small_disk}: No space left on device" in run.stderr
    assert s3.visible() == []
    assert left_on(small_disk).read_text() == ""
    wait_for_visible(queue, 1)
