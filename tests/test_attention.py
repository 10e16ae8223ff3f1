"""Attention in blocks is the attention of torch's own kernel."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import scaled_dot_product_attention

from batchclf import attention

HEADS, SIZE = 3, attention._LEAST_SIZE


def made_up(batch: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value as a layer has them: views of one product."""
    generator = torch.Generator().manual_seed(batch * 1000 + tokens)
    joined = torch.randn(batch * tokens, 3 * HEADS * SIZE, generator=generator)
    return joined.view(batch, tokens, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)


@given(st.integers(1, 5), st.integers(1, 3 * attention._BLOCK), st.sampled_from([0.25, 0.3]))
@settings(max_examples=40)
def test_blocks_give_what_the_whole_gives(batch: int, tokens: int, scale: float) -> None:
    query, key, value = made_up(batch, tokens)
    exact = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    found = attention._attend_in_blocks(
        query.bfloat16(), key.bfloat16(), value.bfloat16(), scale
    ).transpose(1, 2)
    torch.testing.assert_close(found.float(), exact, atol=0.05, rtol=0.05)


def test_a_token_does_not_depend_on_those_after_it() -> None:
    tokens = 2 * attention._BLOCK + 5
    query, key, value = (each.bfloat16() for each in made_up(2, tokens))
    before = attention._attend_in_blocks(query, key, value, 0.25)
    for place in (3, attention._BLOCK, tokens - 1):
        value[:, :, place] = 1e4
    after = attention._attend_in_blocks(query, key, value, 0.25)
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.equal(after[:, 3], before[:, 3])


@pytest.mark.parametrize("has_amx", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_either_way_tokens_come_back_one_after_the_other(
    has_amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_has_amx", lambda: has_amx)
    query, key, value = (each.to(dtype) for each in made_up(2, 40))
    exact = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25)
    found = attention.attend(query, key, value, 0.25)
    assert found.shape == (2 * 40, HEADS * SIZE)
    wanted = exact.transpose(1, 2).reshape(found.shape)
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)
