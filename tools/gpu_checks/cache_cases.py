"""Cases of the ops that read or write the paged cache, for `kernels.py`.

Legend: T tokens, H query heads, G kv heads, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.ops import latent_rotary_store, paged_attention, qk_rotary_store, store_kv
from engine.ops.qk_rotary_store import QKRule

BLOCK = 16

# An op or its reference: takes the inputs, returns one tensor or several.
Op = Callable[..., Any]
Case = tuple[str, Op, Op, list[torch.Tensor]]


def cache_cases() -> Iterator[Case]:
    """Yield name, op, reference and inputs of every case."""

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
    for norm in ("none", "head", "projection"):
        yield _qk_rotary_store(QKRule(norm, clip=2.0 if norm == "projection" else None))
    yield _latent_rotary_store()
    decode, mixed = ([1] * 4, [1, 17, 64, 100]), ([1, 1, 7, 33], [17, 64, 7, 50])
    yield _attention("decode", *decode, heads=8, kv_heads=2, width=64)
    yield _attention("decode and prefill", *mixed, heads=8, kv_heads=2, width=64)
    yield _attention("one kv head a head", *mixed, heads=4, kv_heads=4, width=128)
    yield _attention("sliding window", *mixed, heads=8, kv_heads=2, width=64, window=20)
    # Multi-head latent attention: one shared head, the value is the first part of the key.
    yield _attention("latent", *mixed, heads=8, kv_heads=1, width=96, value_width=64)


def _qk_rotary_store(rule: QKRule) -> Case:
    heads, kv_heads, width = 4, 2, 64
    kv_width, angles = kv_heads * width, torch.randn(9, width // 2).repeat(1, 2)
    norms = (heads * width, kv_width) if rule.norm == "projection" else (width, width)

    def run(op: Op) -> Op:
        def call(qkv: Any, q_norm: Any, k_norm: Any, *rest: Any) -> tuple[Any, ...]:
            parts = qkv.split([heads * width, kv_width, kv_width], dim=1)
            given = (None, None) if rule.norm == "none" else (q_norm, k_norm)
            return (op(*parts, *given, *rest, rule), *rest[2:4])

        return call

    return (
        f"qk_rotary_store, norm {rule.norm}",
        run(qk_rotary_store.qk_rotary_store),
        run(qk_rotary_store.qk_rotary_store_reference),
        [
            torch.randn(9, heads * width + 2 * kv_width),
            *(1 + 0.1 * torch.randn(size) for size in norms),
            angles.cos(),
            angles.sin(),
            torch.zeros(5, kv_heads, BLOCK, width),
            torch.zeros(5, kv_heads, BLOCK, width),
            torch.randperm(5 * BLOCK)[:9],
        ],
    )


def _latent_rotary_store() -> Case:
    heads, latent, rotary = 4, 128, 32
    angles = torch.randn(9, rotary // 2).repeat(1, 2)

    def run(op: Op) -> Op:
        def call(q: Any, q_rope: Any, down: Any, norm: Any, *rest: Any) -> tuple[Any, Any]:
            parts = down.split([latent, rotary], dim=1)
            return op(q, q_rope, *parts, norm, 1e-6, *rest, interleaved=True), rest[2]

        return call

    return (
        "latent_rotary_store",
        run(latent_rotary_store.latent_rotary_store),
        run(latent_rotary_store.latent_rotary_store_reference),
        [
            torch.randn(9, heads, latent),
            torch.randn(9, heads, rotary),
            torch.randn(9, latent + rotary),
            1 + 0.1 * torch.randn(latent),
            angles.cos(),
            angles.sin(),
            torch.zeros(5, 1, BLOCK, latent + rotary),
            torch.randperm(5 * BLOCK)[:9],
        ],
    )


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
