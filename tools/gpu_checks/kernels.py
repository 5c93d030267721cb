"""Every op of engine/ops on the device against its plain torch reference in float32 on the CPU.

On CUDA the ops go to Triton, on CPU to the compiled kernels, each where there is one.

Legend: T tokens, H query heads, G kv heads, D width, R rows, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.ops import (
    grouped_ffn,
    linear,
    paged_attention,
    permute,
    rms_norm,
    rotary,
    select_experts,
    select_top,
    silu_and_mul,
    sort_by_expert,
    store_kv,
)
from gpu_checks.check import Check, at_most, guarded, relative_error

GROUP = "kernels"
# Relative error of the whole output: one rounding of the result, and of inputs that stay as given.
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BLOCK = 16

# An op or its reference: takes the inputs, returns one tensor or several.
Op = Callable[..., Any]
Case = tuple[str, Op, Op, list[torch.Tensor]]


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
    exact = [x.float().cpu() if x.is_floating_point() else x.cpu() for x in given]
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
        lambda x, r, w: rms_norm.add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: rms_norm.add_rms_norm_reference(x, r, w, 1e-5),
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
    yield from _cache_cases()


def _cache_cases() -> Iterator[Case]:
    def stored(store: Op) -> Op:
        def run(k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any) -> tuple[Any, Any]:
            store(k, v, k_cache, v_cache, slots)
            return k_cache, v_cache

        return run

    yield (
        "store_kv",
        stored(store_kv.store_kv),
        stored(store_kv.store_kv_reference),
        [
            torch.randn(9, 2, 64),
            torch.randn(9, 2, 32),
            torch.zeros(5, 2, BLOCK, 64),
            torch.zeros(5, 2, BLOCK, 32),
            torch.randperm(5 * BLOCK)[:9],
        ],
    )
    decode, mixed = ([1] * 4, [1, 17, 64, 100]), ([1, 1, 7, 33], [17, 64, 7, 50])
    yield _attention("decode", *decode, heads=8, kv_heads=2, width=64)
    yield _attention("decode and prefill", *mixed, heads=8, kv_heads=2, width=64)
    yield _attention("one kv head a head", *mixed, heads=4, kv_heads=4, width=128)
    yield _attention("sliding window", *mixed, heads=8, kv_heads=2, width=64, window=20)
    # Multi-head latent attention: one shared head, the value is the first part of the key.
    yield _attention("latent", *mixed, heads=8, kv_heads=1, width=96, value_width=64)


def _attention(
    name: str,
    query_lens: list[int],
    context_lens: list[int],
    *,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int | None = None,
    window: int | None = None,
) -> Case:
    columns = -(-max(context_lens) // BLOCK)
    num_blocks = columns * len(query_lens) + 1
    table_SB = torch.randperm(num_blocks)[: columns * len(query_lens)].view(-1, columns).int()
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()

    def run(op: Op) -> Op:
        def call(q: Any, k_cache: Any, v_cache: Any, start: Any, context: Any, table: Any) -> Any:
            values = v_cache if value_width is None else k_cache[..., :value_width]
            return op(
                q,
                k_cache,
                values,
                start,
                context,
                table,
                query_lens=query_lens,
                context_lens=context_lens,
                scale=width**-0.5,
                window=window,
            )

        return call

    return (
        f"paged_attention, {name}",
        run(paged_attention.paged_attention),
        run(paged_attention.paged_attention_reference),
        [
            torch.randn(sum(query_lens), heads, width),
            torch.randn(num_blocks, kv_heads, BLOCK, width),
            torch.randn(num_blocks, kv_heads, BLOCK, width),
            starts,
            torch.tensor(context_lens).int(),
            table_SB,
        ],
    )
