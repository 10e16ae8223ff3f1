"""Which way a GPU computes in: measured where a job is worth it, and remembered."""

import json
from pathlib import Path

import pytest
from test_engine import CPU, MODEL
from test_varlen import ReferenceVarlen

from batchclf import token_budget
from batchclf.engine import Engine
from batchclf.lane import Lane
from batchclf.token_budget import choose_way

SHORT, LONG, VERY_LONG = 1_000, 10_000_000, 100_000_000  # tokens of a job, at 100,000 a second
FAST, SLOW = 100_000.0, 50_000.0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "batchclf" / "ways.json"


def new_engine() -> Engine:
    lane = Lane(MODEL, backend="eager")
    lane._attentions["reference"] = ReferenceVarlen()
    lane.ways = ("padded", "reference", "padded, compiled", "reference, compiled")
    return Engine(MODEL, CPU, 512, lane=lane)


def way_of(num_tokens: int) -> str:
    """What a new run of a job with so many tokens computes in."""
    engine = new_engine()
    choose_way(engine, MODEL.config, 32, num_tokens)
    assert engine.lane is not None
    return engine.lane.way


def speeds(monkeypatch: pytest.MonkeyPatch, rates: dict[str, float]) -> list[str]:
    """Pretend speeds, since real ones are never the same twice; returns what is measured."""
    asked: list[str] = []

    def measure(engine: Engine, *_: object) -> float:
        assert engine.lane is not None
        asked.append(engine.lane.way)
        return rates[engine.lane.way]

    monkeypatch.setattr(token_budget, "_tokens_per_s", measure)
    return asked


def test_a_short_job_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = speeds(monkeypatch, {})
    assert (way_of(SHORT), asked) == ("padded", [])


def test_the_fastest_way_is_taken_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = speeds(monkeypatch, {"padded": SLOW, "reference": FAST})
    assert [way_of(LONG), way_of(SHORT)] == ["reference", "reference"]
    assert asked == ["padded", "reference"]


def test_only_a_job_of_many_minutes_compiles_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"padded": SLOW, "reference": FAST, "reference, compiled": 1.2 * FAST}
    asked = speeds(monkeypatch, rates)
    assert [way_of(LONG), way_of(VERY_LONG)] == ["reference", "reference, compiled"]
    assert asked == list(rates)
    assert [way_of(SHORT), way_of(2 * LONG)] == ["reference", "reference, compiled"]


def test_compiled_code_that_is_no_faster_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds(monkeypatch, {"padded": SLOW, "reference": FAST, "reference, compiled": 1.01 * FAST})
    assert way_of(VERY_LONG) == "reference"


@pytest.mark.parametrize("content", ["", "[]", '{"a": {"padded": "fast"}}', '{"a": 1}'])
def test_a_damaged_memory_is_replaced(
    cache: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds(monkeypatch, {"padded": SLOW, "reference": FAST})
    cache.parent.mkdir()
    cache.write_text(content)
    assert way_of(LONG) == "reference"
    assert {"padded": SLOW, "reference": FAST} in json.loads(cache.read_text()).values()


def test_a_device_of_one_way_alone_has_nothing_to_choose(cache: Path) -> None:
    choose_way(Engine(MODEL, CPU), MODEL.config, 32, VERY_LONG)
    assert not cache.exists()


def test_ways_that_are_measured_compute(cache: Path) -> None:
    assert way_of(VERY_LONG * 1000) in new_engine().lane.ways  # type: ignore[union-attr]
    (found,) = json.loads(cache.read_text()).values()
    assert min(found.values()) > 0
