"""The Dockerfile, really built and run, without a Docker engine.

buildah needs a base image, and no registry is asked for one: debootstrap makes a small Debian. The
packages come from a folder of wheels, so the build itself has no network. `buildah run` has no
option for a read-only root, so one test mounts the container and enters it with util-linux.
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
from servers import Endpoint, fresh_bucket

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = "localhost/batchclf-test-base"
IMAGE = "localhost/batchclf-test"
DEBIAN = "bookworm"
DEBIAN_PYTHON = "3.11"
PACKAGES = "python3,python3-venv,ca-certificates,tini"
SAMPLE_ROWS = 125
BUILD_TIMEOUT_S = 1200

# What `docker run --read-only --tmpfs /tmp --user UID --volume ... --network host` does, with the
# command as process 1.
READ_ONLY = """
root=$1 input=$2 output=$3 user=$4
shift 4
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --bind "$input" "$root/srv"
mount -o remount,bind,ro "$root/srv"
mount --bind "$output" "$root/mnt"
mount -o remount,bind,ro "$root"
exec chroot --userspec="$user:$user" "$root" "$@"
"""


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
    debian.mkdir()
    _run(["mount", "-t", "tmpfs", "tmpfs", debian])  # dpkg waits for the disk after each file
    try:
        _run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, debian])
        empty = buildah("from", "scratch")
        buildah("add", "-q", empty, f"{debian}/", "/")
    finally:
        _run(["umount", debian])
    buildah("commit", "-q", "--rm", empty, BASE)
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


@pytest.fixture(scope="module")
def container(buildah: Buildah, image: str) -> Iterator[str]:
    name = buildah("from", "--pull-never", image)
    yield name
    buildah("rm", name)


@pytest.fixture(scope="module")
def config(buildah: Buildah, image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", image))
    docker: dict[str, Any] = found["Docker"]["config"]
    return docker


def open_to_all(folder: Path) -> None:
    """Let the user of the container write into a folder of pytest's."""
    folder.chmod(0o777)
    for parent in folder.parents:
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)


def test_a_user_without_rights_labels_the_sample_archive_in_the_container(
    buildah: Buildah, container: str, config: dict[str, Any], tmp_path: Path
) -> None:
    open_to_all(tmp_path)
    mounts = ["--volume", f"{REPOSITORY / 'data'}:/data:ro", "--volume", f"{tmp_path}:/out"]
    buildah(
        *("run", *mounts, container, "--", *config["Entrypoint"], "classify", "/data/sample"),
        *("--model", "/data/models/bbc-small", "--output", "/out/labelled"),
    )
    table = ds.dataset(tmp_path / "labelled").to_table()
    assert (table.num_rows, table["label"].null_count) == (SAMPLE_ROWS, 0)
    assert {path.stat().st_uid for path in tmp_path.rglob("*")} == {int(config["User"])}


def test_a_container_with_a_read_only_root_labels_with_a_model_from_s3(
    buildah: Buildah, container: str, config: dict[str, Any], moto: Endpoint, tmp_path: Path
) -> None:
    open_to_all(tmp_path)
    root = buildah("mount", container)
    shell = ("unshare", "--mount", "--pid", "--fork", "sh", "-euc", READ_ONLY, "sh")
    enter = (*shell, root, REPOSITORY / "data/sample", tmp_path, config["User"])
    environment = [*config["Env"], *(f"{name}={value}" for name, value in moto.env.items())]
    enter = (*enter, "env", "-i", *environment)
    try:
        with fresh_bucket(moto) as bucket:
            for path in (REPOSITORY / "data/models/bbc-small").glob("*.*"):
                moto.s3.upload_file(str(path), bucket, f"model/{path.name}")
            options = ("--model", f"s3://{bucket}/model", "--output", "/mnt/labelled")
            _run([*enter, *config["Entrypoint"], "classify", "/srv", *options])
        refused = _run([*enter, "sh", "-c", "! touch /home/batchclf/x /opt/batchclf/x 2>&1"])
    finally:
        buildah("umount", container)
    assert refused.count("Read-only file system") == 2
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
