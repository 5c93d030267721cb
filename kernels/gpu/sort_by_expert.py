"""sort_by_expert on CUDA: a stable counting sort in Triton.

Up to 4,096 assignments are one block and one launch: a program takes one expert, counts what comes
before it and numbers its own in their order. More assignments are several blocks: a first launch
counts each block's assignments by expert, so that the second knows where each block's begin. No
atomics: a place depends on the ids alone.

`sort_by_expert` imports this file only where Triton and a CUDA tensor are at hand.

Legend: T tokens, K top-k, N assignments (T * K), E experts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta


@triton.jit
def _bucket_of(ids, num_ids, num_experts, block, BLOCK: tl.constexpr):
    # What is no assignment goes behind the last expert, what is past the end behind that.
    n = block * BLOCK + tl.arange(0, BLOCK)
    bucket = tl.load(ids + n, mask=n < num_ids, other=0).to(tl.int32)
    bucket = tl.where(bucket < 0, num_experts, bucket)
    return n, tl.where(n < num_ids, bucket, num_experts + 1)


@triton.jit(do_not_specialize=["num_ids"])
def _count_kernel(ids, counts, num_ids, num_experts, BLOCK: tl.constexpr, PAD_E: tl.constexpr):
    block = tl.program_id(0)
    _, bucket = _bucket_of(ids, num_ids, num_experts, block, BLOCK)
    tl.store(counts + block * PAD_E + tl.arange(0, PAD_E), tl.histogram(bucket, PAD_E))


@triton.jit(do_not_specialize=["num_ids", "num_blocks"])
def _place_kernel(
    ids,
    counts,
    token,
    slot,
    load,
    num_ids,
    num_experts,
    num_blocks,
    TOP_K: tl.constexpr,
    COUNTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD_E: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0)
    n, bucket = _bucket_of(ids, num_ids, num_experts, block, BLOCK)
    each_E = tl.arange(0, PAD_E)
    if COUNTED:
        total_E = tl.zeros([PAD_E], tl.int32)
        before_E = tl.zeros([PAD_E], tl.int32)
        for row in range(0, num_blocks, ROWS):
            row_R = row + tl.arange(0, ROWS)
            at_RE = counts + row_R[:, None] * PAD_E + each_E[None, :]
            in_RE = (row_R[:, None] < num_blocks) & (each_E[None, :] < PAD_E)
            count_RE = tl.load(at_RE, mask=in_RE, other=0)
            total_E += tl.sum(count_RE, axis=0)
            before_E += tl.sum(tl.where(row_R[:, None] < block, count_RE, 0), axis=0)
        start_E = tl.cumsum(total_E, axis=0) - total_E + before_E
    for index in range(EXPERTS):
        expert = tl.program_id(1) * EXPERTS + index
        mine = bucket == expert
        if COUNTED:
            first = tl.sum(tl.where(each_E == expert, start_E, 0), axis=0)
            total = tl.sum(tl.where(each_E == expert, total_E, 0), axis=0)
        else:
            first = tl.sum((bucket < expert).to(tl.int32), axis=0)
            total = tl.sum(mine.to(tl.int32), axis=0)
        # Programs past the last bucket have no assignments: a bucket past the end is no place.
        mine = mine & (n < num_ids)
        place = first + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(token + place, (n // TOP_K).to(tl.int64), mask=mine)
        slot_N = tl.where(expert < num_experts, place, -1)
        tl.store(slot + n, slot_N.to(tl.int64), mask=mine)
        if block == 0:
            tl.store(load + expert, total.to(tl.int64), mask=expert < num_experts)


class _Tiles(NamedTuple):
    block: int  # assignments per block
    experts: int  # per program
    warps: int


def _tiles(num_ids: int) -> _Tiles:
    if num_ids <= 512:
        return _Tiles(512, 1, 4)
    return _Tiles(4096, 1 if num_ids <= 4096 else 8, 8)


def sort_by_expert_triton(
    topk_ids_TK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton form of `sort_by_expert`: same arguments and results."""
    ids_TK = topk_ids_TK.contiguous()
    num_ids = ids_TK.numel()
    token_N, slot_TK = ids_TK.new_empty(num_ids), torch.empty_like(ids_TK)
    if num_ids == 0:
        return token_N, slot_TK, ids_TK.new_zeros(num_experts)
    load_E = ids_TK.new_empty(num_experts)
    tiles = _tiles(num_ids)
    num_blocks = triton.cdiv(num_ids, tiles.block)
    pad = triton.next_power_of_2(num_experts + 2)
    counts = load_E  # not read
    if num_blocks > 1:
        counts = ids_TK.new_empty(num_blocks, pad, dtype=torch.int32)
        _count_kernel[(num_blocks,)](
            ids_TK,
            counts,
            num_ids,
            num_experts,
            BLOCK=tiles.block,
            PAD_E=pad,
            num_warps=tiles.warps,
        )
    _place_kernel[(num_blocks, triton.cdiv(num_experts + 1, tiles.experts))](
        ids_TK,
        counts,
        token_N,
        slot_TK,
        load_E,
        num_ids,
        num_experts,
        num_blocks,
        TOP_K=ids_TK.shape[1],
        COUNTED=num_blocks > 1,
        EXPERTS=tiles.experts,
        BLOCK=tiles.block,
        PAD_E=pad,
        ROWS=8,
        num_warps=tiles.warps,
    )
    return token_N, slot_TK, load_E


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: few assignments, one block of many, and several blocks."""

    def variant(name: str, least: int, top_k: int, num_experts: int) -> Variant:
        def call(tokens: int) -> None:
            # At most 128 tokens: fewer than 512 assignments of few.
            ids_TK = meta(least + tokens, top_k, dtype=torch.int64)
            sort_by_expert_triton(ids_TK, num_experts)

        return Variant(name, call)

    for top_k, num_experts in ((2, 8), (8, 128)):
        place = f"top {top_k} of {num_experts}"
        if top_k == 2:
            yield variant(f"{place}, 512 assignments", 0, top_k, num_experts)
        yield variant(f"{place}, 4096 assignments", 512 // top_k, top_k, num_experts)
        yield variant(f"{place}, more", 4096 // top_k, top_k, num_experts)
