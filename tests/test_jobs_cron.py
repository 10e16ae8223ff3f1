"""The nightly run on one machine: the crontab's command really run, the systemd units verified."""

import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import models
import pyarrow.dataset as ds
import pytest
import servers

FOLDER = Path(__file__).resolve().parents[1] / "jobs" / "cron"
INSTALLED_SCRIPTS, INSTALLED_SETTINGS = "/usr/local/lib/batchclf", "/etc/batchclf.env"
INSTALLED_PROGRAM = "/opt/batchclf/bin/batchclf"
UNITS = ("batchclf.service", "batchclf.timer", "batchclf-failed.service")
NUM_ROWS = 5
TIMEOUT_S = 120
TRIES = 3


def entry() -> tuple[list[str], str, str]:
    """The five time fields, the user and the command of the crontab's one entry."""
    lines = (FOLDER / "crontab").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if re.match(r"[\d*]", line)]
    *when, user, command = line.split(maxsplit=6)
    return when, user, command


@dataclass(frozen=True)
class Nightly:
    """The crontab's command, with a folder of the test in the place of the system's."""

    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "labelled"

    @property
    def told(self) -> str:
        """What the hook was told: its subject, and the text under it."""
        file = self.folder / "told"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    @property
    def logs(self) -> list[str]:
        files = sorted((self.folder / "state" / "logs").glob("*.log"))
        return [file.read_text(encoding="utf-8") for file in files]

    def configure(self, **settings: object) -> None:
        """Append to the settings; the last word counts, in a shell as in systemd."""
        with (self.folder / "settings.env").open("a", encoding="utf-8") as file:
            file.writelines(f'{name}="{value}"\n' for name, value in settings.items())

    def write_program(self, name: str, *lines: str) -> Path:
        path = self.folder / name
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
        path.chmod(0o755)
        return path

    def start(self) -> subprocess.Popen[str]:
        """Start it as cron does: with a shell, in a session of its own, and with few variables."""
        _, _, command = entry()
        command = command.replace(INSTALLED_SCRIPTS, str(FOLDER))
        command = command.replace(INSTALLED_SETTINGS, str(self.folder / "settings.env"))
        return subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.folder)},
            start_new_session=True,
        )

    def run(self) -> tuple[int, str]:
        """Its exit code and all that it said, which cron would mail."""
        with self.start() as process:
            try:
                said = process.communicate(timeout=TIMEOUT_S)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, "".join(said)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_hf_checkpoint(tmp_path_factory.mktemp("cron") / "tiny")


@pytest.fixture
def nightly(tmp_path: Path, model: Path) -> Nightly:
    """The settings that ship, with the paths of this test over them."""
    shutil.copy(FOLDER / "settings.env", tmp_path)
    rows = "".join(f"a{row},Shares rise,Profits of {row} doubled.\n" for row in range(NUM_ROWS))
    (tmp_path / "my news.csv").write_text(f"url,title,body\n{rows}", encoding="utf-8")
    nightly = Nightly(tmp_path)
    hook = nightly.write_program("hook", f"{{ echo \"$1\"; cat; }} >>'{tmp_path}/told'")
    nightly.configure(
        NIGHTLY_PROGRAM=servers.script("batchclf"),
        NIGHTLY_INPUTS=f"{tmp_path}/my*.csv",
        NIGHTLY_STATE=tmp_path / "state",
        NIGHTLY_NOTIFY=hook,
        NIGHTLY_TRIES=TRIES,
        NIGHTLY_WAIT_S=0,
        BATCHCLF_CLASSIFY_MODEL=model,
        BATCHCLF_CLASSIFY_OUTPUT=nightly.output,
        BATCHCLF_CLASSIFY_KEEP_COLUMNS="url",
        BATCHCLF_CLASSIFY_DTYPE="float32",
        OMP_NUM_THREADS=1,
    )
    return nightly


@pytest.fixture
def answering(nightly: Nightly) -> Path:
    """A program in the place of batchclf: it ends with the exit codes in a file, line by line."""
    answers = nightly.folder / "answers"
    program = nightly.write_program(
        "program",
        "echo called",
        f"code=$(sed -n 1p '{answers}')",
        f"sed -i 1d '{answers}'",
        'exit "$code"',
    )
    nightly.configure(NIGHTLY_PROGRAM=program)
    return answers


def test_it_labels_the_archive_and_says_nothing_to_cron(nightly: Nightly) -> None:
    exit_code, said = nightly.run()
    assert (exit_code, said, nightly.told) == (0, "", "")
    table = ds.dataset(next(nightly.output.glob("fp=*"))).to_table()
    assert (table.num_rows, table["label"].null_count) == (NUM_ROWS, 0)
    (log,) = nightly.logs
    assert f"labelled {NUM_ROWS} rows" in log


def test_a_second_run_while_the_first_is_at_work_does_nothing(nightly: Nightly) -> None:
    gate = nightly.folder / "gate"
    os.mkfifo(gate)
    batchclf = servers.script("batchclf")
    slow = nightly.write_program("slow", f"read -r _ <'{gate}'", f"exec '{batchclf}' \"$@\"")
    nightly.configure(NIGHTLY_PROGRAM=slow)
    first = nightly.start()
    try:
        with gate.open("w", encoding="utf-8") as opened:  # waits until the first has its lock
            assert nightly.run() == (
                0,
                "batchclf: the run before is still at work, so this one does nothing\n",
            )
            assert not nightly.output.exists()
            opened.write("go\n")
        first.communicate(timeout=TIMEOUT_S)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
            first.communicate()
    assert (first.returncode, len(nightly.logs)) == (0, 1)


