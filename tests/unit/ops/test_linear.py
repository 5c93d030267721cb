"""linear: the compiled kernels against torch, and independence of the rows.

Run: python -m pytest tests/unit/ops/test_linear.py
"""

import pytest
import torch

from engine.ops.linear import linear, linear_reference
from tests.helpers.ops_cases import each_isa, needs_native, on_isa


@each_isa
@pytest.mark.parametrize("rows", [0, 1, 2, 8, 15, 16, 17, 33, 48, 49, 97, 300])
@pytest.mark.parametrize(("depth", "outputs"), [(64, 48), (50, 37), (1, 1), (129, 5), (7, 200)])
def test_shapes_match_the_reference(isa, rows, depth, outputs):
    x, weight, bias = torch.randn(rows, depth), torch.randn(outputs, depth), torch.randn(outputs)
    with on_isa(isa):
        got, with_bias = linear(x, weight), linear(x, weight, bias)
    torch.testing.assert_close(got, linear_reference(x, weight), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(with_bias, linear_reference(x, weight, bias), rtol=1e-4, atol=2e-5)


@each_isa
def test_more_rows_than_one_wave_holds_match_the_reference(isa):
    x, weight = torch.randn(5000, 1024), torch.randn(24, 1024)
    with on_isa(isa):
        got = linear(x, weight)
    torch.testing.assert_close(got, linear_reference(x, weight), rtol=1e-4, atol=2e-4)


@each_isa
def test_strided_inputs_and_leading_dims_match_the_reference(isa):
    x = torch.randn(3, 5, 80)[..., 7:47]
    weight = torch.randn(30, 64)[:, 12:52]
    with on_isa(isa):
        got = linear(x, weight)
    assert got.shape == (3, 5, 30)
    torch.testing.assert_close(got, linear_reference(x, weight), rtol=1e-4, atol=2e-5)


@each_isa
def test_a_row_gives_the_same_bits_whatever_else_is_in_the_batch(isa):
    x, weight = torch.randn(130, 77), torch.randn(101, 77)
    with on_isa(isa):
        whole = linear(x, weight)
        for size in (1, 3, 16, 40, 100):
            parts = [linear(x[i : i + size], weight) for i in range(0, 130, size)]
            assert torch.equal(torch.cat(parts), whole), size


@needs_native
def test_a_column_major_weight_is_left_to_torch():
    x, weight = torch.randn(4, 6), torch.randn(6, 9).t()
    assert torch.equal(linear(x, weight), linear_reference(x, weight))
