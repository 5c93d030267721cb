"""The gated delta rule. Run: python -m pytest tests/unit/ops/test_gated_delta_rule.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.ops.gated_delta_rule import gated_delta_rule

G, H, K, V = 2, 4, 8, 6
Tokens = tuple[torch.Tensor, ...]


def tokens(length: int, seed: int = 1) -> Tokens:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(length, *shape, generator=generator)

    return normal(G, K), normal(G, K), normal(H, V), normal(H), normal(H)


def rates(strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.tensor([0.5, 1.0, 2.0, 1.5]) * strength).log(), torch.tensor([0.5, 0.0, -1, 1])


def run(
    parts: list[Tokens], before: list[int], state: torch.Tensor, strength: float = 1.0
) -> list[torch.Tensor]:
    """Run one step; sequence s has `before[s]` earlier tokens and the state of row s + 1."""
    lens = [len(part[0]) for part in parts]
    lens_S = torch.tensor(lens)
    start = F.pad(lens_S.cumsum(0), (1, 0)).int()
    context = (lens_S + torch.tensor(before)).int()
    rows = torch.arange(1, len(parts) + 1)
    whole = [torch.cat(column) for column in zip(*parts, strict=True)]
    q, k, v, a, b = whole
    given = (q, k, v, a, b, *rates(strength), state, rows, start, context, lens)
    return list(gated_delta_rule(*given, context.tolist()).split(lens))


def by_token(part: Tokens, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the definition token by token and head by head in float64."""
    q, k, v, a, b = (x.double() for x in part)
    log_rate, bias = rates(strength)
    decay, beta = -log_rate.double().exp() * F.softplus(a + bias), b.sigmoid()
    state, out = torch.zeros(H, K, V).double(), torch.empty_like(v)
    for t in range(len(v)):
        for h in range(H):
            g = h // (H // G)
            query = q[t, g] / (q[t, g].square().sum() + 1e-6).sqrt() / K**0.5
            key = k[t, g] / (k[t, g].square().sum() + 1e-6).sqrt()
            kept = state[h] * decay[t, h].exp()
            state[h] = kept + torch.outer(key, beta[t, h] * (v[t, h] - key @ kept))
            out[t, h] = query @ state[h]
    return out.float(), state.float()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_outputs_and_state_follow_the_definition(length: int):
    state = torch.full((2, H, K, V), float("nan"))
    (out,) = run([tokens(length)], [0], state)
    want, last = by_token(tokens(length))
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[1], last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[1] * 80, [30, 50], [70, 1, 1, 8], [1, 79]])
def test_chunks_of_a_prompt_agree_with_the_whole(cuts: list[int]):
    part, state, outs, done = tokens(80), torch.full((2, H, K, V), 3.0), [], 0
    for piece in zip(*(x.split(cuts) for x in part), strict=True):
        outs += run([piece], [done], state)
        done += len(piece[0])
    want, last = by_token(part)
    torch.testing.assert_close(torch.cat(outs), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[1], last, rtol=1e-4, atol=1e-5)


def test_sequences_of_a_step_do_not_touch_each_other():
    parts = [tokens(n, seed=n) for n in (1, 1, 5, 1, 90)]
    state = torch.full((7, H, K, V), 3.0)
    for part, out in zip(parts, run(parts, [0] * 5, state), strict=True):
        torch.testing.assert_close(out, by_token(part)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(state[[0, 6]], torch.full((2, H, K, V), 3.0))


def test_strong_decay_stays_finite():
    (out,) = run([tokens(70)], [0], torch.zeros(2, H, K, V), 500.0)
    torch.testing.assert_close(out, by_token(tokens(70), 500.0)[0], rtol=1e-4, atol=1e-5)


def test_a_step_without_tokens_changes_nothing():
    state, none = torch.ones(2, H, K, V), torch.zeros(0, dtype=torch.int64)
    start = torch.zeros(1, dtype=torch.int32)
    q, k, v, a, b = tokens(0)
    given = (q, k, v, a, b, *rates(), state, none, start, none)
    out = gated_delta_rule(*given, [], [])
    assert out.shape == (0, H, V) and torch.equal(state, torch.ones(2, H, K, V))
