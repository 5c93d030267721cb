"""A KV cache in float8 in Triton against the torch references: stored, and read by attention.

On a CUDA device, else in Triton's interpreter.
"""

import pytest
import torch

from engine.ops.float8_cache import FLOAT8, rounded
from engine.ops.latent_rotary_store import latent_rotary_store_reference
from engine.ops.paged_attention import paged_attention_reference
from engine.ops.qk_rotary_store import QKRule, qk_rotary_store_reference
from tests.helpers.ops_cases import paged_case
from tests.helpers.triton_cases import DEVICE, DTYPES, kernel

pytestmark = kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 24), (40, None)])
def test_attention_reads_what_the_cache_holds(dtype, key_dim, value_dim):
    from engine.ops.gpu.paged_attention import paged_attention_triton

    lens = [(1, 40), (5, 5), (7, 90)]
    case = paged_case(lens, heads=4, kv_heads=1, key_dim=key_dim, value_dim=value_dim)
    case.q_THD, case.k_cache = case.q_THD.to(dtype), rounded(case.k_cache)
    width = case.v_cache.shape[3]
    case.v_cache = case.k_cache[..., :width] if value_dim is None else rounded(case.v_cache)
    options = {"scale": 0.2, "window": 30}
    got = paged_attention_triton(*(x.to(DEVICE) for x in case.tensors), **case.lens, **options)
    expected = paged_attention_reference(*case.tensors, **case.lens, **options)
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.cpu(), expected, rtol=bound, atol=bound)


def test_a_step_stores_rotated_keys_and_values_rounded_and_saturated():
    from engine.ops.gpu.qk_rotary_store import qk_rotary_store_triton

    tokens, dim = 5, 16
    q, k, v = torch.randn(tokens, 4 * dim), torch.randn(tokens, 2 * dim), torch.randn(tokens, 32)
    v[0, 0], v[1, 3], v[2, 2] = 900.0, -1e4, 1e-4
    ours = [torch.zeros(3, 2, 4, dim, dtype=FLOAT8, device=DEVICE) for _ in range(2)]
    theirs = [torch.zeros(3, 2, 4, dim, dtype=FLOAT8) for _ in range(2)]
    slots, rule = torch.tensor([0, 9, 4, 5, 11]), QKRule("none")
    # A rotation by nothing: no rounding of its own shows.
    rest = (None, None, torch.ones(tokens, dim), torch.zeros(tokens, dim))
    on = [None if x is None else x.to(DEVICE) for x in (q, k, v, *rest)]
    qk_rotary_store_triton(*on, *ours, slots.to(DEVICE), rule)
    qk_rotary_store_reference(q, k, v, *rest, *theirs, slots, rule)
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert theirs[1].float().max() == 448.0


def test_a_step_stores_latents_rounded():
    from engine.ops.gpu.latent_rotary_store import latent_rotary_store_triton

    tokens, latent, rotary = 4, 24, 8
    ones, zeros = torch.ones(tokens, rotary), torch.zeros(tokens, rotary)
    given = [
        torch.randn(tokens, 2, latent),
        torch.randn(tokens, 2, rotary),
        # Rows of equal numbers: their norm is exact.
        torch.ones(tokens, latent),
        torch.randn(tokens, rotary),
        torch.linspace(0.01, 600, latent),
    ]
    slots = torch.tensor([0, 9, 4, 5])
    ours = torch.zeros(3, 1, 4, latent + rotary, dtype=FLOAT8, device=DEVICE)
    theirs = torch.zeros(3, 1, 4, latent + rotary, dtype=FLOAT8)
    on = [x.to(DEVICE) for x in given]
    angles = [ones.to(DEVICE), zeros.to(DEVICE)]
    latent_rotary_store_triton(*on, 0.0, *angles, ours, slots.to(DEVICE), interleaved=True)
    latent_rotary_store_reference(*given, 0.0, ones, zeros, theirs, slots, interleaved=True)
    assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))
