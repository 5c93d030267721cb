"""latent_rotary_store against the definition, in float64.

Run: python -m pytest tests/unit/ops/test_latent_rotary_store.py
"""

import pytest
import torch

from engine.ops.latent_rotary_store import latent_rotary_store, split_pairs
from tests.helpers.ops_cases import each_isa, on_isa

T, H, C, R, BLOCK = 5, 3, 6, 4, 3
SLOTS = torch.tensor([7, 0, 4, 8, 2])


def test_pairs_move_to_the_halves():
    assert split_pairs(torch.arange(6)).tolist() == [0, 2, 4, 1, 3, 5]


def turn(x: torch.Tensor, angle: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate pairs as complex numbers, the first numbers of all pairs before the second ones."""
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


@each_isa
@pytest.mark.parametrize("rows", [None, [1, 4], []], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_queries_and_cache_match_the_definition(isa, interleaved, rows):
    read = list(range(T)) if rows is None else rows
    absorbed, q_rope = torch.randn(len(read), H, C), torch.randn(T, H, 2 + R)[..., 2:]
    latent, k_rope = torch.randn(T, C + R).split([C, R], dim=1)
    weight, angle = 1 + 0.1 * torch.randn(C), torch.rand(T, R // 2) * 6
    cache = torch.zeros(3, 1, BLOCK, C + R)

    angles = angle.double()
    turned = turn(q_rope.double(), angles[:, None], interleaved)[read]
    queries = torch.cat((absorbed.double(), turned), dim=2)
    wide = latent.double()
    normed = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    keys = torch.cat((normed, turn(k_rope.double(), angles, interleaved)), dim=1)

    with on_isa(isa):
        got = latent_rotary_store(
            absorbed,
            q_rope,
            latent,
            k_rope,
            weight,
            1e-6,
            angle.cos().repeat(1, 2),
            angle.sin().repeat(1, 2),
            cache,
            SLOTS,
            interleaved=interleaved,
            rows_Q=None if rows is None else torch.tensor(rows, dtype=torch.int64),
        )
    torch.testing.assert_close(got, queries.float())
    stored = cache.view(3 * BLOCK, C + R)
    torch.testing.assert_close(stored[SLOTS], keys.float())
    assert not stored[[1, 3, 5, 6]].any()
