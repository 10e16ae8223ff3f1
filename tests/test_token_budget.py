"""The token budget is measured once where a job is worth it, and remembered."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from batchclf import token_budget
from batchclf.compute import Compute
from batchclf.engine import Engine
from batchclf.model import GPT2Classifier
from batchclf.model_config import ModelConfig
from batchclf.token_budget import fastest, tune

CPU = Compute(torch.device("cpu"), torch.float32)
CONFIG = ModelConfig(
    vocab_size=20,
    max_positions=16,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    inner_size=8,
    num_labels=2,
)
PLENTY = 1 << 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "batchclf" / "token-budgets.json"


@pytest.fixture
def engine() -> Engine:
    model = GPT2Classifier(CONFIG)
    model.init_weights()
    return Engine(model, CPU, num_streams=1)


def speeds(monkeypatch: pytest.MonkeyPatch, rates: dict[int, float]) -> list[int]:
    """Pretend speeds, since real ones are never the same twice; returns what is measured."""
    asked: list[int] = []

    def measure(_engine: Engine, _config: ModelConfig, _max_length: int, budget: int) -> float:
        asked.append(budget)
        return rates.get(budget, 1.0)

    monkeypatch.setattr(token_budget, "_tokens_per_s", measure)
    return asked


def test_a_long_job_measures_on_its_own_model_and_remembers(engine: Engine, cache: Path) -> None:
    tune(engine, CONFIG, 16, PLENTY)
    assert list(json.loads(cache.read_text()).values()) == [engine.max_batch_tokens]


def test_the_fastest_budget_is_taken(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds(monkeypatch, {512: 80.0, 1024: 100.0, 2048: 96.0, 4096: 95.0, 8192: 94.0})
    tune(engine, CONFIG, 16, PLENTY)
    assert engine.max_batch_tokens == 1024


def test_of_budgets_that_are_about_as_fast_the_smallest_is_taken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds(monkeypatch, {512: 94.0, 1024: 100.0, 2048: 101.0, 4096: 102.0, 8192: 103.0})
    tune(engine, CONFIG, 16, PLENTY)
    assert engine.max_batch_tokens == 512


def test_what_is_known_is_not_measured_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = speeds(monkeypatch, {2048: 100.0})
    tune(engine, CONFIG, 16, PLENTY)
    asked.clear()
    engine.max_batch_tokens = 1
    tune(engine, CONFIG, 16, 1)
    assert (engine.max_batch_tokens, asked) == (2048, [])


def test_a_short_job_takes_the_budget_as_it_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = speeds(monkeypatch, {})
    before = engine.max_batch_tokens
    tune(engine, CONFIG, 16, 100_000)
    assert (engine.max_batch_tokens, asked) == (before, [])


@pytest.mark.parametrize("content", ["", "[]", '{"a": "b"}', "\x00"])
def test_a_damaged_memory_is_replaced(engine: Engine, cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    tune(engine, CONFIG, 16, PLENTY)
    assert engine.max_batch_tokens in json.loads(cache.read_text()).values()


def test_where_nothing_can_be_remembered_the_job_goes_on(
    engine: Engine, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        tune(engine, CONFIG, 16, PLENTY)
    assert "not remembered" in caplog.text


def _rate(table: dict[int, float]) -> Callable[[int], float]:
    return lambda budget: table[budget]


@given(st.dictionaries(st.integers(1, 10_000), st.floats(0.1, 1e6), min_size=1))
def test_measuring_stops_only_behind_a_budget_that_is_clearly_slower(
    table: dict[int, float],
) -> None:
    found = fastest(tuple(table), _rate(table))
    measured = list(found)
    assert measured == sorted(table)[: len(measured)]
    for budget in measured[:-1]:
        earlier = [found[other] for other in measured if other <= budget]
        assert found[budget] >= 0.9 * max(earlier)
