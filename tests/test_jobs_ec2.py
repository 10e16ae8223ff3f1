import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "jobs" / "ec2"
SCRIPT = (FOLDER / "user-data.sh").read_text(encoding="utf-8")


@pytest.fixture
def unit() -> str:
    """The systemd unit that the script writes."""
    found = re.search(r"<<'UNIT'\n(.*?)^UNIT$", SCRIPT, re.DOTALL | re.MULTILINE)
    assert found
    return found.group(1)


def run_with_fakes(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run the script with paths under `folder` and programs that write down how they are called."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("dnf", "systemctl", "aws", "docker"):
        path = programs / name
        path.write_text(
            f'#!/bin/sh\necho "{name} $*" >>{folder}/calls\n[ "$1" = ssm ] && echo hush\n:\n'
        )
        path.chmod(0o755)
    for name in ("/etc", "/opt/batchclf"):
        script = script.replace(name, f"{folder}{name}")
    (folder / "etc/systemd/system").mkdir(parents=True)
    (folder / "opt/batchclf/model").mkdir(parents=True)
    return subprocess.run(
        ["bash", "-c", script],
        env={"PATH": f"{programs}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_user_data_fits_into_what_ec2_takes() -> None:
    # https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/user-data.html: 16 KB
    assert SCRIPT.startswith("#!")
    assert len(SCRIPT.encode()) <= 16_384


def test_it_installs_fetches_and_starts(tmp_path: Path) -> None:
    script = SCRIPT.replace("TOKEN_PARAMETER= ", "TOKEN_PARAMETER=/batchclf/token ")
    result = run_with_fakes(tmp_path, script)
    assert result.returncode == 0, result.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "dnf install --assumeyes docker"
    assert any(call.startswith("aws s3 sync") for call in calls)
    assert "aws ecr get-login-password --region REGION" in calls
    assert calls[-1] == "systemctl enable --now batchclf-serve.service"
    settings = tmp_path / "etc/batchclf-serve.env"
    assert "BATCHCLF_SERVE_TOKEN=hush" in settings.read_text().splitlines()
    assert settings.stat().st_mode & 0o077 == 0
    assert "hush" not in (tmp_path / "etc/systemd/system/batchclf-serve.service").read_text()


def test_a_step_that_fails_ends_it(tmp_path: Path) -> None:
    script = SCRIPT.replace("docker pull", "false")
    assert run_with_fakes(tmp_path, script).returncode != 0
    assert not (tmp_path / "etc/batchclf-serve.env").exists()


def test_the_container_gets_the_bare_argument_and_few_rights(unit: str) -> None:
    command = re.sub(r"\\\n\s*", "", unit.split("ExecStart=", 1)[1].split("\n#", maxsplit=1)[0])
    assert re.search(r"\$\{IMAGE\} serve ", command)
    for option in ("--read-only", "--cap-drop ALL", "no-new-privileges", ":/opt/ml/model:ro"):
        assert option in command


def test_systemd_accepts_the_unit(unit: str, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze")
    path = tmp_path / "batchclf-serve.service"
    path.write_text(unit.replace("/usr/bin/docker", "/bin/true").replace("docker.service", ""))
    result = subprocess.run(
        [program, "verify", "--man=no", path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
