"""gate_output in Triton against the torch reference.

On a CUDA device, else in Triton's interpreter.
"""

import pytest
import torch

from engine.ops.silu_and_mul import gate_output_reference
from tests.helpers.triton_cases import DEVICE, DTYPES, kernel

BOUNDS = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}

pytestmark = kernel


def compare(out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> None:
    from engine.ops.gpu.gate_output import gate_output_triton

    got = gate_output_triton(out.to(DEVICE), x.to(DEVICE), gate.to(DEVICE)).cpu()
    expected = gate_output_reference(out.float(), x.float(), gate.float())
    bound = BOUNDS[out.dtype]
    assert got.dtype == out.dtype
    torch.testing.assert_close(got.float(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 37), (2, 2048), (2, 3584), (1, 8192)])
def test_rows_match_the_reference(dtype, shape):
    out, x = torch.randn(2, *shape).to(dtype)
    compare(out, x, (torch.randn(1, shape[1]) / shape[1] ** 0.5).to(dtype))


def test_rows_with_strides_match_the_reference():
    joint = torch.randn(5, 64)
    compare(joint[:, 3:23], joint[:, 30:50], torch.randn(1, 20) / 4)
    compare(torch.randn(20, 5).t(), torch.randn(20, 5).t(), torch.randn(1, 20) / 4)


def test_large_logits_give_whole_rows_and_zeros():
    out, x = torch.ones(2, 4), torch.tensor([[20.0] * 4, [-20.0] * 4])
    from engine.ops.gpu.gate_output import gate_output_triton

    got = gate_output_triton(out.to(DEVICE), x.to(DEVICE), torch.ones(1, 4).to(DEVICE)).cpu()
    assert got[0].tolist() == [1.0] * 4 and float(got[1].max()) < 1e-30
