"""The dense feed-forward. Run: python -m pytest tests/unit/layers/test_mlp.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.layers.mlp import DenseMLP

CPU = torch.device("cpu")


def test_gate_up_and_down_are_joined_as_the_checkpoint_names_them():
    torch.manual_seed(0)
    mlp = DenseMLP(8, 6, CPU, torch.float32, bias=True, output_gate=True)
    drawn = {}
    for slot in mlp.weight_slots("mlp", output_gate="gate.weight"):
        assert slot.full_shape == tuple(slot.target.shape)
        drawn[slot.name] = torch.randn(slot.full_shape)
        slot.target.copy_(drawn[slot.name])
    x_TD = torch.randn(5, 8)

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, drawn[f"mlp.{name}_proj.weight"], drawn[f"mlp.{name}_proj.bias"])

    hidden = F.silu(project("gate", x_TD)) * project("up", x_TD)
    expected = project("down", hidden) * F.linear(x_TD, drawn["gate.weight"]).sigmoid()
    torch.testing.assert_close(mlp(x_TD), expected)


def test_no_tokens_give_no_rows():
    mlp = DenseMLP(8, 6, CPU, torch.float32)
    assert mlp(torch.empty(0, 8)).shape == (0, 8)
