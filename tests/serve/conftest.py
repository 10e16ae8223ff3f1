"""The model that comes with the project, served."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serve.running import Server, running

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def model() -> Path:
    """Five labels, 256 tokens."""
    return REPOSITORY / "data" / "models" / "bbc-small"


@pytest.fixture(scope="session")
def sample() -> Path:
    return REPOSITORY / "data" / "sample"


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as it is, in float32."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with running(log, "--model", model, "--dtype", "float32") as started:
        yield started
