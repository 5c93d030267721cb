"""A KV cache in float8: what is stored, and that attention reads what was stored.

Run: python -m pytest tests/unit/ops/test_float8_cache.py
"""

import pytest
import torch

from engine.ops.float8_cache import FLOAT8, rounded
from engine.ops.paged_attention import paged_attention, paged_attention_reference
from engine.ops.store_kv import store_kv
from tests.helpers.ops_cases import PagedCase, paged_case


def in_float8(case: PagedCase) -> PagedCase:
    """Return the step with its cache in float8, values still a view of the keys if they were."""
    shared = case.v_cache.data_ptr() == case.k_cache.data_ptr()
    case.k_cache = rounded(case.k_cache)
    width = case.v_cache.shape[3]
    case.v_cache = case.k_cache[..., :width] if shared else rounded(case.v_cache)
    return case


def test_numbers_beyond_the_range_become_the_largest_one_and_nan_stays():
    x = torch.tensor([1000.0, -460.0, float("inf"), 3.3, 0.0015, float("nan")])
    got = rounded(x).float()
    assert got[:5].tolist() == [448.0, -448.0, 448.0, 3.25, 2**-9]
    assert got[5].isnan()


@pytest.mark.parametrize("latent", [False, True])
def test_a_token_is_stored_as_its_rounded_keys_and_values(latent):
    cache = torch.zeros(4, 1, 8, 20, dtype=FLOAT8)
    values = cache[..., :16] if latent else torch.zeros(4, 1, 8, 16, dtype=FLOAT8)
    k = torch.randn(5, 1, 20) * 3
    v = k[..., :16] if latent else torch.randn(5, 1, 16)
    store_kv(k, v, cache, values, torch.arange(5) * 3)
    assert torch.equal(cache.float().view(32, 20)[:15:3], rounded(k[:, 0]).float())
    assert torch.equal(values.float().reshape(32, 16)[:15:3], rounded(v[:, 0]).float())
    assert not cache.float().view(32, 20)[1::3].any()


@pytest.mark.parametrize("attend", [paged_attention, paged_attention_reference])
@pytest.mark.parametrize("value_dim", [24, None])
def test_attention_over_float8_is_attention_over_the_rounded_numbers(attend, value_dim):
    lens = [(1, 40), (5, 5), (7, 90), (0, 3)]
    case = in_float8(paged_case(lens, heads=4, kv_heads=2, key_dim=24, value_dim=value_dim))
    got = attend(*case.tensors, **case.lens, scale=0.2, window=30)
    wide = case.k_cache.float()
    case.v_cache = wide[..., :21] if value_dim is None else case.v_cache.float()
    case.k_cache = wide
    torch.testing.assert_close(got, attend(*case.tensors, **case.lens, scale=0.2, window=30))


def test_a_sequence_gives_the_same_bits_alone_and_in_a_step():
    case = in_float8(paged_case([(1, 40), (3, 90)], heads=4, kv_heads=2, key_dim=16, value_dim=16))
    whole = paged_attention(*case.tensors, **case.lens, scale=0.25, window=None)
    alone = case.only(1)
    got = paged_attention(*alone.tensors, **alone.lens, scale=0.25, window=None)
    assert torch.equal(whole[1:], got)


def test_a_step_without_sequences_gives_no_rows():
    case = in_float8(paged_case([], heads=2, kv_heads=1, key_dim=16, value_dim=16))
    assert paged_attention(*case.tensors, **case.lens, scale=1.0, window=None).shape == (0, 2, 16)
