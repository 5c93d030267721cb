"""Causal convolution with state. Run: python -m pytest tests/unit/ops/test_causal_conv.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.ops.causal_conv import causal_conv_silu

C, W = 6, 4


def run(parts: list[torch.Tensor], before: list[int], state: torch.Tensor) -> list[torch.Tensor]:
    """Run one step; sequence s has `before[s]` earlier tokens and the state of row 2 - s."""
    lens = torch.tensor([len(part) for part in parts])
    start = F.pad(lens.cumsum(0), (1, 0)).int()
    context = (lens + torch.tensor(before)).int()
    rows = torch.tensor([2 - s for s in range(len(parts))])
    out = causal_conv_silu(torch.cat(parts), weight(), state, rows, start, context)
    return list(out.split(lens.tolist()))


def weight() -> torch.Tensor:
    return torch.randn(C, W, generator=torch.Generator().manual_seed(7))


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, C, generator=generator) for length in (9, 2)]


def test_whole_sequences_are_convolved_as_by_torch():
    got = run(inputs(), [0, 0], torch.full((3, W - 1, C), float("nan")))
    for x, out in zip(inputs(), got, strict=True):
        padded = F.pad(x.t(), (W - 1, 0))
        want = F.silu(F.conv1d(padded[None], weight()[:, None], groups=C))[0].t()
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize("cuts", [[1] * 9, [2, 7], [4, 1, 1, 3], [8, 1]])
def test_chunks_of_a_prompt_agree_with_the_whole(cuts: list[int]):
    x = inputs()[0]
    whole, state = run([x], [0], torch.zeros(3, W - 1, C))[0], torch.full((3, W - 1, C), 5.0)
    parts, done = [], 0
    for part in x.split(cuts):
        parts += run([part], [done], state)
        done += len(part)
    # Torch's silu rounds whole vectors and what is left over differently.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-7)
    assert torch.equal(state[2], x[-(W - 1) :])


def test_a_state_that_is_not_named_stays():
    state = torch.full((3, W - 1, C), 5.0)
    run(inputs(), [0, 0], state)
    assert torch.equal(state[0], torch.full((W - 1, C), 5.0))
    assert not (state[1:] == 5.0).any()
    assert not state[1, 0].any(), "two tokens leave the oldest place at zero"


def test_a_step_without_tokens_changes_nothing():
    state = torch.ones(3, W - 1, C)
    empty = torch.zeros(0, dtype=torch.int64)
    out = causal_conv_silu(
        torch.empty(0, C), weight(), state, empty, torch.zeros(1, dtype=torch.int32), empty
    )
    assert out.shape == (0, C) and torch.equal(state, torch.ones(3, W - 1, C))
