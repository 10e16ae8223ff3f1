"""The token budget of a batch that is about the fastest here: measured once, then remembered.

It depends on caches and launch overheads, which no table knows. So a job that is long enough
measures a few budgets on its own model with made-up tokens and writes what it takes into
`$XDG_CACHE_HOME/batchclf/token-budgets.json` (default `~/.cache`), under a key of device, dtype,
model shape, length and torch version. Deleting the file is always safe.

On a GPU there are also several ways to compute, and `ways.json` remembers which was fastest.
"""

import hashlib
import json
import logging
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchclf.cache import cache_folder
from batchclf.compute import Compute
from batchclf.engine import Engine
from batchclf.lane import COMPILED
from batchclf.log import fields
from batchclf.model_config import ModelConfig

log = logging.getLogger(__name__)

_NAME = "token-budgets.json"
_CANDIDATES = {"cpu": (512, 1024, 2048, 4096, 8192), "cuda": (16384, 32768, 65536, 131072)}
# A smaller budget is kept unless a larger one is this much faster: it takes less memory. On a CPU
# much less: texts of 45 tokens on average took the small model in float32 472 MiB with 2,048, 803
# with 4,096 and 2,088 with 8,192, at about the same speed, since the allocator finds no room again
# for results of always other sizes.
_WORTH_MEMORY = {"cpu": 1.1, "cuda": 1.03}
_WORTH_COMPILING = 1.03
_GIVE_UP = 0.9  # larger budgets are not tried once one is this much slower than the best
_JOB_SHARE = 0.02  # of a job's tokens, at the most, are as many as measuring computes
_ROUNDS = 2  # batches of each stream that are timed, and
_REPEATS = 3  # how often: the fastest counts, since whatever else runs here only makes one slower
_COMPUTED_ROUNDS = 1 + _ROUNDS * _REPEATS  # the first one to warm up
_WAYS_NAME = "ways.json"
# Compiling takes tens of seconds the first time, and a few where torch has kept the result.
_COMPILE_S = 600.0  # jobs at least so long find out whether compiled code is faster
_USE_COMPILED_S = 120.0  # jobs at least so long use it where it was


def tune(engine: Engine, config: ModelConfig, max_length: int, num_tokens: int) -> None:
    """Give an engine the best token budget known here, or measure it if the job is worth that.

    Args:
        engine: one whose budget nobody chose.
        config: of its model.
        max_length: tokens of a long text.
        num_tokens: what is about to be computed, at the most.
    """
    folder = cache_folder()
    path = folder / _NAME if folder else None
    key = _key(engine.compute, config, max_length, engine.num_streams)
    known = _read(path).get(key)
    if type(known) is int and known > 0:
        engine.max_batch_tokens = known
        return
    candidates = _CANDIDATES[engine.compute.device.type]
    cost = sum(candidates) * engine.num_streams * _COMPUTED_ROUNDS
    if num_tokens * _JOB_SHARE < cost:
        return
    found = fastest(candidates, lambda budget: _tokens_per_s(engine, config, max_length, budget))
    best = max(found, key=lambda budget: found[budget])
    worth_it = _WORTH_MEMORY[engine.compute.device.type]
    best = min(budget for budget in found if found[budget] * worth_it >= found[best])
    engine.max_batch_tokens = best
    log.info(
        "batches of at most %s tokens from now on (%s tokens/s)",
        f"{best:,}",
        ", ".join(f"{budget:,}: {rate:,.0f}" for budget, rate in found.items()),
        extra=fields(token_budget=best, measured={str(k): round(v) for k, v in found.items()}),
    )
    if path is not None:
        _remember(path, key, best)


def choose_way(engine: Engine, config: ModelConfig, max_length: int, num_tokens: int) -> None:
    """Have an engine compute in the way that is fastest here, measured if the job is worth that.

    Args:
        engine: stays as it is where its device knows one way alone.
        config: of its model.
        max_length: tokens of a long text.
        num_tokens: what is about to be computed, at the most.
    """
    lane = engine.lane
    if lane is None:
        return
    folder = cache_folder()
    path = folder / _WAYS_NAME if folder else None
    key = _key(engine.compute, config, max_length, engine.num_streams)
    found = _read(path).get(key)
    rates = _positive_numbers(found) if isinstance(found, dict) else {}
    before = dict(rates)

    def measure(way: str) -> None:
        lane.use(way)
        rate = _tokens_per_s(engine, config, max_length, engine.max_batch_tokens)
        rates[way] = rate if lane.way == way else 1.0  # it could not be compiled: never again

    plain = [way for way in lane.ways if not way.endswith(COMPILED)]
    cost = len(plain) * engine.max_batch_tokens * _COMPUTED_ROUNDS
    if not set(plain) <= rates.keys():
        if num_tokens * _JOB_SHARE < cost:
            return
        for way in plain:
            measure(way)
    way = max(plain, key=lambda way: rates[way])
    job_s, compiled = num_tokens / rates[way], way + COMPILED
    if compiled not in rates and compiled in lane.ways and job_s >= _COMPILE_S:
        measure(compiled)
    if job_s >= _USE_COMPILED_S and rates.get(compiled, 0) >= _WORTH_COMPILING * rates[way]:
        way = compiled
    lane.use(way)
    log.info(
        "computing %s (tokens/s: %s)",
        way,
        ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()),
        extra=fields(way=way, measured={name: round(rate) for name, rate in rates.items()}),
    )
    if path is not None and rates != before:
        _remember(path, key, {name: round(rate) for name, rate in rates.items()})


def _positive_numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: rate for name, rate in found.items() if type(rate) is int and rate > 0}


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
    length = min(max_length, config.longest, budget)
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
        seconds = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            engine.predict(ids, offsets, _ignore)
            seconds.append(time.perf_counter() - began)
        return len(ids) / min(seconds)
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
    library = f"torch {torch.__version__}"
    if compute.backend == "openvino":
        library = f"openvino {version('openvino')}"
    return f"{device} | {compute.dtype_name} | {shape} | {max_length} | {library}"


def processor_name() -> str:
    """What this machine calls its processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # not there yet, or damaged: it is measured again
    return found if isinstance(found, dict) else {}


def _remember(path: Path, key: str, value: int | Mapping[str, int]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_read(path), key: value}, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        log.info("%s is not remembered: %s", path.stem.replace("-", " "), error)
