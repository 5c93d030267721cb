"""The gated norm of heads. Run: python -m pytest tests/unit/ops/test_gated_rms_norm.py."""

from __future__ import annotations

import pytest
import torch

from engine.ops.gated_rms_norm import gated_rms_norm


@pytest.mark.parametrize("rows", [None, [2, 0], []])
def test_each_head_is_normalised_and_gated_by_silu(rows: list[int] | None):
    x, gate, weight = torch.randn(3, 4, 6), torch.randn(3, 24), torch.rand(6)
    picked = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    wide, by_head = x.double(), gate.double().view(3, 4, 6)
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    want = (want * by_head / (1 + (-by_head).exp())).flatten(1).float()
    got = gated_rms_norm(x, gate, weight, 1e-5, picked)
    torch.testing.assert_close(got, want if picked is None else want[picked])


def test_the_result_has_the_dtype_of_the_heads():
    x, gate = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 12)
    assert gated_rms_norm(x, gate, torch.ones(4).bfloat16(), 1e-6).dtype == torch.bfloat16
