"""silu_and_mul against the definition.

Run: python -m pytest tests/unit/ops/test_silu_and_mul.py
"""

import pytest
import torch

from engine.ops.silu_and_mul import gate_output, silu_and_mul
from tests.helpers.ops_cases import each_isa, on_isa


@each_isa
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (7, 30), (3, 2, 64), (300, 514)])
def test_rows_match_the_definition(isa, shape):
    x = torch.randn(shape) * 4
    gate, up = x.double().chunk(2, dim=-1)
    with on_isa(isa):
        torch.testing.assert_close(silu_and_mul(x), (gate * gate.sigmoid() * up).float())


@each_isa
def test_the_exponential_is_accurate_over_its_whole_range(isa):
    gate = torch.linspace(-80, 80, 200_001)
    with on_isa(isa):
        got = silu_and_mul(torch.cat((gate, torch.ones_like(gate))))
    expected = (gate.double() * gate.double().sigmoid()).float()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-30)


@each_isa
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_each_row_is_multiplied_by_the_sigmoid_of_its_projection(isa, tokens):
    out, x, gate = torch.randn(tokens, 20), torch.randn(tokens, 20), torch.randn(1, 20)
    factor = 1 / (1 + (-(x.double() * gate.double()).sum(1, keepdim=True)).exp())
    with on_isa(isa):
        torch.testing.assert_close(gate_output(out, x, gate), (out.double() * factor).float())
