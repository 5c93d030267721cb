"""qk_rotary_store against the definition, in float64.

Run: python -m pytest tests/unit/ops/test_qk_rotary_store.py
"""

import pytest
import torch

from engine.ops.qk_rotary_store import QKRule, qk_rotary_store
from tests.helpers.ops_cases import each_isa, on_isa

T, H, G, D, BLOCK = 5, 4, 2, 8, 3
SLOTS = torch.tensor([7, 0, 4, 8, 2])


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


def turn(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.double().cos()[:, None], angle.double().sin()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@each_isa
@pytest.mark.parametrize(
    "rule",
    [
        QKRule("none"),
        QKRule("head", 1e-5),
        QKRule("projection", 1e-5),
        QKRule("projection", 1e-5, clip=0.5),  # the bound follows this norm
        QKRule("head", 1e-5, clip=0.5),  # and comes before that one
    ],
    ids=str,
)
def test_queries_and_cache_match_the_definition(isa, rule):
    joint = torch.randn(T, (H + 2 * G) * D)
    parts = joint.split([H * D, G * D, G * D], dim=1)
    q, k, v = (part.double() for part in parts)
    weights = [
        1 + 0.1 * torch.randn(x.shape[1] if rule.norm == "projection" else D) for x in (q, k)
    ]
    angle = torch.rand(T, D // 2) * 6
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    caches = [torch.zeros(3, G, BLOCK, D) for _ in range(2)]

    bound = float("inf") if rule.clip is None else rule.clip
    if rule.norm == "projection":
        q, k = norm(q, weights[0]), norm(k, weights[1])
    q, k, v = (x.clamp(-bound, bound).unflatten(1, (-1, D)) for x in (q, k, v))
    if rule.norm == "head":
        q, k = norm(q, weights[0]), norm(k, weights[1])

    given = (None, None) if rule.norm == "none" else weights
    with on_isa(isa):
        got = qk_rotary_store(*parts, *given, cos, sin, *caches, SLOTS, rule)
    torch.testing.assert_close(got, turn(q, angle).float())
    stored = [cache.transpose(1, 2).flatten(0, 1) for cache in caches]
    torch.testing.assert_close(stored[0][SLOTS], turn(k, angle).float())
    torch.testing.assert_close(stored[1][SLOTS], v.float())
    assert not stored[0][[1, 3, 5, 6]].any() and not stored[1][[1, 3, 5, 6]].any()
