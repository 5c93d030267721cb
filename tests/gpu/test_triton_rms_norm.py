"""rms_norm and add_rms_norm in Triton against the torch reference.

On a CUDA device, else in Triton's interpreter.
"""

import pytest
import torch

from engine.ops.rms_norm import add_rms_norm_reference, rms_norm_reference
from tests.helpers.triton_cases import DEVICE, DTYPES, kernel

# One rounding more or less of the largest results, which are below 8.
BOUNDS = {torch.float32: 4e-6, torch.float16: 8e-3, torch.bfloat16: 6e-2}

pytestmark = kernel


def normed(x, weight, eps=1e-5, residual=None):
    from engine.ops.gpu.rms_norm import rms_norm_triton

    given = [x.to(DEVICE), weight.to(DEVICE), eps, None if residual is None else residual]
    return rms_norm_triton(*given).cpu()


def compare(got: torch.Tensor, expected: torch.Tensor) -> None:
    bound = BOUNDS[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 8), (1, 1), (3, 15), (2, 3, 64), (5, 515), (3, 2880), (2, 7168), (2, 8192)]
)
def test_rows_match_the_reference(dtype, shape):
    x, weight = (torch.randn(shape) * 3).to(dtype), (1 + 0.1 * torch.randn(shape[-1])).to(dtype)
    compare(normed(x, weight), rms_norm_reference(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (7, 70), (2, 4096), (2, 8192)])
def test_the_residual_is_added_in_place_and_its_norm_is_returned(dtype, shape):
    x, residual = (torch.randn(2, *shape) * 2).to(dtype)
    weight = (1 + 0.1 * torch.randn(shape[-1])).to(dtype)
    total, kept = residual.to(DEVICE, copy=True), x.clone()
    got = normed(x, weight, residual=total)
    expected = add_rms_norm_reference(x, residual, weight, 1e-5)
    assert torch.equal(total.cpu(), residual) and torch.equal(x, kept)
    compare(got, expected)


def test_rows_with_strides_match_the_reference():
    joint, weight = torch.randn(6, 4, 40), torch.randn(32)
    for x in (joint[:, 1, 8:], joint[:, 1:3, 8:], joint[:, 0, :32].t().t(), joint[::2, 0, :32]):
        compare(normed(x, weight), rms_norm_reference(x, weight, 1e-5))
    columns = torch.randn(32, 5).t()
    compare(normed(columns, weight), rms_norm_reference(columns, weight, 1e-5))


def test_a_residual_takes_rows_with_strides():
    x, residual, weight = torch.randn(5, 48)[:, 8:40], torch.randn(5, 32), torch.randn(32)
    total = residual.to(DEVICE, copy=True)
    got = normed(x, weight, residual=total)
    compare(got, add_rms_norm_reference(x, residual, weight, 1e-5))
    assert torch.equal(total.cpu(), residual)


def test_a_row_of_zeros_stays_zero_and_a_nan_stays_in_its_row():
    x = torch.zeros(3, 100)
    x[1, 7] = float("nan")
    got = normed(x, torch.ones(100))
    assert not got[0].any() and got[1].isnan().all() and not got[2].any()


def test_half_precision_takes_the_mean_in_float32():
    x = torch.full((1, 512), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    got = normed(x, torch.ones(512, dtype=torch.float16))
    assert torch.equal(got, torch.ones_like(got))
