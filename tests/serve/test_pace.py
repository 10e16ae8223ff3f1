"""How much a server computes before it looks at other requests again."""

import pytest

from batchclf.serve.classifier import Pace

PACE = Pace(smallest_s=0.001, batch_s=0.03, batch_tokens=300, full_s=0.04, full_tokens=800)


@pytest.mark.parametrize(
    ("seconds", "tokens"),
    [
        pytest.param(0.01, 100, id="a part of a batch"),
        pytest.param(0.035, 300, id="one batch, where several would take longer"),
        pytest.param(0.08, 1600, id="many batches, side by side"),
    ],
)
def test_as_many_tokens_as_take_no_longer(seconds: float, tokens: int) -> None:
    assert PACE.tokens_within(seconds) == tokens
