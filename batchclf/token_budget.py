"""The token budget of a batch that is fastest here: measured once, then remembered.

It depends on caches and launch overheads, which no table knows. So a job that is long enough
measures a few budgets on its own model with made-up tokens and writes the best into
`$XDG_CACHE_HOME/batchclf/token-budgets.json` (default `~/.cache`), under a key of device, dtype,
model shape, length and torch version. Deleting the file is always safe.
"""

import hashlib
import json
import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from batchclf.engine import Compute, Engine
from batchclf.log import fields
from batchclf.model import ModelConfig

log = logging.getLogger(__name__)

_CANDIDATES = {"cpu": (512, 1024, 2048, 4096, 8192), "cuda": (16384, 32768, 65536, 131072)}
# A smaller budget is kept unless a larger one is this much faster: it takes less memory.
_WORTH_IT = 1.03
_GIVE_UP = 0.9  # larger budgets are not tried once one is this much slower than the best
_JOB_SHARE = 0.02  # of a job's tokens, at the most, are as many as measuring computes
_ROUNDS = 2  # batches of each stream that are timed


def tune(engine: Engine, config: ModelConfig, max_length: int, num_tokens: int) -> None:
    """Give an engine the best token budget known here, or measure it if the job is worth that.

    Args:
        engine: one whose budget nobody chose.
        config: of its model.
        max_length: tokens of a long text.
        num_tokens: what is about to be computed, at the most.
    """
    path, key = _cache_path(), _key(engine.compute, config, max_length, engine.num_streams)
    known = _read(path).get(key)
    if known is not None:
        engine.max_batch_tokens = known
        return
    candidates = _CANDIDATES[engine.compute.device.type]
    cost = sum(candidates) * engine.num_streams * (_ROUNDS + 1)
    if num_tokens * _JOB_SHARE < cost:
        return
    found = fastest(candidates, lambda budget: _tokens_per_s(engine, config, max_length, budget))
    best = max(found, key=lambda budget: found[budget])
    best = min(budget for budget in found if found[budget] * _WORTH_IT >= found[best])
    engine.max_batch_tokens = best
    log.info(
        "batches of %s tokens are fastest here (%s tokens/s)",
        f"{best:,}",
        ", ".join(f"{budget:,}: {rate:,.0f}" for budget, rate in found.items()),
        extra=fields(token_budget=best, measured={str(k): round(v) for k, v in found.items()}),
    )
    _remember(path, key, best)


def fastest(candidates: tuple[int, ...], tokens_per_s: Callable[[int], float]) -> dict[int, float]:
    """Measure candidates, in ascending order, until one is clearly slower than the best."""
    found: dict[int, float] = {}
    for budget in sorted(candidates):
        found[budget] = tokens_per_s(budget)
        if found[budget] < _GIVE_UP * max(found.values()):
            break
    return found


def _tokens_per_s(engine: Engine, config: ModelConfig, max_length: int, budget: int) -> float:
    """Of made-up texts that are all different, and about as long as real ones."""
    length = min(max_length, config.longest)
    num_texts = max(budget // length, 1) * engine.num_streams * _ROUNDS
    rng = np.random.default_rng(budget)
    # token 0 is what models of ours pad with, and a pad at the end would be left out
    ids = rng.integers(1, config.vocab_size, num_texts * length, dtype=np.int32)
    offsets = np.arange(num_texts + 1, dtype=np.int64) * length
    before = engine.max_batch_tokens
    engine.max_batch_tokens = budget
    try:
        warm = offsets[: num_texts // _ROUNDS + 1]
        engine.predict(ids[: warm[-1]], warm, _ignore)
        began = time.perf_counter()
        engine.predict(ids, offsets, _ignore)
        return len(ids) / (time.perf_counter() - began)
    finally:
        engine.max_batch_tokens = before


def _ignore(num_examples: int, num_tokens: int) -> None:
    """Nobody watches a measurement."""


def _key(compute: Compute, config: ModelConfig, max_length: int, num_streams: int) -> str:
    device = (
        torch.cuda.get_device_name(compute.device)
        if compute.device.type == "cuda"
        else f"{processor_name()}, {num_streams} streams"
    )
    shape = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:12]
    return f"{device} | {compute.dtype_name} | {shape} | {max_length} | torch {torch.__version__}"


def processor_name() -> str:
    """What this machine calls its processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cache_path() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "batchclf" / "token-budgets.json"


def _read(path: Path) -> Mapping[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # not there yet, or damaged: it is measured again
    if not isinstance(found, dict):
        return {}
    return {key: budget for key, budget in found.items() if type(budget) is int and budget > 0}


def _remember(path: Path, key: str, budget: int) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_read(path), key: budget}, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        log.info("the token budget is not remembered: %s", error)
