"""This machine's speed, end to end, against what people would otherwise run. Ratios of one run."""

import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from batchclf.batching import padding_waste, spread
from batchclf.checkpoint import load, save
from batchclf.compute import Compute, open_model
from batchclf.config import Backend, CutSettings, ModelSettings, ReadSettings
from batchclf.engine import Engine, build_model
from batchclf.errors import ConfigError
from batchclf.labelled import read_texts
from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig
from batchclf.packed import PackedLinear, can_pack
from batchclf.peers import find_peers
from batchclf.predictions import softmax
from batchclf.text import TextEncoder
from batchclf.token_budget import processor_name
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
_NUM_RESCORED = 16
_CEILING_TOKENS = {"cpu": (512, 1024, 2048, 4096, 8192), "cuda": (16384, 32768, 65536)}
_CEILING_REPEATS = 5


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        model: a model directory or s3:// prefix, or None for a random GPT-2 of `size`.
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
    backend: Backend = "torch"
    endpoint_url: str | None = None


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure; the result is what the last line of `batchclf bench` says.

    Raises:
        ConfigError: an unknown size, or no articles.
        InputError: an input cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="batchclf-bench-") as scratch:
        folder = Path(scratch)
        texts = _articles(settings)
        archive = folder / "archive.parquet"
        pq.write_table(pa.table({"id": np.arange(len(texts)), "text": texts}), archive)
        # As long on average as all of them.
        peer_texts = [texts[place] for place in spread(len(texts), settings.num_peer_rows)]
        name = settings.model or str(_random_model(folder / "model", settings.size, texts))
        chosen = ModelSettings(
            name, dtype=settings.dtype, device=settings.device, backend=settings.backend
        )
        checkpoint, compute = open_model(chosen, settings.endpoint_url)
        model = str(checkpoint.path)  # which transformers has to read too
        config, rivals = checkpoint.config, find_peers(checkpoint)
        results = []
        for max_length in settings.max_lengths:
            ours: list[dict[str, Any]] = []
            peers: dict[str, list[float]] = {name: [] for name in rivals}
            ceilings: list[float] = []
            for repeat in range(settings.repeats):
                output = folder / f"out-{max_length}-{repeat}"
                ours.append(_classify(archive, model, output, max_length, settings))
                for name, run in rivals.items():
                    peers[name].append(run(model, peer_texts, max_length, compute))
                ceilings.append(measure_ceiling(config, compute))
                log.info(
                    "max length %d, run %d: batchclf %.2f articles/s, %s",
                    max_length,
                    repeat + 1,
                    ours[-1]["articles_per_s"],
                    ", ".join(f"{name} {rates[-1]:.2f}" for name, rates in peers.items()),
                )
            found = _result(max_length, ours, peers, ceilings, config)
            results.append(found | _inspect(model, texts, max_length, compute))
        return {
            "settings": {k: v for k, v in asdict(settings).items() if k != "endpoint_url"}
            | {
                "model": settings.model and Path(settings.model).name,
                "inputs": [Path(name).name for name in settings.inputs],
            },
            "machine": _machine(),
            "results": results,
        }


def _result(
    max_length: int,
    ours: list[dict[str, Any]],
    peers: Mapping[str, list[float]],
    ceilings: list[float],
    config: ModelConfig,
) -> dict[str, Any]:
    middle = statistics.median(run["articles_per_s"] for run in ours)
    tokens_per_s = statistics.median(run["tokens_per_s"] for run in ours)
    ceiling = statistics.median(ceilings)
    return {
        "max_length": max_length,
        "batchclf": {
            "articles_per_s": middle,
            "tokens_per_s": tokens_per_s,
            "dtype": ours[0]["dtype"],
            "busy": ours[-1]["busy"],
            "peak_rss_mib": max(run["peak_rss_mib"] for run in ours),
            "runs": [run["articles_per_s"] for run in ours],
        },
        "peers": {
            name: {
                "articles_per_s": round(statistics.median(rates), 3),
                "runs": [round(rate, 3) for rate in rates],
                "ratio": float(f"{middle / statistics.median(rates):.4g}"),
            }
            for name, rates in peers.items()
        },
        "ceiling_gflops": round(ceiling / 1e9, 1),
        "share_of_ceiling": round(tokens_per_s * config.flops_per_token / ceiling, 3),
    }


