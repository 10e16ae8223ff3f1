"""The console script as the tests of faults call it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fault_rules import Match
from faults.places import Place
from servers import Queue

if TYPE_CHECKING:
    import subprocess

    from faults.forks import Fork

END_S = 120.0  # until a process on a busy machine has ended
START_S = 60.0  # until it has come to what a test waits for
# Two cores are shared by several processes of one small model each.
QUIET = {"OMP_NUM_THREADS": "1"}
# So that a storm is over soon. The default is eight attempts within half a minute.
FEW_ATTEMPTS = {"AWS_MAX_ATTEMPTS": "2"}
# Of the requests of a run, the one that makes a labelled file appear.
COMMIT = Match(operation="PutObject", path=r"/fp=.*\.parquet$")
CALL_OF_LINK = 12  # of the first shard: after the ten calls of the probe and an fsync
AGENT = Path(__file__).with_name("agent")


@dataclass(frozen=True)
class Run:
    """A process that has ended.

    Attributes:
        answer: the JSON object on standard output; {} where it printed none.
        said: standard error, the log among it.
    """

    exit_code: int
    answer: dict[str, Any]
    said: str

    @property
    def num_committed(self) -> int:
        """Shards that this very run created."""
        return int(self.answer["num_shards"]["committed"])

    @property
    def num_done_before(self) -> int:
        """Shards of its share that it found there."""
        return int(self.answer["num_shards"]["done_before"])


class Classify(Protocol):
    """Run `batchclf classify` in a place to its end."""

    def __call__(
        self,
        place: Place,
        *args: str,
        model: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Run: ...


class StartClassify(Protocol):
    """Start `batchclf classify` in a place; see `end_of`."""

    def __call__(
        self,
        place: Place,
        *args: str,
        model: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> "subprocess.Popen[str]": ...


class ForkClassify(Protocol):
    """As `StartClassify`, in a fork: see `forks`."""

    def __call__(self, place: Place, *args: str) -> "Fork": ...


class Verify(Protocol):
    """Run `batchclf verify` on the output of a place, or a folder in it, against inputs."""

    def __call__(self, place: Place, *inputs: str, under: str = "") -> Run: ...


class Enqueue(Protocol):
    """Run `batchclf enqueue` for inputs of a place."""

    def __call__(self, place: Place, queue: Queue, *args: str) -> Run: ...


def parse_run(exit_code: int, stdout: str, stderr: str) -> Run:
    return Run(exit_code, json.loads(stdout) if stdout else {}, stderr)


def end_of(process: "subprocess.Popen[str] | Fork") -> Run:
    """Wait for the end of a process that writes to pipes."""
    stdout, stderr = process.communicate(timeout=END_S)
    assert process.returncode is not None
    return parse_run(process.returncode, stdout, stderr)


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to a living process, and its end."""
    assert process.poll() is None, f"ended by itself: {end_of(process)}"
    process.kill()
    process.communicate(timeout=END_S)


def at_call(number: int, signal_number: int, folder: Path, log: Path) -> dict[str, str]:
    """Variables that send a process a signal before its n-th fsync, link, unlink or replace."""
    return {
        "PYTHONPATH": str(AGENT),
        "FAULT_FOLDER": str(folder),
        "FAULT_LOG": str(log),
        "FAULT_CALL": str(number),
        "FAULT_SIGNAL": str(int(signal_number)),
    }


def impatient(most_s: float) -> dict[str, str]:
    """Variables with which a process waits no longer than that for a reply of S3 or SQS."""
    return {"PYTHONPATH": str(AGENT), "FAULT_READ_TIMEOUT": str(most_s)}


def wait_until_stopped(process: "subprocess.Popen[str]") -> None:
    """Wait until a process has stopped itself by SIGSTOP."""
    state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert state is not None
    assert state.si_code == os.CLD_STOPPED, f"ended before it stopped: {end_of(process)}"
