"""The Dockerfile, really built and run, without a Docker engine.

buildah needs a base image, and no registry is asked for one: debootstrap makes a small Debian. The
packages come from a folder of wheels, so the build itself has no network.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = "localhost/batchclf-test-base"
IMAGE = "localhost/batchclf-test"
DEBIAN = "bookworm"
DEBIAN_PYTHON = "3.11"
PACKAGES = "python3,python3-venv,ca-certificates,tini"
SAMPLE_ROWS = 125
BUILD_TIMEOUT_S = 1200


@dataclass(frozen=True)
class Buildah:
    """buildah with a store of its own, gone with its folder."""

    folder: Path

    def __call__(self, *args: str | Path) -> str:
        roots = ["--root", self.folder / "store", "--runroot", self.folder / "run"]
        return _run(
            ["buildah", *roots, *args], {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
        )


def _run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    missing = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("debootstrap and buildah's chroot isolation need root here")
    folder = tmp_path_factory.mktemp("buildah")
    yield Buildah(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def image(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("image")
    debian, wheels = folder / "debian", folder / "wheels"
    _run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, debian])
    empty = buildah("from", "scratch")
    buildah("add", "-q", empty, f"{debian}/", "/")
    buildah("commit", "-q", "--rm", empty, BASE)
    shutil.rmtree(debian)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
    version = ["--python-version", DEBIAN_PYTHON, "--only-binary", ":all:"]
    pinned = ["-c", REPOSITORY / ".ci/constraints.txt"]
    requirements = _requirements()
    _run([*pip, *version, *pinned, "-d", wheels, *requirements])
    buildah(
        *("build", "--pull-never", "--format", "docker", "-t", IMAGE),
        *("--build-arg", f"BASE_IMAGE={BASE}"),
        *("--build-arg", "TORCH_INDEX="),
        *("--build-arg", "PIP_OPTIONS=--no-index --find-links /wheels"),
        *("--volume", f"{wheels}:/wheels:ro"),
        REPOSITORY,
    )
    yield IMAGE
    shutil.rmtree(folder, ignore_errors=True)


def _requirements() -> list[str]:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    return [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["serve"],
    ]


@pytest.fixture
def container(buildah: Buildah, image: str) -> Iterator[str]:
    name = buildah("from", "--pull-never", image)
    yield name
    buildah("rm", name)


@pytest.fixture(scope="module")
def config(buildah: Buildah, image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", image))
    docker: dict[str, Any] = found["Docker"]["config"]
    return docker


def test_a_user_without_rights_labels_the_sample_archive_in_the_container(
    buildah: Buildah, container: str, config: dict[str, Any], tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        if folder.name.startswith("pytest-"):
            folder.chmod(0o755)
    mounts = ["--volume", f"{REPOSITORY / 'data'}:/data:ro", "--volume", f"{tmp_path}:/out"]
    buildah(
        *("run", *mounts, container, "--", *config["Entrypoint"], "classify", "/data/sample"),
        *("--model", "/data/models/bbc-small", "--output", "/out/labelled"),
    )
    table = ds.dataset(tmp_path / "labelled").to_table()
    assert (table.num_rows, table["label"].null_count) == (SAMPLE_ROWS, 0)
    assert {path.stat().st_uid for path in tmp_path.rglob("*")} == {int(config["User"])}


def test_the_container_cannot_change_its_own_program(buildah: Buildah, container: str) -> None:
    program = "/opt/batchclf"
    writable = buildah("run", container, "--", "find", program, "-writable", "!", "-type", "l")
    assert writable == ""


def test_the_container_does_not_run_as_root(config: dict[str, Any]) -> None:
    assert int(config["User"]) > 0


def test_an_init_passes_signals_on_to_the_command(config: dict[str, Any]) -> None:
    assert config["Entrypoint"] == ["tini", "--", "batchclf"]


def test_the_image_says_how_to_ask_for_its_health(config: dict[str, Any]) -> None:
    assert "/ping" in " ".join(config["Healthcheck"]["Test"])


def test_the_image_says_what_it_is(config: dict[str, Any]) -> None:
    assert config["Labels"]["org.opencontainers.image.title"] == "batchclf"