def measure_ceiling(config: ModelConfig, compute: Compute) -> float:
    """FLOP/s of the model's linear layers alone: the best of a sweep over tokens at a time.

    Plain `F.linear` and, on a CPU, weights that are packed beforehand, on all cores.
    """
    size, inner = config.hidden_size, config.inner_size
    shapes = ((size, 3 * size), (size, size), (size, inner), (inner, size))
    products: list[list[Callable[[Tensor], Tensor]]] = []
    with torch.inference_mode():
        for num_in, num_out in shapes:
            weight = torch.randn(num_out, num_in, device=compute.device).to(compute.dtype)
            bias = torch.zeros(num_out, device=compute.device, dtype=compute.dtype)
            products.append([partial(F.linear, weight=weight, bias=bias)])
            if compute.device.type == "cpu" and can_pack(compute.dtype):
                products[-1].append(PackedLinear(weight, bias))
        best = 0.0
        for num_tokens in _CEILING_TOKENS[compute.device.type]:
            total_s = 0.0
            for (num_in, _), ways in zip(shapes, products, strict=True):
                hidden = torch.randn(num_tokens, num_in, device=compute.device).to(compute.dtype)
                total_s += min(_fastest_s(way, hidden) for way in ways)
            flops = num_tokens * config.flops_per_token / config.num_layers
            best = max(best, flops / total_s)
    return best


def _fastest_s(way: Callable[[Tensor], Tensor], hidden: Tensor) -> float:
    seconds = []
    for _ in range(_CEILING_REPEATS):
        _synchronize(hidden)
        began = time.perf_counter()
        way(hidden)
        _synchronize(hidden)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _inspect(
    model: str, texts: Sequence[str], max_length: int, compute: Compute
) -> dict[str, float]:
    """What the engine makes of the articles: padding, and how much a row depends on its batch."""
    checkpoint = load(model, max_length=max_length)
    encoder = TextEncoder(checkpoint.tokenizer, checkpoint.max_length, checkpoint.normalise)
    encoded = encoder.encode(list(texts))
    engine = Engine(build_model(checkpoint, compute), compute)
    lengths = encoded.num_tokens[encoded.num_tokens > 0].astype(np.int64)
    waste = padding_waste(lengths, engine.plan(lengths))
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    some = spread(len(lengths), _NUM_RESCORED)
    few = np.concatenate([encoded.ids[offsets[row] : offsets[row + 1]] for row in some])
    few_offsets = np.concatenate(([0], np.cumsum(lengths[some])))
    together = _probs(engine, few, few_offsets)
    alone = [
        _probs(engine, few[a:b], np.array([0, b - a]))[0]
        for a, b in itertools.pairwise(few_offsets)
    ]
    return {
        "padding_waste": round(waste, 4),
        "largest_change_of_a_probability_alone": float(np.abs(together - np.array(alone)).max()),
    }


def _probs(
    engine: Engine, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    return softmax(engine.predict(ids, offsets, lambda _examples, _tokens: None).logits_NC)


def _classify(
    archive: Path, model: str, output: Path, max_length: int, settings: BenchSettings
) -> dict[str, Any]:
    """One run of the command in a process of its own: Parquet in, Parquet out."""
    command = [sys.executable, "-m", "batchclf", "classify", str(archive)]
    command += ["--model", model, "--output", str(output), "--max-length", str(max_length)]
    command += ["--device", settings.device, "--dtype", settings.dtype, "--log-format", "json"]
    command += ["--backend", settings.backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise ConfigError(f"classify failed with {done.returncode}:\n{done.stderr}")
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


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
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow")},
    }
