"""How much a server computes before it looks at other requests again."""

import pytest

from batchclf.serve.classifier import Pace


@pytest.mark.parametrize(
    ("num_streams", "batch_tokens", "tokens"),
    [
        pytest.param(1, 512, 20, id="one stream"),
        pytest.param(16, 512, 1, id="a large model computes so few tokens by one of its streams"),
        pytest.param(2, 10, 20, id="full batches are computed side by side"),
    ],
)
def test_as_many_tokens_as_take_no_longer(num_streams: int, batch_tokens: int, tokens: int) -> None:
    pace = Pace(0.001, 1000.0, batch_tokens, num_streams)
    assert pace.tokens_within(0.02) == tokens
