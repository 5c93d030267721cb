"""The ops of Gated DeltaNet: cases for `kernels.py`, and their times at the heads of a real model.

Legend: T tokens, S sequences, C channels, W taps, H value heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.ops.causal_conv import causal_conv_silu, causal_conv_silu_reference
from engine.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference
from engine.ops.gated_rms_norm import gated_rms_norm, gated_rms_norm_reference
from gpu_checks.cache_cases import Case, Op
from gpu_checks.check import Check, Settings, figure
from gpu_checks.peaks import seconds_of

GROUP = "speed"
GROUPS, HEADS, DIM, TAPS = 16, 32, 128, 4  # of Qwen3-Next-80B
LENS, BEFORE = [1, 1, 1, 7, 150], [9, 0, 3, 2, 0]  # tokens of a step, and those before it


def gated_delta_cases() -> Iterator[Case]:
    """Yield decodes, a chunk and a prompt in one step, at the heads of a real model and small."""
    ragged = _ragged(LENS, BEFORE)

    def convolve(op: Op) -> Op:
        def call(x: Any, weight: Any, state: Any, *step: Any) -> tuple[Any, Any]:
            return op(x, weight, state, *step), state

        return call

    channels = 96
    convolution = [torch.randn(sum(LENS), channels), torch.randn(channels, TAPS)]
    yield (
        "causal_conv_silu",
        convolve(causal_conv_silu),
        convolve(causal_conv_silu_reference),
        [*convolution, torch.randn(8, TAPS - 1, channels), *ragged],
    )
    for groups, heads, dim in ((GROUPS, HEADS, DIM), (2, 6, 24)):
        yield (
            f"gated_delta_rule, {heads} heads of {dim}",
            _rule(gated_delta_rule, groups, heads, dim),
            _rule(gated_delta_rule_reference, groups, heads, dim),
            [
                *_projections(sum(LENS), groups, heads, dim),
                torch.randn(8, heads, dim, dim),
                *ragged,
            ],
        )
    for name, rows in (("", None), (", some rows", [3, 8])):

        def normed(op: Op) -> Op:
            def call(x: Any, gate: Any, weight: Any, *some: Any) -> Any:
                return op(x, gate, weight, 1e-6, *some)

            return call

        picked = [] if rows is None else [torch.tensor(rows)]
        yield (
            f"gated_rms_norm{name}",
            normed(gated_rms_norm),
            normed(gated_rms_norm_reference),
            [torch.randn(9, 6, 24), torch.randn(9, 6 * 24), 1 + torch.randn(24) / 10, *picked],
        )


def _ragged(lens: list[int], before: list[int]) -> list[torch.Tensor]:
    lens_S = torch.tensor(lens)
    start = torch.tensor([0, *lens]).cumsum(0).int()
    rows = torch.randperm(max(8, len(lens)))[: len(lens)]
    return [rows, start, (lens_S + torch.tensor(before)).int()]


def _projections(tokens: int, groups: int, heads: int, dim: int) -> list[torch.Tensor]:
    """Return queries, keys and values in one tensor, decays and step sizes in another."""
    mixed, rates = torch.randn(tokens, (2 * groups + heads) * dim), torch.randn(tokens, 2 * heads)
    return [mixed, rates, torch.rand(heads) - 1, torch.randn(heads)]


def _rule(
    op: Op,
    groups: int,
    heads: int,
    dim: int,
    lens: list[int] = LENS,
    before: list[int] = BEFORE,
) -> Op:
    contexts = [new + old for new, old in zip(lens, before, strict=True)]

    def call(mixed: Any, rates: Any, log_rate: Any, bias: Any, state: Any, *step: Any) -> Any:
        parts = mixed.split([groups * dim, groups * dim, heads * dim], dim=1)
        by_head = [x.unflatten(1, (-1, dim)) for x in parts]
        # In float32 whatever the dtype of the case.
        state, log_rate, bias = state.float(), log_rate.float(), bias.float()
        given = (*rates.split(heads, dim=1), log_rate, bias, state, *step)
        return op(*by_head, *given, lens, contexts), state

    return call


@torch.inference_mode()
def check_gated_delta_speed(settings: Settings, copy_bytes: float) -> Iterator[Check]:
    """Time the ops of a layer in decode steps and in prefill. copy_bytes: measured, per second."""
    device, tiny = settings.device, settings.is_tiny
    groups, heads, dim = (2, 4, 16) if tiny else (GROUPS, HEADS, DIM)
    steps = {"decode of 64": [1] * 64, "prefill of 4096": [4096], "prefill of 8 x 512": [512] * 8}
    for name, lens in ({"decode of 4": [1] * 4, "prefill of 9": [9]} if tiny else steps).items():
        before = [0] * len(lens)
        step = [each.to(device) for each in _ragged(lens, before)]
        tokens, channels = sum(lens), (2 * groups + heads) * dim

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).to(torch.bfloat16)

        mixed, rates = normal(tokens, channels), normal(tokens, 2 * heads)
        weight, past = normal(channels, TAPS), normal(max(8, len(lens)), TAPS - 1, channels)
        state = torch.zeros(len(past), heads, dim, dim, device=device)
        decays = [torch.zeros(heads, device=device) for _ in range(2)]
        gate, norm = normal(tokens, heads * dim), normal(dim)
        by_head = gate.unflatten(1, (heads, -1))
        rule = _rule(gated_delta_rule, groups, heads, dim, lens, before)
        given = (mixed, rates, *decays, state, *step)
        states = 8 * len(lens) * heads * dim * dim  # read and written, 4 bytes each
        calls: list[tuple[str, Callable[[], Any], float]] = [
            (
                "causal_conv_silu",
                lambda x=mixed, w=weight, p=past, s=step: causal_conv_silu(x, w, p, *s),
                4 * mixed.numel(),
            ),
            (
                "gated_delta_rule",
                lambda r=rule, g=given: r(*g),
                states + 2 * (mixed.numel() + gate.numel()),
            ),
            (
                "gated_rms_norm",
                lambda x=by_head, g=gate, w=norm: gated_rms_norm(x, g, w, 1e-6),
                6 * gate.numel(),
            ),
        ]
        for op, call, moved in calls:
            yield figure(
                GROUP,
                f"{op}, {name}, ms",
                seconds_of(call, device) * 1e3,
                f"{moved / 1e6:.0f} MB; bound: these at the measured copy bandwidth",
                moved / copy_bytes * 1e3,
            )
