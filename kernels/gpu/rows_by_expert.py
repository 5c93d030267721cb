"""rows_by_expert on CUDA: a counting sort of received rows by the bits of their bitmaps, in Triton.

A program takes one expert and one block of received rows. Up to 1,024 rows are one block and one
launch: what other experts' rows take before it are set bits that it counts itself. More rows are
several blocks, whose rows a first launch counts by expert. No atomics: a place depends on the
bitmaps alone.

`rows_by_expert` imports this file only where Triton and a CUDA tensor are at hand.

Legend: V unique rows received, R assignments received, e experts, B bytes of a bitmap.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta

_BLOCK = 1024


@triton.jit
def _serves(bits, num_received, stride, block, expert, BLOCK: tl.constexpr):
    v = block * BLOCK + tl.arange(0, BLOCK)
    at = bits + v.to(tl.int64) * stride + expert // 8
    byte = tl.load(at, mask=v < num_received, other=0).to(tl.int32)
    return v, (byte >> (expert % 8)) & 1


@triton.jit(do_not_specialize=["num_received"])
def _count_rows_kernel(bits, counts, num_received, stride, num_experts, BLOCK: tl.constexpr):
    block, expert = tl.program_id(0), tl.program_id(1)
    _, flag = _serves(bits, num_received, stride, block, expert, BLOCK)
    tl.store(counts + block * num_experts + expert, tl.sum(flag, axis=0))


@triton.jit(do_not_specialize=["num_received", "num_rows", "num_blocks"])
def _place_rows_kernel(
    bits,
    counts,
    index,
    slot,
    num_received,
    num_rows,
    stride,
    num_experts,
    num_blocks,
    COUNTED: tl.constexpr,
    WITH_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD_e: tl.constexpr,
    ROWS: tl.constexpr,
):
    block, expert = tl.program_id(0), tl.program_id(1)
    v, flag = _serves(bits, num_received, stride, block, expert, BLOCK)
    if COUNTED:
        e_1e = tl.arange(0, PAD_e)[None, :]
        before_e = tl.zeros([PAD_e], tl.int32)
        for row in range(0, num_blocks, ROWS):
            row_R1 = row + tl.arange(0, ROWS)[:, None]
            is_before = (e_1e < expert) | ((e_1e == expert) & (row_R1 < block))
            is_before = is_before & (row_R1 < num_blocks)
            count = tl.load(counts + row_R1 * num_experts + e_1e, mask=is_before, other=0)
            before_e += tl.sum(count, axis=0)
        first = tl.sum(before_e, axis=0)
    else:
        before_V = tl.zeros([BLOCK], tl.int32)
        for b in range(expert // 8 + 1):
            byte = tl.load(bits + v.to(tl.int64) * stride + b, mask=v < num_received, other=0).to(
                tl.int32
            )
            # The bits of experts before this one, counted by twos, fours and eights.
            byte &= tl.where(b < expert // 8, 0xFF, (1 << (expert % 8)) - 1)
            byte = (byte & 0x55) + ((byte >> 1) & 0x55)
            byte = (byte & 0x33) + ((byte >> 2) & 0x33)
            before_V += (byte & 0xF) + (byte >> 4)
        first = tl.sum(before_V, axis=0)
    place = first + tl.cumsum(flag, axis=0) - 1
    is_mine = flag == 1
    # Bitmaps and counts that disagree move nothing out of bounds.
    tl.store(index + place, v.to(tl.int64), mask=is_mine & (place < num_rows))
    if WITH_SLOTS:
        slot += v.to(tl.int64) * num_experts + expert
        tl.store(slot, tl.where(is_mine, place, -1).to(tl.int64), mask=v < num_received)
    if expert == num_experts - 1:
        if block == num_blocks - 1:
            zeros = tl.zeros([BLOCK], tl.int64)
            for start in range(first + tl.sum(flag, axis=0), num_rows, BLOCK):
                rest = start + tl.arange(0, BLOCK)
                tl.store(index + rest, zeros, mask=rest < num_rows)


def rows_by_expert_triton(
    bits_VB: torch.Tensor, num_experts: int, num_rows: int, *, with_slots: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Triton form of `rows_by_expert`: same arguments and results."""
    num_received = bits_VB.shape[0]
    slot_Ve = None
    if with_slots:
        slot_Ve = bits_VB.new_empty(num_received, num_experts, dtype=torch.int64)
    if num_received == 0 or num_experts == 0:
        return bits_VB.new_zeros(num_rows, dtype=torch.int64), slot_Ve
    assert bits_VB.stride(1) == 1 or bits_VB.shape[1] == 1
    index_R = bits_VB.new_empty(num_rows, dtype=torch.int64)
    num_blocks = triton.cdiv(num_received, _BLOCK)
    counts = index_R  # not read
    if num_blocks > 1:
        counts = bits_VB.new_empty(num_blocks, num_experts, dtype=torch.int32)
        _count_rows_kernel[(num_blocks, num_experts)](
            bits_VB, counts, num_received, bits_VB.stride(0), num_experts, BLOCK=_BLOCK
        )
    _place_rows_kernel[(num_blocks, num_experts)](
        bits_VB,
        counts,
        index_R,
        index_R if slot_Ve is None else slot_Ve,
        num_received,
        num_rows,
        bits_VB.stride(0),
        num_experts,
        num_blocks,
        COUNTED=num_blocks > 1,
        WITH_SLOTS=with_slots,
        BLOCK=_BLOCK,
        PAD_e=triton.next_power_of_2(num_experts),
        ROWS=8,
    )
    return index_R, slot_Ve


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: 16 and 64 experts of a rank, one block of rows and several."""

    def variant(name: str, experts: int, least: int, *, with_slots: bool) -> Variant:
        def call(tokens: int) -> None:
            rows_VL = meta(least + tokens, 4096 + 80, dtype=torch.uint8)
            bits_VB = rows_VL[:, 4096 + 64 : 4096 + 64 + experts // 8]
            rows_by_expert_triton(bits_VB, experts, 2 * tokens, with_slots=with_slots)

        return Variant(name, call)

    for experts in (16, 64):
        for slots in (False, True):
            name = f"{experts} experts" + ", slots" * slots
            yield variant(name, experts, 0, with_slots=slots)
            yield variant(f"{name}, blocks", experts, _BLOCK, with_slots=slots)
