"""store_kv: every token lands in its slot and nothing else moves.

Run: python -m pytest tests/unit/ops/test_store_kv.py
"""

import pytest
import torch

from engine.ops.store_kv import store_kv, store_kv_reference
from tests.helpers.ops_cases import needs_native


def test_a_token_lands_in_its_block_and_offset_for_every_head():
    k_cache, v_cache = torch.zeros(3, 2, 4, 5), torch.zeros(3, 2, 4, 1)
    k, v = torch.randn(1, 2, 5), torch.randn(1, 2, 1)
    store_kv(k, v, k_cache, v_cache, torch.tensor([2 * 4 + 3]))
    assert torch.equal(k_cache[2, :, 3], k[0]) and torch.equal(v_cache[2, :, 3], v[0])
    assert k_cache.count_nonzero() == 10 and v_cache.count_nonzero() == 2


@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(2, 64, 64), (1, 24, 10), (4, 3, 5)])
def test_strided_tokens_match_the_reference(tokens, heads, key_dim, value_dim):
    joint = torch.randn(tokens, heads, key_dim + value_dim)
    k, v = joint.split([key_dim, value_dim], dim=-1)
    slots = torch.randperm(8 * 6)[:tokens]
    caches = [torch.zeros(8, heads, 6, key_dim), torch.zeros(8, heads, 6, value_dim)]
    expected = [cache.clone() for cache in caches]
    store_kv(k, v, *caches, slots)
    store_kv_reference(k, v, *expected, slots)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


def test_values_that_are_a_prefix_view_of_the_keys_may_share_their_memory():
    cache = torch.zeros(4, 1, 8, 20)
    k = torch.randn(5, 1, 20)
    store_kv(k, k[..., :16], cache, cache[..., :16], torch.arange(5) * 3)
    assert torch.equal(cache.view(32, 20)[:15:3], k[:, 0])


@needs_native
@pytest.mark.parametrize("slot", [-1, 32])
def test_a_slot_outside_the_cache_is_refused_and_nothing_is_written(slot):
    cache = torch.zeros(4, 1, 8, 2)
    with pytest.raises(RuntimeError, match=f"slot {slot} of 32"):
        store_kv(torch.ones(2, 1, 2), torch.ones(2, 1, 2), cache, cache, torch.tensor([0, slot]))
    assert not cache.any()
