"""gate_output against the definition. Run: python -m pytest tests/unit/ops/test_gate_output.py."""

import pytest
import torch

from engine.ops.gate_output import gate_output
from tests.helpers.ops_cases import each_isa, on_isa


@each_isa
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_each_row_is_multiplied_by_the_sigmoid_of_its_projection(isa, tokens):
    out, x, gate = torch.randn(tokens, 20), torch.randn(tokens, 20), torch.randn(1, 20)
    factor = 1 / (1 + (-(x.double() * gate.double()).sum(1, keepdim=True)).exp())
    with on_isa(isa):
        torch.testing.assert_close(gate_output(out, x, gate), (out.double() * factor).float())
