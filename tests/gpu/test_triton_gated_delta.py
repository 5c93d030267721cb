"""The ops of Gated DeltaNet in Triton against the torch references.

On a CUDA device, else in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engine.ops.causal_conv import causal_conv_silu_reference
from engine.ops.gated_delta_rule import gated_delta_rule_reference
from engine.ops.gated_rms_norm import gated_rms_norm_reference
from tests.helpers.triton_cases import DEVICE, DTYPES, kernel

BOUNDS = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# Tokens of each sequence, and those before the step.
STEPS = {
    "decode": ([1, 1, 1], [7, 1, 0]),
    "a step of each kind": ([1, 1, 2, 5, 33], [0, 3, 0, 9, 0]),
    "chunks": ([17, 16, 20], [20, 1, 64]),
}

pytestmark = kernel


def ragged(lens: list[int], before: list[int], rows: int) -> list[torch.Tensor]:
    """The states' rows in no order, the starts and the context lengths of a step."""
    context = torch.tensor(lens) + torch.tensor(before)
    start = F.pad(torch.tensor(lens).cumsum(0), (1, 0))
    return [torch.randperm(rows)[: len(lens)], start.int(), context.int()]


def on_device(inputs: list[Any]) -> list[Any]:
    # `to` keeps what is there as it is, with its strides.
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs]


def widened(inputs: list[Any], dtype: torch.dtype) -> list[Any]:
    """The inputs in float32, what is written copied."""
    return [
        x.float().clone() if isinstance(x, torch.Tensor) and x.dtype == dtype else x for x in inputs
    ]


