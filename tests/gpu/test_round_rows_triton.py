"""round_rows and silu_and_round in Triton against torch: bit for bit.

On a CUDA device, else in Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch

from engine.ops.scaled_ffn import round_rows_reference, silu_and_round_reference
from tests.helpers.triton_cases import DEVICE, DTYPES, MOVED_DTYPES, kernel

pytestmark = kernel


def rows_of(
    dtype: torch.dtype, num_rows: int, width: int, sizes: tuple[float, float] = (1e-4, 100.0)
) -> torch.Tensor:
    """Rows whose sizes lie in a range, one of zeros."""
    first, last = (math.log10(size) for size in sizes)
    x = torch.randn(num_rows, width) * torch.logspace(first, last, num_rows)[:, None]
    x[1] = 0
    return x.to(dtype).to(DEVICE)


def assert_same(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, ...]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.is_contiguous()
        assert torch.equal(mine.view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", MOVED_DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 48, 2100])
def test_rows_in_place_and_gathered_are_rounded_as_torch_rounds_them(dtype, width):
    from engine.ops.gpu.round_rows import round_rows_triton

    x = rows_of(dtype, 9, width + 3)[:, :width]
    index = torch.randint(0, 9, (21,), device=DEVICE)
    assert_same(round_rows_triton(x), round_rows_reference(x))
    assert_same(round_rows_triton(x, index[4:]), round_rows_reference(x, index[4:]))
    codes, scale = round_rows_triton(x, index[:0])
    assert codes.shape == (0, width) and scale.shape == (0,)


@pytest.mark.parametrize("width", [16, 40, 1100])
def test_what_lies_between_the_products_is_rounded_as_two_ops_of_torch_round_it(width):
    from engine.ops.gpu.round_rows import silu_and_round_triton

    for dtype in DTYPES:
        # In float16 larger products are infinite; the last bit of smaller ones is many codes.
        gate_up = rows_of(dtype, 9, 2 * width, (0.5, 25.0))
        codes, scale = silu_and_round_triton(gate_up)
        expected, expected_scale = silu_and_round_reference(gate_up)
        # exp differs in its last bit, which may move a number to the next code.
        assert torch.allclose(scale, expected_scale, rtol=1e-3, atol=1e-37)
        mine, theirs = codes.float(), expected.float()
        assert bool(((mine - theirs).abs() <= theirs.abs() / 8 + 2**-9).all())
        assert (mine != theirs).float().mean() < 0.05


def test_a_row_with_nan_is_nan():
    from engine.ops.gpu.round_rows import round_rows_triton

    x = rows_of(torch.float32, 4, 32)
    x[2, 5] = torch.nan
    codes, scale = round_rows_triton(x)
    assert scale.isnan().tolist() == [False, False, True, False]
    assert codes[2].float().isnan().all()
