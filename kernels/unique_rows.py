"""Rows sent once per token and rank: who needs which, the heads of their rows, what was received.

`engine/moe/dispatch/dedup.py` says what unique rows, groups and bitmaps are, and
`engine/moe/dispatch/row_format.py` how a packed row is laid out.

Legend: T tokens, M columns of the ids, W ranks, P positions, G groups, U unique rows sent, V unique
rows received, R assignments received, e experts of a group, B bytes of a bitmap, L bytes of a
packed row, C cells (T * G).
"""

from __future__ import annotations

import torch

from engine.ops import triton_support


def mark_groups(
    position_TM: torch.Tensor, table_4P: torch.Tensor, num_groups: int, bitmap_bytes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each token's groups, first_group_TM, bits_TGB and weight_TM.

    first_group_TM (int64) is the group of a column that is the token's first in it, else -1;
    bits_TGB (uint8) the bitmap of each token and group; weight_TM (int64) row 3 of the table.

    Args:
        position_TM: int64, -1 where there is no assignment; none twice per token.
        table_4P: int64 [4, P + 1], by position the group, the byte among a token's G * B, the bit
            in it, and the weight's place; the last column is for -1.
        num_groups: G.
        bitmap_bytes: B.
    """
    if triton_support.serves(position_TM):
        from engine.ops.gpu.unique_rows import mark_groups_triton

        return mark_groups_triton(position_TM, table_4P, num_groups, bitmap_bytes)
    return mark_groups_reference(position_TM, table_4P, num_groups, bitmap_bytes)


def mark_groups_reference(
    position_TM: torch.Tensor, table_4P: torch.Tensor, num_groups: int, bitmap_bytes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain torch form of `mark_groups`."""
    num_tokens, columns = position_TM.shape
    group_TM, byte_TM, bit_TM, weight_TM = table_4P[:, position_TM]
    # A token's first column in a group represents its unique row there.
    column_TM = torch.arange(columns, device=position_TM.device).expand(num_tokens, -1)
    first_TG = column_TM.new_full((num_tokens, num_groups + 1), columns)
    first_TG.scatter_reduce_(1, group_TM, column_TM, "amin")
    is_first_TM = (first_TG.gather(1, group_TM) == column_TM) & (group_TM < num_groups)
    bits = torch.zeros(
        (num_tokens, num_groups * bitmap_bytes + 1), dtype=torch.int32, device=position_TM.device
    )
    bits.scatter_add_(1, byte_TM, bit_TM.int())  # a token has an expert once, so or is plus
    bits_TGB = bits[:, :-1].to(torch.uint8).view(num_tokens, num_groups, bitmap_bytes)
    return group_TM.where(is_first_TM, -1), bits_TGB, weight_TM


def count_groups(
    position_WTM: torch.Tensor, table_4P: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Return the unique rows of every rank's groups, int64 [W, G]; arguments as `mark_groups`."""
    if triton_support.serves(position_WTM):
        from engine.ops.gpu.unique_rows import count_groups_triton

        return count_groups_triton(position_WTM, table_4P, num_groups)
    return count_groups_reference(position_WTM, table_4P, num_groups)


def count_groups_reference(
    position_WTM: torch.Tensor, table_4P: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Plain torch form of `count_groups`."""
    # Sorted, so that a group's repetitions within a token are neighbours.
    group_WTM = table_4P[0][position_WTM].sort(dim=-1).values
    again_WTM = torch.zeros_like(group_WTM, dtype=torch.bool)
    again_WTM[..., 1:] = group_WTM[..., 1:] == group_WTM[..., :-1]
    group_WN = group_WTM.masked_fill(again_WTM, num_groups).flatten(1)
    count_WG = group_WN.new_zeros((position_WTM.shape[0], num_groups + 1))
    return count_WG.scatter_add_(1, group_WN, torch.ones_like(group_WN))[:, :-1]


def spread_weights(place_TM: torch.Tensor, weights_TM: torch.Tensor, size: int) -> torch.Tensor:
    """Return float32 [T, size] with each weight at its place, 0 elsewhere.

    Args:
        place_TM: int64 in 0 .. size; weights at `size` are left out. Others once per token.
        weights_TM: floats.
        size: numbers per token.
    """
    if triton_support.serves(weights_TM):
        from engine.ops.gpu.row_headers import spread_weights_triton

        return spread_weights_triton(place_TM, weights_TM, size)
    return spread_weights_reference(place_TM, weights_TM, size)


def spread_weights_reference(
    place_TM: torch.Tensor, weights_TM: torch.Tensor, size: int
) -> torch.Tensor:
    """Plain torch form of `spread_weights`."""
    flat = torch.zeros((weights_TM.shape[0], size + 1), device=weights_TM.device)
    return flat.scatter_(1, place_TM, weights_TM.float())[:, :-1]


def cells_of_rows(token_U: torch.Tensor, load_G: torch.Tensor) -> torch.Tensor:
    """Return t * G + g of each unique row, int64 [U].

    Args:
        token_U: int64, the token t of each row, group by group.
        load_G: int64, the rows of each group g; they sum to U.
    """
    if triton_support.serves(token_U):
        from engine.ops.gpu.row_headers import cells_of_rows_triton

        return cells_of_rows_triton(token_U, load_G)
    return cells_of_rows_reference(token_U, load_G)


def cells_of_rows_reference(token_U: torch.Tensor, load_G: torch.Tensor) -> torch.Tensor:
    """Plain torch form of `cells_of_rows`."""
    num_groups = load_G.numel()
    group_G = torch.arange(num_groups, device=token_U.device)
    group_U = group_G.repeat_interleave(load_G, output_size=token_U.numel())
    return token_U * num_groups + group_U


def pack_headers(
    cell_U: torch.Tensor,
    bits_CB: torch.Tensor,
    weights_Ce: torch.Tensor | None,
    out_UL: torch.Tensor,
    bits_at: int,
    weights_at: int,
) -> None:
    """Write the bitmap and the weights of each row's cell into packed rows.

    Args:
        cell_U: int64, the cell of each row.
        bits_CB: uint8.
        weights_Ce: float32; None: rows have none.
        out_UL: uint8, L a multiple of 4.
        bits_at: the byte where a row's bitmap begins.
        weights_at: the byte where its weights begin, a multiple of 4.
    """
    if triton_support.serves(out_UL):
        from engine.ops.gpu.row_headers import pack_headers_triton

        pack_headers_triton(cell_U, bits_CB, weights_Ce, out_UL, bits_at, weights_at)
    else:
        pack_headers_reference(cell_U, bits_CB, weights_Ce, out_UL, bits_at, weights_at)


def pack_headers_reference(
    cell_U: torch.Tensor,
    bits_CB: torch.Tensor,
    weights_Ce: torch.Tensor | None,
    out_UL: torch.Tensor,
    bits_at: int,
    weights_at: int,
) -> None:
    """Plain torch form of `pack_headers`."""
    out_UL[:, bits_at : bits_at + bits_CB.shape[1]].copy_(bits_CB.index_select(0, cell_U))
    if weights_Ce is not None:
        part = out_UL[:, weights_at : weights_at + 4 * weights_Ce.shape[1]]
        part.view(torch.float32).copy_(weights_Ce.index_select(0, cell_U))


def rows_by_expert(
    bits_VB: torch.Tensor, num_experts: int, num_rows: int, *, with_slots: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return where each expert's rows are among the received ones, from their bitmaps.

    Returns index_R, int64 [R], the received row of each assignment by expert, and slot_Ve, int64,
    the position of each received row in that order for each expert, -1 where it does not serve it.

    Args:
        bits_VB: uint8, each row without gaps.
        num_experts: e, of which bitmaps are read.
        num_rows: R, known from the exchanged counts; where bitmaps say otherwise, no index is out
            of bounds.
        with_slots: make slot_Ve, else None.
    """
    if triton_support.serves(bits_VB):
        from engine.ops.gpu.rows_by_expert import rows_by_expert_triton

        return rows_by_expert_triton(bits_VB, num_experts, num_rows, with_slots=with_slots)
    return rows_by_expert_reference(bits_VB, num_experts, num_rows, with_slots=with_slots)


def rows_by_expert_reference(
    bits_VB: torch.Tensor, num_experts: int, num_rows: int, *, with_slots: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Plain torch form of `rows_by_expert`."""
    num_received = bits_VB.shape[0]
    flags = read_bits(bits_VB, num_experts).flatten()
    position = flags.cumsum(0) - 1
    source = torch.arange(num_received, device=flags.device).repeat(num_experts)
    # One entry more takes what is no assignment. Zeros, so that no index is out of bounds.
    index = position.new_zeros(num_rows + 1)
    index.scatter_(0, position.where(flags, num_rows).clamp(max=num_rows), source)
    if not with_slots:
        return index[:num_rows], None
    slot_eV = position.where(flags, -1).view(num_experts, num_received)
    return index[:num_rows], slot_eV.t().contiguous()


def read_bits(bits_VB: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return bitmaps by expert, bool [e, V]. bits_VB: uint8, any strides."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits_VB.device)
    flags_VB8 = (bits_VB[:, :, None] >> shifts) & 1
    return flags_VB8.flatten(1)[:, :num_experts].t().contiguous().bool()
