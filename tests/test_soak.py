"""The short form of the soak; `make soak` runs the long one."""

from pathlib import Path
from typing import Any

import pytest
from servers import ServerMissingError
from soak import HELD, Plan, soak

SHORT: dict[str, Any] = {
    "num_articles": 1980,
    "num_shards": 20,
    "num_workers": 2,
    "kill_every_s": 8.0,
    "most_kills": 4,  # fewer than receipts, so that no message is taken for poison
    "max_receive_count": 5,
    "deadline_s": 300.0,
}


@pytest.mark.slow
@pytest.mark.parametrize("server", ["moto", "ministack"])
def test_through_kills_and_a_bad_wire_nothing_is_lost_and_nothing_stands_twice(
    server: str, tmp_path: Path
) -> None:
    plan = Plan(server, **SHORT, **HELD[server])
    try:
        result = soak(plan, tmp_path)
    except ServerMissingError as error:
        pytest.skip(str(error))
    assert result.problems == [], result.as_dict()
    assert result.signals.total() > 0
