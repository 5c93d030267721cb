"""The Triton kernels of zero experts against the torch references.

On a CUDA device, else in Triton's interpreter.
"""

import pytest
import torch

from engine.ops.select_experts import SelectionRule
from engine.ops.zero_experts import add_zero_experts_reference, select_with_zero_experts_reference
from tests.helpers.triton_cases import DEVICE, DTYPES, kernel

pytestmark = kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "zero", "top_k"), [(8, 4, 3), (5, 6, 4), (12, 1, 2)])
def test_the_choice_matches_the_reference(dtype, experts, zero, top_k):
    from engine.ops.gpu.select_experts import select_with_zero_experts_triton

    generator = torch.Generator().manual_seed(experts)
    # No two scores of a token alike, in any dtype: torch promises no order of equals.
    logits = (torch.rand(9, experts + zero, generator=generator).argsort(1) / 8 - 2).to(dtype)
    bias = torch.rand(experts + zero, generator=generator) * 0.02
    rule = SelectionRule(top_k, scale=6.0)
    got = select_with_zero_experts_triton(logits.to(DEVICE), bias.to(DEVICE), rule, zero)
    expected = select_with_zero_experts_reference(logits, bias, rule, zero)
    assert expected[0].shape == (9, experts) and (expected[1] < 0).any()
    assert torch.equal(got[1].cpu(), expected[1])
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 37), (2, 2048)])
def test_the_sums_match_the_reference(dtype, shape):
    from engine.ops.gpu.add_zero_experts import add_zero_experts_triton

    joint, weight = torch.randn(2, shape[0], 2 * shape[1]).to(dtype), torch.rand(shape[0])
    out, x = joint[0, :, : shape[1]], joint[1, :, shape[1] :]
    got = add_zero_experts_triton(out.to(DEVICE), x.to(DEVICE), weight.to(DEVICE)).cpu()
    expected = add_zero_experts_reference(out, x, weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)