def test_the_lock_is_free_again_after_a_run(nightly: Nightly, answering: Path) -> None:
    answering.write_text("0\n", encoding="utf-8")
    nightly.run()
    with (nightly.folder / "state" / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_input_that_fails_is_told_to_the_hook_with_the_end_of_the_log(nightly: Nightly) -> None:
    (nightly.folder / "my news.csv").write_text("words\nhello\n", encoding="utf-8")
    exit_code, said = nightly.run()
    assert (exit_code, said) == (65, "")
    subject, _, text = nightly.told.partition("\n")
    assert subject == f"batchclf on {os.uname().nodename} ended with exit code 65"
    assert "no text column 'title'" in text


def test_exit_code_75_is_tried_again_and_forgotten_when_it_passes(
    nightly: Nightly, answering: Path
) -> None:
    answering.write_text("75\n0\n", encoding="utf-8")
    assert nightly.run() == (0, "")
    (log,) = nightly.logs
    assert log.count("called") == 2
    assert nightly.told == ""


def test_exit_code_75_is_tried_so_often_and_then_told(nightly: Nightly, answering: Path) -> None:
    answering.write_text("75\n" * 9, encoding="utf-8")
    assert nightly.run() == (75, "")
    (log,) = nightly.logs
    assert log.count("called") == TRIES
    assert nightly.told.count("exit code 75\n") == 1


def test_other_failures_are_not_tried_again(nightly: Nightly, answering: Path) -> None:
    answering.write_text("64\n0\n", encoding="utf-8")
    assert nightly.run() == (64, "")
    (log,) = nightly.logs
    assert log.count("called") == 1


def test_a_hook_that_fails_itself_leaves_the_word_to_cron(
    nightly: Nightly, answering: Path
) -> None:
    answering.write_text("65\n", encoding="utf-8")
    nightly.configure(NIGHTLY_NOTIFY="/bin/false")
    exit_code, said = nightly.run()
    assert exit_code == 65
    assert "batchclf ended with exit code 65, and /bin/false failed; see " in said


def test_old_logs_are_removed(nightly: Nightly, answering: Path) -> None:
    answering.write_text("0\n", encoding="utf-8")
    logs = nightly.folder / "state" / "logs"
    logs.mkdir(parents=True)
    for name, days in (("old.log", 40), ("new.log", 2)):
        (logs / name).touch()
        written = time.time() - days * 86400
        os.utime(logs / name, (written, written))
    nightly.run()
    assert [(logs / name).exists() for name in ("old.log", "new.log")] == [False, True]


def test_the_hook_that_ships_sends_a_mail(nightly: Nightly) -> None:
    mail = nightly.folder / "mail"
    nightly.write_program("sendmail", f"{{ echo \"$@\"; cat; }} >'{mail}'")
    subprocess.run(
        [FOLDER / "notify", "it has failed"],
        input="the end of the log\n",
        text=True,
        env={"PATH": f"{nightly.folder}:/usr/bin:/bin", "MAIL_TO": "ops@example.org"},
        check=True,
    )
    options, *lines = mail.read_text(encoding="utf-8").splitlines()
    assert options == "-t"
    assert lines[:2] == ["To: ops@example.org", "Subject: it has failed"]
    assert lines[lines.index("") :] == ["", "the end of the log"]


def test_the_crontab_says_when_who_and_what() -> None:
    when, user, command = entry()
    assert all(re.fullmatch(r"\*|\d+", field) for field in when)
    program, settings = shlex.split(command)
    script = FOLDER / Path(program).name
    assert os.access(script, os.X_OK)
    assert (user, settings) == ("batchclf", INSTALLED_SETTINGS)


def test_the_crontab_ends_with_a_line_break_or_cron_passes_over_its_last_line() -> None:
    assert (FOLDER / "crontab").read_text(encoding="utf-8").endswith("\n")


def test_the_settings_that_ship_are_options_of_classify() -> None:
    from batchclf.cli import cli

    known = {option.envvar for option in cli.commands["classify"].params}
    text = (FOLDER / "settings.env").read_text(encoding="utf-8")
    assert set(re.findall(r"^(BATCHCLF_\w+)=", text, re.MULTILINE)) <= known


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze; apt-get install systemd")
    for name in UNITS:
        text = (FOLDER / name).read_text(encoding="utf-8")
        program = str(servers.script("batchclf"))
        (tmp_path / name).write_text(text.replace(INSTALLED_PROGRAM, program), encoding="utf-8")
    run = subprocess.run(
        [analyze, "verify", "--man=no", *(tmp_path / name for name in UNITS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def unit(name: str) -> ConfigParser:
    parser = ConfigParser(interpolation=None, comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(FOLDER / name, encoding="utf-8")
    return parser


def test_the_service_tries_again_on_75_and_so_often() -> None:
    service = unit("batchclf.service")
    assert service["Service"]["RestartForceExitStatus"] == "75"
    assert int(service["Unit"]["StartLimitBurst"]) > 1
    assert "Restart" not in service["Service"]


def test_the_service_and_the_crontab_run_the_same_command() -> None:
    line = unit("batchclf.service")["Service"]["ExecStart"].removeprefix(INSTALLED_PROGRAM)
    assert line.strip() in (FOLDER / "nightly").read_text(encoding="utf-8")


def test_the_service_has_time_to_stop() -> None:
    """The promise is 30 s from SIGTERM."""
    assert int(unit("batchclf.service")["Service"]["TimeoutStopSec"].removesuffix("s")) > 30


def test_a_failure_of_the_service_starts_the_unit_that_tells() -> None:
    assert unit("batchclf.service")["Unit"]["OnFailure"] in UNITS
