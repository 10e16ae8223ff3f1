"""This machine's speed, end to end, against the plain Hugging Face pipeline. Ratios of one run."""

import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from batchclf.checkpoint import save
from batchclf.config import CutSettings, ReadSettings
from batchclf.errors import ConfigError
from batchclf.labelled import read_texts
from batchclf.model import GPT2Classifier, ModelConfig
from batchclf.train import train_tokenizer

log = logging.getLogger(__name__)

# n_layer, n_embd, n_head of the published GPT-2 sizes
# https://huggingface.co/openai-community/gpt2
SIZES = {"124M": (12, 768, 12), "355M": (24, 1024, 16), "774M": (36, 1280, 20)}
_VOCAB_SIZE = 50257
_NUM_LABELS = 5
# Words of a news article: median and spread of the logarithm, as in BBC News.
_MEDIAN_WORDS, _LOG_SPREAD = 330, 0.5
_NUM_WORDS = 20_000
PIPELINE_BATCH = 16


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        model: a model directory, or None for a random GPT-2 of `size`.
        inputs: articles, or none for made-up ones with the lengths of news.
        num_rows: articles that we label; the pipeline gets `num_peer_rows` of them.
        max_lengths: tokens of an article; each is measured.
        repeats: runs of each contender, taking turns; the median counts.
    """

    model: str | None
    size: str
    inputs: tuple[str, ...]
    text_columns: tuple[str, ...]
    num_rows: int
    num_peer_rows: int
    max_lengths: tuple[int, ...]
    repeats: int
    device: str
    dtype: str


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure; the result is what the last line of `batchclf bench` says.

    Raises:
        ConfigError: an unknown size, or no articles.
        InputError: an input cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="batchclf-bench-") as scratch:
        folder = Path(scratch)
        texts = _articles(settings)
        model = settings.model or str(_random_model(folder / "model", settings.size, texts))
        archive = folder / "archive.parquet"
        pq.write_table(pa.table({"id": np.arange(len(texts)), "text": texts}), archive)
        peer_texts = _spread(texts, settings.num_peer_rows)
        results = []
        for max_length in settings.max_lengths:
            ours: list[dict[str, Any]] = []
            peers: list[float] = []
            for repeat in range(settings.repeats):
                output = folder / f"out-{max_length}-{repeat}"
                ours.append(_classify(archive, model, output, max_length, settings))
                peers.append(_pipeline(model, peer_texts, max_length, settings.device))
                log.info(
                    "max length %d: batchclf %.2f articles/s, pipeline %.2f articles/s",
                    max_length,
                    ours[-1]["articles_per_s"],
                    peers[-1],
                )
            results.append(_result(max_length, ours, peers))
        return {
            "settings": asdict(settings)
            | {
                "model": settings.model and Path(model).name,
                "inputs": [Path(name).name for name in settings.inputs],
            },
            "machine": _machine(),
            "results": results,
        }


def _result(max_length: int, ours: list[dict[str, Any]], peers: list[float]) -> dict[str, Any]:
    middle = statistics.median(run["articles_per_s"] for run in ours)
    peer = statistics.median(peers)
    return {
        "max_length": max_length,
        "batchclf": {
            "articles_per_s": middle,
            "tokens_per_s": statistics.median(run["tokens_per_s"] for run in ours),
            "dtype": ours[0]["dtype"],
            "busy": ours[-1]["busy"],
            "peak_rss_mib": max(run["peak_rss_mib"] for run in ours),
            "runs": [run["articles_per_s"] for run in ours],
        },
        "pipeline_float32": {
            "articles_per_s": round(peer, 3),
            "runs": [round(p, 3) for p in peers],
        },
        "ratio": round(middle / peer, 2),
    }


def _classify(
    archive: Path, model: str, output: Path, max_length: int, settings: BenchSettings
) -> dict[str, Any]:
    """One run of the command in a process of its own: Parquet in, Parquet out."""
    command = [sys.executable, "-m", "batchclf", "classify", str(archive)]
    command += ["--model", model, "--output", str(output), "--max-length", str(max_length)]
    command += ["--device", settings.device, "--dtype", settings.dtype, "--log-format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise ConfigError(f"classify failed with {done.returncode}:\n{done.stderr}")
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def _pipeline(model: str, texts: Sequence[str], max_length: int, device: str) -> float:
    """Articles/s of what a script would do: `pipeline("text-classification")`, float32."""
    from transformers import pipeline
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    classify = pipeline(
        "text-classification",
        model=model,
        device=None if device == "auto" else device,
        dtype=torch.float32,
    )
    options = {"batch_size": PIPELINE_BATCH, "truncation": True, "max_length": max_length}
    classify(list(texts[:2]), **options)
    began = time.perf_counter()
    found = classify(list(texts), **options)
    return len(found) / (time.perf_counter() - began)


def _articles(settings: BenchSettings) -> list[str]:
    if not settings.inputs:
        return _made_up(settings.num_rows)
    read = ReadSettings(text_columns=settings.text_columns, keep="none")
    cut = CutSettings(limit=settings.num_rows)
    texts = [
        text
        for _, _, found in read_texts(settings.inputs, read, cut, None)
        for text in found
        if text is not None
    ]
    if not texts:
        raise ConfigError("the input holds no articles to measure with")
    return texts


def _made_up(num_rows: int, seed: int = 0) -> list[str]:
    """Articles of made-up words whose lengths and repetition are those of news."""
    random = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = [
        "".join(random.choice(letters, size))
        for size in np.clip(random.poisson(4.5, _NUM_WORDS), 1, 14)
    ]
    # Zipf's law: the n-th word comes up in proportion to 1/n
    weights = 1 / np.arange(1, _NUM_WORDS + 1)
    lengths = random.lognormal(np.log(_MEDIAN_WORDS), _LOG_SPREAD, num_rows).astype(int) + 1
    chosen = random.choice(_NUM_WORDS, int(lengths.sum()), p=weights / weights.sum())
    parts = np.split(chosen, np.cumsum(lengths)[:-1])
    return [" ".join(words[index] for index in part) for part in parts]


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """`count` of the texts, evenly over the whole, so that they are as long on average."""
    places = np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int)
    return [texts[place] for place in places]


def _random_model(folder: Path, size: str, texts: Sequence[str]) -> Path:
    if size not in SIZES:
        raise ConfigError(f"--size {size}: use one of {', '.join(SIZES)}")
    num_layers, hidden_size, num_heads = SIZES[size]
    tokenizer = train_tokenizer(texts[:2000], 8192)
    config = ModelConfig(
        vocab_size=_VOCAB_SIZE,
        max_positions=1024,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        inner_size=4 * hidden_size,
        num_labels=_NUM_LABELS,
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    torch.manual_seed(0)
    model = GPT2Classifier(config)
    model.init_weights()
    labels = [f"label-{index}" for index in range(_NUM_LABELS)]
    save(
        folder,
        model,
        tokenizer,
        labels,
        max_length=config.max_positions,
        normalise="none",
        temperature=1.0,
        training={},
        metrics={},
    )
    return folder


def _machine() -> dict[str, Any]:
    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow")},
    }