def close(mine: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    assert mine.dtype == dtype
    bound = BOUNDS[dtype]
    torch.testing.assert_close(mine.cpu().float(), theirs.float(), rtol=bound, atol=bound)


def convolve(
    lens: list[int], before: list[int], channels: int, taps: int, dtype: torch.dtype
) -> None:
    from engine.ops.gpu.causal_conv_silu import causal_conv_silu_triton

    rows = len(lens) + 2
    x = torch.randn(sum(lens), channels + 5).to(dtype)[:, 2 : channels + 2]
    weight = torch.randn(channels, taps).to(dtype)
    state = torch.randn(rows, taps - 1, channels).to(dtype)
    inputs = [x, weight, state, *ragged(lens, before, rows)]
    for row, old in zip(inputs[3], before, strict=True):
        state[row] = state[row] if old else float("nan")  # of a sequence that has finished
    exact, given = widened(inputs, dtype), on_device(inputs)
    given[2] = state.to(DEVICE, copy=True)
    got, expected = causal_conv_silu_triton(*given), causal_conv_silu_reference(*exact)
    close(got, expected, dtype)
    assert torch.equal(given[2].cpu().float(), exact[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_convolutions_and_their_states_match_the_reference(step, dtype):
    convolve(*STEPS[step], 48, 4, dtype)


@pytest.mark.parametrize("taps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("channels", [1, 6, 600])
def test_any_taps_and_channels_match_the_reference(channels, taps):
    convolve([1, 1, 2, 19], [1, 0, 3, 2], channels, taps, torch.float32)


def delta_inputs(
    lens: list[int],
    before: list[int],
    heads: tuple[int, int] = (1, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
) -> list[Any]:
    (groups, heads_v), (key, value), tokens = heads, dims, sum(lens)
    widths = (groups * key, groups * key, heads_v * value)
    q, k, v = torch.randn(tokens, sum(widths)).to(dtype).split(widths, dim=1)
    b, a = torch.randn(tokens, 2 * heads_v + 3).to(dtype)[:, 3:].split(heads_v, dim=1)
    log_rate = torch.rand(heads_v) * 2 - 1
    rows = len(lens) + 2
    state = torch.randn(rows, heads_v, key, value)
    states, start, context = ragged(lens, before, rows)
    for row, old in zip(states, before, strict=True):
        state[row] = state[row] if old else float("nan")
    parts = [x.unflatten(1, (n, -1)) for x, n in ((q, groups), (k, groups), (v, heads_v))]
    return [
        *parts,
        a,
        b,
        log_rate,
        torch.randn(heads_v),
        state,
        states,
        start,
        context,
        lens,
        context.tolist(),
    ]


def advance(inputs: list[Any], dtype: torch.dtype = torch.float32) -> None:
    from engine.ops.gpu.gated_delta_rule import gated_delta_rule_triton

    given = on_device(inputs)
    given[7] = inputs[7].to(DEVICE, copy=True)
    got = gated_delta_rule_triton(*given)
    exact = widened(inputs, dtype)
    exact[7] = inputs[7].clone()
    expected = gated_delta_rule_reference(*exact)
    close(got, expected, dtype)
    # The state is float32, but the step size has been rounded to the dtype of its projection.
    named = inputs[8]
    bound = max(5e-5, BOUNDS[dtype] / 4)
    torch.testing.assert_close(given[7].cpu()[named], exact[7][named], rtol=bound, atol=bound)
    others = [row for row in range(len(exact[7])) if row not in named.tolist()]
    assert torch.equal(given[7].cpu()[others], inputs[7][others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_delta_rules_and_their_states_match_the_reference(step, dtype):
    advance(delta_inputs(*STEPS[step], dtype=dtype), dtype)


@pytest.mark.parametrize(
    ("heads", "dims"),
    [((1, 1), (2, 2)), ((1, 3), (6, 10)), ((4, 4), (24, 5)), ((1, 2), (128, 128))],
)
def test_odd_heads_and_dims_match_the_reference(heads, dims):
    advance(delta_inputs([1, 1, 3], [4, 0, 2], heads, dims))


@pytest.mark.parametrize("rate", [-90.0, -20.0, 30.0, 90.0])
def test_extreme_rates_give_the_references_decays(rate):
    inputs = delta_inputs([1, 6], [3, 0])
    inputs[3] = inputs[3] + rate
    advance(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 16), (2, 5, 12), (2, 32, 128)])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_gated_norms_match_the_reference(shape, dtype, some):
    from engine.ops.gpu.gated_rms_norm import gated_rms_norm_triton

    tokens, heads, dim = shape
    x = torch.randn(shape).to(dtype) * 2
    gate = torch.randn(tokens, heads * dim + 7).to(dtype)[:, 3 : heads * dim + 3]
    weight = (1 + 0.1 * torch.randn(dim)).to(dtype)
    rows = torch.tensor([tokens - 1, 0])[:tokens] if some else None
    inputs = [x, gate, weight, 1e-6, rows]
    got = gated_rms_norm_triton(*on_device(inputs))
    assert got.shape == (len(rows) if rows is not None else tokens, heads * dim)
    close(got, gated_rms_norm_reference(*widened(inputs, dtype)), dtype)


def test_a_step_without_tokens_launches_nothing():
    from engine.ops.gpu.causal_conv_silu import causal_conv_silu_triton
    from engine.ops.gpu.gated_delta_rule import gated_delta_rule_triton
    from engine.ops.gpu.gated_rms_norm import gated_rms_norm_triton

    inputs = on_device(delta_inputs([], []))
    assert gated_delta_rule_triton(*inputs).shape == (0, 2, 16)
    state, none = torch.ones(2, 3, 8).to(DEVICE), inputs[8]
    x, weight = torch.empty(0, 8).to(DEVICE), torch.ones(8, 4).to(DEVICE)
    assert causal_conv_silu_triton(x, weight, state, none, inputs[9], inputs[10]).shape == (0, 8)
    heads = torch.ones(3, 2, 4).to(DEVICE)
    made = gated_rms_norm_triton(heads, heads.flatten(1), weight[0, :4], 1e-6, none)
    assert made.shape == (0, 8)
