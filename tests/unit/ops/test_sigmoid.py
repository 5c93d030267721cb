"""Sigmoid by row: torch's values, and bits of a row that do not depend on the others.

Run: pytest tests/unit/ops/test_sigmoid.py
"""

import pytest
import torch

from engine.ops.sigmoid import sigmoid_by_row, soft_cap_by_row
from tests.helpers.ops_cases import needs_native


@pytest.mark.parametrize("width", [1, 6, 33])
def test_values_are_those_of_torch(width: int) -> None:
    x_TE = torch.randn(70, width, generator=torch.Generator().manual_seed(width)) * 5
    torch.testing.assert_close(sigmoid_by_row(x_TE), x_TE.double().sigmoid().float())
    assert sigmoid_by_row(x_TE[:0]).shape == (0, width)


@needs_native
@pytest.mark.parametrize("width", [1, 6, 33])
def test_the_bits_of_a_row_are_those_that_it_has_alone(width: int) -> None:
    x_TE = torch.randn(300, width, generator=torch.Generator().manual_seed(width)) * 5
    together = sigmoid_by_row(x_TE)
    capped = soft_cap_by_row(x_TE, 3.0)
    for row in range(300):
        assert torch.equal(sigmoid_by_row(x_TE[row : row + 1])[0], together[row])
        assert torch.equal(soft_cap_by_row(x_TE[row : row + 1], 3.0)[0], capped[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_soft_cap_is_a_tanh_between_minus_the_cap_and_the_cap(dtype: torch.dtype) -> None:
    x_TE = (torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * 40).to(dtype)
    x_TE[0] = torch.tensor([0.0, 1e-3, -1e-3, 1e4, -1e4, float("inf"), -float("inf"), 30.0])
    before, capped = x_TE.clone(), soft_cap_by_row(x_TE, 30.0)
    expected = 30.0 * (x_TE.double() / 30.0).tanh()
    assert capped.dtype == torch.float32 and torch.equal(x_TE, before)
    torch.testing.assert_close(capped.double(), expected, rtol=0.0, atol=30 * 5e-7)
    assert capped[0, 3:7].tolist() == [30.0, -30.0, 30.0, -30.0]
    assert soft_cap_by_row(torch.tensor([[float("nan")]]), 30.0).isnan().all()
