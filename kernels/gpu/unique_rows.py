"""mark_groups and count_groups on CUDA: one Triton program per block of tokens.

A token's few columns are compared with each other instead of sorted. `count_groups` adds
atomically, but integers: the order of programs does not matter.

`unique_rows` imports this file only where Triton and a CUDA tensor are at hand.

Legend: T tokens, M columns of the ids, W ranks, P positions, G groups, B bytes of a bitmap.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta


@triton.jit
def _positions_of(position, t, num_tokens, k, num_positions, COLUMNS: tl.constexpr):
    # What is no assignment, or past the end, has the tables' last entry.
    found = tl.load(position + t * COLUMNS + k, mask=(t < num_tokens) & (k < COLUMNS), other=-1)
    return tl.where(found < 0, num_positions, found)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["position"])
def _mark_groups_kernel(
    position,
    table,
    first,
    bits,
    weight,
    num_tokens,
    num_positions,
    num_groups,
    num_bytes,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAD_M: tl.constexpr,
    PAD_B: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_T1, m_1M, b_1B = t[:, None], tl.arange(0, PAD_M)[None, :], tl.arange(0, PAD_B)[None, :]
    position_TM = _positions_of(position, t_T1, num_tokens, m_1M, num_positions, COLUMNS)
    group_TM = tl.load(table + position_TM)
    weight_TM = tl.load(table + 3 * (num_positions + 1) + position_TM)
    is_later_TM = group_TM >= num_groups
    bits_TB = tl.zeros([BLOCK_T, PAD_B], tl.int32)
    for k in range(COLUMNS):
        position_T1 = _positions_of(position, t_T1, num_tokens, k, num_positions, COLUMNS)
        group_T1 = tl.load(table + position_T1)
        byte_T1 = tl.load(table + num_positions + 1 + position_T1)
        bit_T1 = tl.load(table + 2 * (num_positions + 1) + position_T1).to(tl.int32)
        is_later_TM = is_later_TM | ((m_1M > k) & (group_T1 == group_TM))
        bits_TB += tl.where(b_1B == byte_T1, bit_T1, 0)
    in_TM = (t_T1 < num_tokens) & (m_1M < COLUMNS)
    tl.store(first + t_T1 * COLUMNS + m_1M, tl.where(is_later_TM, -1, group_TM), mask=in_TM)
    tl.store(weight + t_T1 * COLUMNS + m_1M, weight_TM, mask=in_TM)
    in_TB = (t_T1 < num_tokens) & (b_1B < num_bytes)
    tl.store(bits + t_T1 * num_bytes + b_1B, bits_TB.to(tl.uint8), mask=in_TB)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["position"])
def _count_groups_kernel(
    position,
    group_P,
    count,
    num_tokens,
    num_positions,
    num_groups,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAD_M: tl.constexpr,
    PAD_G: tl.constexpr,
):
    rank = tl.program_id(0).to(tl.int64)
    position += rank * num_tokens * COLUMNS
    t_T1 = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    m_1M = tl.arange(0, PAD_M)[None, :]
    position_TM = _positions_of(position, t_T1, num_tokens, m_1M, num_positions, COLUMNS)
    group_TM = tl.load(group_P + position_TM)
    is_later_TM = group_TM >= num_groups
    for k in range(COLUMNS):
        position_T1 = _positions_of(position, t_T1, num_tokens, k, num_positions, COLUMNS)
        group_T1 = tl.load(group_P + position_T1)
        is_later_TM = is_later_TM | ((m_1M > k) & (group_T1 == group_TM))
    bucket_TM = tl.where(is_later_TM, num_groups, group_TM).to(tl.int32)
    count_G = tl.histogram(tl.reshape(bucket_TM, [BLOCK_T * PAD_M]), PAD_G)
    g = tl.arange(0, PAD_G)
    is_counted = (g < num_groups) & (count_G > 0)
    tl.atomic_add(count + rank * num_groups + g, count_G.to(tl.int64), mask=is_counted)


def rows_per_program(columns: int) -> int:
    """Return how many rows of that many columns a program takes."""
    return max(1, min(32, 2048 // columns))


def mark_groups_triton(
    position_TM: torch.Tensor, table_4P: torch.Tensor, num_groups: int, bitmap_bytes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton form of `mark_groups`: same arguments and results."""
    num_tokens, columns = position_TM.shape
    position_TM = position_TM.contiguous()
    first_TM, weight_TM = torch.empty_like(position_TM), torch.empty_like(position_TM)
    bits_TGB = position_TM.new_empty(num_tokens, num_groups, bitmap_bytes, dtype=torch.uint8)
    if num_tokens == 0:
        return first_TM, bits_TGB, weight_TM
    pad_m = triton.next_power_of_2(columns)
    pad_b = triton.next_power_of_2(num_groups * bitmap_bytes)
    block = rows_per_program(max(pad_m, pad_b))
    _mark_groups_kernel[(triton.cdiv(num_tokens, block),)](
        position_TM,
        table_4P,
        first_TM,
        bits_TGB,
        weight_TM,
        num_tokens,
        table_4P.shape[1] - 1,
        num_groups,
        num_groups * bitmap_bytes,
        COLUMNS=columns,
        BLOCK_T=block,
        PAD_M=pad_m,
        PAD_B=pad_b,
    )
    return first_TM, bits_TGB, weight_TM


def count_groups_triton(
    position_WTM: torch.Tensor, table_4P: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Triton form of `count_groups`: same arguments and result."""
    num_ranks, num_tokens, columns = position_WTM.shape
    position_WTM = position_WTM.contiguous()
    count_WG = position_WTM.new_zeros(num_ranks, num_groups)
    if num_tokens == 0:
        return count_WG
    pad_m = triton.next_power_of_2(columns)
    # At least a warp of numbers, or there is no histogram.
    block = max(rows_per_program(pad_m), 32 // pad_m)
    _count_groups_kernel[(num_ranks, triton.cdiv(num_tokens, block))](
        position_WTM,
        table_4P,
        count_WG,
        num_tokens,
        table_4P.shape[1] - 1,
        num_groups,
        COLUMNS=columns,
        BLOCK_T=block,
        PAD_M=pad_m,
        PAD_G=triton.next_power_of_2(num_groups + 1),
    )
    return count_WG


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: 128 experts, 8 per token, on 8 ranks in 1 and 4 chunks."""
    table_4P = meta(4, 129, dtype=torch.int64)
    for groups, num_bytes in ((8, 2), (32, 1)):

        def mark(tokens: int, groups=groups, num_bytes=num_bytes) -> None:
            mark_groups_triton(meta(tokens, 8, dtype=torch.int64), table_4P, groups, num_bytes)

        def count(tokens: int, groups=groups) -> None:
            count_groups_triton(meta(8, tokens, 8, dtype=torch.int64), table_4P, groups)

        yield Variant(f"mark, {groups} groups", mark)
        yield Variant(f"count, {groups} groups", count)
