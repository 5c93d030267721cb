"""Every op of engine/ops on the device against its plain torch reference in float32 on the CPU.

On CUDA the ops go to Triton, on CPU to the compiled kernels, each where there is one.

Legend: T tokens, D width, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from engine.ops import (
    grouped_ffn,
    linear,
    permute,
    rms_norm,
    rotary,
    select_experts,
    select_top,
    silu_and_mul,
    sort_by_expert,
    table_experts,
    unique_rows,
)
from gpu_checks.cache_cases import Case, Op, cache_cases
from gpu_checks.check import Check, at_most, guarded, relative_error
from gpu_checks.experts.low_bit import low_bit_cases
from gpu_checks.gated_delta import gated_delta_cases

GROUP = "kernels"
# Relative error of the whole output: one rounding of the result, and of inputs that stay as given.
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check_kernels(device: torch.device) -> list[Check]:
    """Check all ops in float32, bfloat16 and float16."""
    found: list[Check] = []
    for dtype, bound in BOUNDS.items():
        torch.manual_seed(0)
        for name, op, reference, inputs in _cases():
            label = f"{name} {str(dtype).removeprefix('torch.')}"

            def check(
                op: Op = op,
                reference: Op = reference,
                inputs: list[torch.Tensor] = inputs,
                label: str = label,
                dtype: torch.dtype = dtype,
                bound: float = bound,
            ) -> list[Check]:
                return [at_most(GROUP, label, _error(op, reference, inputs, dtype, device), bound)]

            found += guarded(GROUP, label, check)
    return found


@torch.inference_mode()
def _error(
    op: Op, reference: Op, inputs: list[torch.Tensor], dtype: torch.dtype, device: torch.device
) -> float:
    given = [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs]
    # Copies, also on CPU in float32: some ops write to what they are given.
    exact = [
        x.to("cpu", torch.float32 if x.is_floating_point() else None, copy=True) for x in given
    ]
    result, expected = op(*given), reference(*exact)
    if isinstance(result, torch.Tensor):
        return relative_error(result, expected)
    pairs = zip(result, expected, strict=True)
    return max(relative_error(mine, theirs) for mine, theirs in pairs)


def _need(pool_N: torch.Tensor) -> torch.Tensor:
    return torch.tensor([5, 0, 400], device=pool_N.device)


def _cases() -> Iterator[Case]:
    random = torch.randn
    yield (
        "silu_and_mul",
        silu_and_mul.silu_and_mul,
        silu_and_mul.silu_and_mul_reference,
        [random(33, 192)],
    )
    x_TD, weight_D = random(33, 256), 1 + 0.1 * random(256)
    yield (
        "rms_norm",
        lambda x, w: rms_norm.rms_norm(x, w, 1e-5),
        lambda x, w: rms_norm.rms_norm_reference(x, w, 1e-5),
        [x_TD, weight_D],
    )
    yield (
        "add_rms_norm",
        lambda x, r, w: (rms_norm.add_rms_norm(x, r, w, 1e-5), r),
        lambda x, r, w: (rms_norm.add_rms_norm_reference(x, r, w, 1e-5), r),
        [x_TD, random(33, 256), weight_D],
    )
    angles = random(19, 32).repeat(1, 2)
    yield (
        "apply_rotary",
        rotary.apply_rotary,
        rotary.apply_rotary_reference,
        [random(19, 4, 64), random(19, 2, 64), angles.cos(), angles.sin()],
    )
    yield (
        "linear",
        linear.linear,
        linear.linear_reference,
        [random(9, 256), random(100, 256) / 16, random(100)],
    )
    yield (
        "gather_rows",
        permute.gather_rows,
        permute.gather_rows_reference,
        [random(17, 64), torch.randint(17, (50,))],
    )
    yield (
        "sort_by_expert",
        lambda ids: sort_by_expert.sort_by_expert(ids, 8),
        lambda ids: sort_by_expert.sort_by_expert_reference(ids, 8),
        [torch.rand(17, 8).argsort(1)[:, :3]],
    )
    yield (
        "sort_by_expert, several blocks",
        lambda ids: sort_by_expert.sort_by_expert(ids, 60),
        lambda ids: sort_by_expert.sort_by_expert_reference(ids, 60),
        [torch.randint(60, (3000, 4))],
    )
    yield (
        "quotas",
        select_top.quotas,
        select_top.quotas_reference,
        [torch.randint(1000, (8, 5)), torch.tensor([0, 1, 999, 2000, 9000])],
    )
    groups = select_experts.SelectionRule(6, "sigmoid", True, 0.0, 1.0, 8, 4, "top2")
    yield (
        "select_experts in groups",
        lambda x: select_experts.select_experts(x.float(), None, groups),
        lambda x: select_experts.select_experts_reference(x, None, groups),
        [random(65, 64).argsort(1) / 4 - 7.5],
    )
    for score in ("softmax", "sigmoid"):
        rule = select_experts.SelectionRule(4, score, normalize=True)
        yield (
            f"select_experts {score}",
            lambda x, rule=rule: select_experts.select_experts(x.float(), None, rule),
            lambda x, rule=rule: select_experts.select_experts_reference(x, None, rule),
            [random(65, 60).argsort(1) / 4 - 7.5],  # no two alike in any dtype
        )
    softplus = select_experts.SelectionRule(6, "sqrt_softplus", True, 1e-20, 1.5)
    yield (
        "table_experts",
        lambda x, table, ids: table_experts.table_experts(x.float(), table, ids, softplus),
        lambda x, table, ids: table_experts.table_experts_reference(x, table, ids, softplus),
        [random(65, 60), torch.rand(9, 60).argsort(1)[:, :6].contiguous(), torch.arange(65) % 9],
    )
    yield (
        "select_top",
        lambda first, second, pool: select_top.select_top([first, second], pool, _need(pool))[0],
        lambda first, second, pool: select_top.select_top_reference(
            [first, second], pool, _need(pool)
        )[0],
        [
            torch.randint(-3, 3, (300,), dtype=torch.int32),
            torch.randperm(300).int(),
            torch.randint(-1, 3, (300,)),
        ],
    )
    slot_TK = torch.randperm(60)[:51].view(17, 3)
    slot_TK[::4, 1] = -1
    yield (
        "combine_rows",
        permute.combine_rows,
        permute.combine_rows_reference,
        [random(60, 64), slot_TK, torch.rand(17, 3)],
    )
    counts = [5, 0, 1, 40]
    yield (
        "grouped_ffn",
        lambda x, w13, w2: grouped_ffn.grouped_ffn(x, w13, w2, counts),
        lambda x, w13, w2: grouped_ffn.grouped_ffn_reference(x, w13, w2, counts),
        [random(46, 128), random(4, 192, 128) / 11, random(4, 128, 96) / 10],
    )
    yield (
        "gate_output",
        silu_and_mul.gate_output,
        silu_and_mul.gate_output_reference,
        [random(9, 256), random(9, 256), random(1, 256) / 16],
    )
    yield from low_bit_cases()
    yield from _unique_row_cases()
    yield from cache_cases()
    yield from gated_delta_cases()


def _unique_row_cases() -> Iterator[Case]:
    # Of 3 groups of 4 experts: group, byte, bit and the weight's place by position, then of none.
    expert = torch.arange(12)
    by_position = torch.stack((expert // 4, expert // 4, 1 << expert % 4, expert))
    table_4P = torch.cat((by_position, torch.tensor([[3], [3], [0], [12]])), dim=1)
    position_TM = torch.rand(70, 12).argsort(1)[:, :5]
    position_TM[torch.rand(70, 5) < 0.3] = -1
    yield (
        "mark_groups",
        lambda position, table: unique_rows.mark_groups(position, table, 3, 1),
        lambda position, table: unique_rows.mark_groups_reference(position, table, 3, 1),
        [position_TM, table_4P],
    )
    yield (
        "count_groups",
        lambda position, table: unique_rows.count_groups(position, table, 3),
        lambda position, table: unique_rows.count_groups_reference(position, table, 3),
        [position_TM.view(2, 35, 5), table_4P],
    )
    yield (
        "spread_weights",
        lambda place, weights: unique_rows.spread_weights(place, weights, 12),
        lambda place, weights: unique_rows.spread_weights_reference(place, weights, 12),
        [table_4P[3][position_TM], torch.rand(70, 5)],
    )
    yield (
        "cells_of_rows",
        unique_rows.cells_of_rows,
        unique_rows.cells_of_rows_reference,
        [torch.randint(70, (90,)), torch.tensor([40, 0, 50])],
    )
    for received in (70, 3000):  # one block and several
        yield (
            f"rows_by_expert, {received} rows",
            lambda bits: unique_rows.rows_by_expert(bits, 11, 9000, with_slots=True),
            lambda bits: unique_rows.rows_by_expert_reference(bits, 11, 9000, with_slots=True),
            [torch.randint(256, (received, 2), dtype=torch.uint8)],
        )

    def packed(pack: Op) -> Op:
        def run(cell_U: torch.Tensor, bits_CB: torch.Tensor, weights_Ce: torch.Tensor) -> Any:
            out_UL = bits_CB.new_zeros(cell_U.numel(), 48)
            pack(cell_U, bits_CB, weights_Ce.float(), out_UL, 40, 8)
            return out_UL

        return run

    yield (
        "pack_headers",
        packed(unique_rows.pack_headers),
        packed(unique_rows.pack_headers_reference),
        [torch.randint(9, (21,)), torch.randint(256, (9, 2), dtype=torch.uint8), torch.rand(9, 8)],
    )
