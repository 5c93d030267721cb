"""apply_rotary: in place, the same as the reference, and a rotation.

Run: python -m pytest tests/unit/ops/test_rotary.py
"""

import pytest
import torch

from engine.ops.rotary import apply_rotary, apply_rotary_reference
from tests.helpers.ops_cases import each_isa, on_isa


def angles(tokens: int, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(tokens, dims // 2) * 6
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def test_a_quarter_turn_moves_the_first_half_into_the_second():
    q, k = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.zeros(1, 1, 4)
    apply_rotary(q, k, torch.zeros(1, 4), torch.ones(1, 4))
    assert q.tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]


@each_isa
@pytest.mark.parametrize(("head_dim", "dims"), [(64, 64), (24, 24), (80, 32), (10, 6), (2, 2)])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_heads_match_the_reference_in_place(isa, head_dim, dims, tokens):
    q, k = torch.randn(tokens, 6, head_dim), torch.randn(tokens, 2, head_dim)
    expected = apply_rotary_reference(q.clone(), k.clone(), *angles_of(tokens, dims))
    with on_isa(isa):
        got = apply_rotary(q, k, *angles_of(tokens, dims))
    assert got[0] is q and got[1] is k
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def angles_of(tokens: int, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens * 1000 + dims)
    return angles(tokens, dims)


@each_isa
def test_views_of_a_joint_projection_are_turned_and_their_neighbours_are_not(isa):
    joint = torch.randn(5, 8 * 16)
    before = joint.clone()
    q, k, v = (part.view(5, -1, 16) for part in joint.split([64, 32, 32], dim=1))
    cos, sin = angles_of(5, 16)
    with on_isa(isa):
        apply_rotary(q, k, cos, sin)
    assert torch.equal(v, before[:, 96:].view(5, 2, 16))
    expected = apply_rotary_reference(
        before[:, :64].view(5, 4, 16), before[:, 64:96].view(5, 2, 16), cos, sin
    )
    torch.testing.assert_close(q, expected[0])
    torch.testing.assert_close(k, expected[1])


@each_isa
def test_the_length_of_a_head_does_not_change(isa):
    q, k = torch.randn(20, 3, 32), torch.randn(20, 1, 32)
    lengths = q.norm(dim=-1)
    with on_isa(isa):
        apply_rotary(q, k, *angles_of(20, 32))
    torch.testing.assert_close(q.norm(dim=-1), lengths)
