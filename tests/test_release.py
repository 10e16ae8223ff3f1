"""What a release holds: a source archive that builds, and a wheel that installs and starts."""

import email
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import servers
from conftest import REPOSITORY

import batchclf

pytestmark = pytest.mark.slow

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")
# What `python -m build` calls, in this environment: no network.
BUILD = "import setuptools.build_meta as backend, sys; backend.{}(sys.argv[1])"


def build(what: str, source: Path, output: Path) -> Path:
    output.mkdir(exist_ok=True)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD.format(what), output],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    shutil.copytree(
        REPOSITORY / "batchclf", source / "batchclf", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in BUILT_FROM:
        shutil.copy(REPOSITORY / name, source)
    return build("build_sdist", source, folder / "archive")


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what the source archive holds, and from nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("build_wheel", source, folder / "out")


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(opened.read(name))


def test_the_wheel_holds_the_whole_package_its_licence_and_nothing_else(wheel: Path) -> None:
    package = REPOSITORY / "batchclf"
    ours = {
        str(path.relative_to(REPOSITORY))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"batchclf/py.typed", "batchclf/serve/page/index.html"} <= ours
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == ours
    assert any(name.endswith("licenses/LICENSE") for name in about)


def test_the_metadata_says_what_the_project_is(metadata: Message) -> None:
    assert metadata["Name"] == "batchclf"
    assert metadata["Version"] == batchclf.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata["Description-Content-Type"] == "text/markdown"
    payload = metadata.get_payload()
    assert isinstance(payload, str)
    assert payload.startswith("# batchclf")


def test_what_tests_need_is_needed_by_tests_alone(metadata: Message) -> None:
    runtime = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    names = {need.split(">")[0].split("<")[0].split("[")[0].strip() for need in runtime}
    assert {"torch", "pyarrow", "click", "boto3"} <= names
    assert not names & {"pytest", "moto", "mypy", "ruff", "hypothesis", "pandas"}


def test_the_wheel_installs_into_a_new_environment_and_starts(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    python = tmp_path / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
        env=servers.clean_environment({"PIP_NO_INPUT": "1"}),
    )
    # The libraries that it needs are here already; behind its own folder, where it is installed.
    (site,) = tmp_path.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def output(*command: str | Path) -> str:
        environment = servers.clean_environment()
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = output(python, "-c", "import batchclf; print(batchclf.__file__)").strip()
    assert Path(found).is_relative_to(site)
    program = tmp_path / "bin" / "batchclf"
    assert output(program, "--version") == f"batchclf, version {batchclf.__version__}\n"
    assert "classify" in output(program, "--help")
