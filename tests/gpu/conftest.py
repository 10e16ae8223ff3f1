"""What only a CUDA device can show. Needs torch, transformers, pyarrow and pytest, and no more.

`python -m pytest tests/gpu` in the repository runs where the package is not installed, too.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from batchclf.checkpoint import Checkpoint, load
from batchclf.compute import Compute
from batchclf.engine import Engine, build_model
from batchclf.text import TextEncoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL_MODEL = REPOSITORY / "data" / "models" / "bbc-small"
SAMPLE = REPOSITORY / "data" / "sample"
NO_CUDA = "torch sees no CUDA device on this machine"
CUDA = torch.device("cuda", 0)

Joined = tuple["npt.NDArray[np.int32]", "npt.NDArray[np.int64]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=NO_CUDA))


@pytest.fixture(autouse=True)
def clean_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is remembered from test to test, neither on disk nor on the device."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """The small model that comes along."""
    return load(str(SMALL_MODEL))


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    """The sample archive, and the BBC articles beside the repository if they are there."""
    texts: list[str] = pq.read_table(SAMPLE / "news-1.parquet")["text"].to_pylist()
    paths = [SAMPLE / "news-2.csv"]
    bbc = REPOSITORY.parent / "shared" / "bbc"
    paths += sorted(bbc.glob("*.csv")) if bbc.is_dir() else []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            texts += [row["text"] for row in csv.DictReader(file)]
    for line in (SAMPLE / "news-4.jsonl").read_text(encoding="utf-8").splitlines():
        texts.append(json.loads(line)["text"])
    return texts


@pytest.fixture(scope="session")
def sample(checkpoint: Checkpoint, sample_texts: list[str]) -> Joined:
    """The tokens of those."""
    encoder = TextEncoder(checkpoint.tokenizer, checkpoint.max_length, checkpoint.normalise)
    encoded = encoder.encode(sample_texts)
    lengths = encoded.num_tokens[encoded.num_tokens > 0]
    return encoded.ids, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


class NewEngine(Protocol):
    """An engine of the small model on the device."""

    def __call__(
        self, dtype: torch.dtype, max_batch_tokens: int | None = None, way: str | None = None
    ) -> Engine: ...


@pytest.fixture
def new_engine(checkpoint: Checkpoint) -> NewEngine:
    def make(
        dtype: torch.dtype, max_batch_tokens: int | None = None, way: str | None = None
    ) -> Engine:
        compute = Compute(CUDA, dtype)
        engine = Engine(build_model(checkpoint, compute), compute, max_batch_tokens)
        if way is not None and engine.lane is not None:
            engine.lane.use(way)
        return engine

    return make


@pytest.fixture(scope="session")
def cpu_logits(checkpoint: Checkpoint, sample: Joined) -> npt.NDArray[np.float32]:
    """What the CPU says of the sample in float32."""
    compute = Compute(torch.device("cpu"), torch.float32)
    engine = Engine(build_model(checkpoint, compute), compute)
    return engine.predict(*sample, ignore).logits_NC


def ignore(num_examples: int, num_tokens: int) -> None:
    """Nobody watches."""


def joined(texts: Sequence[Sequence[int]]) -> Joined:
    """Token ids of texts, one after the other, and where each begins."""
    ids = np.array([token for text in texts for token in text], dtype=np.int32)
    return ids, np.concatenate(([0], np.cumsum([len(text) for text in texts]))).astype(np.int64)


def made_up(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Texts of such lengths; none ends in a pad."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, length).tolist() for length in lengths]


def batchclf(*args: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, whether it is installed or not."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "batchclf", *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "XDG_CACHE_HOME": str(cache),
        },
        timeout=240,
        check=False,
    )
