"""rms_norm and add_rms_norm against the definition.

Run: python -m pytest tests/unit/ops/test_rms_norm.py
"""

import pytest
import torch

from engine.ops.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from tests.helpers.ops_cases import each_isa, on_isa


@each_isa
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 15), (5, 4, 64), (200, 515)])
def test_rows_match_the_definition(isa, shape):
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    with on_isa(isa):
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected.float())


@each_isa
def test_add_rms_norm_adds_to_the_residual_in_place_and_returns_the_norm_of_the_sum(isa):
    x, residual, weight = torch.randn(33, 70), torch.randn(33, 70), torch.randn(70)
    kept, total = x.clone(), x + residual
    with on_isa(isa):
        normed = add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(residual, total) and torch.equal(x, kept)
        assert torch.equal(normed, rms_norm(total, weight, 1e-6))


@each_isa
def test_strided_rows_match_the_reference(isa):
    x, weight = torch.randn(6, 4, 40)[:, 1:3, 8:], torch.randn(32)
    with on_isa(isa):
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


def test_half_precision_takes_the_mean_in_float32():
    x = torch.full((1, 512), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    got = rms_norm(x, torch.ones(512, dtype=torch.float16), 1e-6)
    assert got.dtype == torch.float16 and torch.equal(got, torch.ones_like(got))
