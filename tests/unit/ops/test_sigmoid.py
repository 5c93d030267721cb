"""Sigmoid by row: torch's values, and bits of a row that do not depend on the others.

Run: pytest tests/unit/ops/test_sigmoid.py
"""

import pytest
import torch

from engine.ops.sigmoid import sigmoid_by_row
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
    for row in range(300):
        assert torch.equal(sigmoid_by_row(x_TE[row : row + 1])[0], together[row])
