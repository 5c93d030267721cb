"""Deduplication: a token whose experts share a rank sends its row there once.

Top-8 of 64 experts on 8 ranks touch 5.4 ranks on average: a third of the rows would be copies. The
places of `overlap.py` (experts in the order of travel) fall into groups, one a chunk and rank; a
*unique row* is a (token, group) pair. With each unique row goes a bitmap of the group's experts
that it serves, bit i of byte b for the group's expert 8 b + i, so that the receiver finds the rows
of its experts without asking anybody. It keeps them in the order in which they would have arrived
one by one: by expert, then by source rank, then by token. So results are the same bit for bit.

Worked example, one chunk, experts 0 1 2 on rank 0 and 3 4 on rank 1, ids [[0, 2], [4, 1], [-1, 4]]:
    unique rows   t0 (e0 e2) and t1 (e1) to rank 0; t1 (e4) and t2 (e4) to rank 1
    token_U       [0, 1, 1, 2]         load_G [2, 2]
    bits          0b101, 0b010, 0b10, 0b10
    rank 0 reads  e0: row 0, e1: row 1, e2: row 0      index_R [0, 1, 0]

Where a token's experts share no rank (one expert a rank, top-1, one rank) there is nothing to save;
`worth_trying` says in advance whether a step's rows are many enough for the work of finding out,
and `overlap.py` decides from the exchanged counts whether a call's rows travel once or each.

Legend: T tokens on this rank, M columns of the ids, P places, G groups, U unique rows sent, V
unique rows received, R assignments received, e experts of the group, B bytes of a bitmap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.ops import sort_by_expert as sort_op
from engine.ops.to_device import to_device


@dataclass(frozen=True, slots=True)
class UniqueRows:
    """One rank's unique rows; device tensors only, no host sync.

    token_U: int64, the token of each row by group, then by token; the places past the rows mean
    nothing. slot_TM: int64, the row of a token's group at the group's first column, -1 elsewhere.
    load_G: int64, rows of each group. bits_TGB: uint8 [T, G, B]. weight_TM: int64, the place of
    each assignment's combine weight among a token's G * e, G * e itself where it is dropped.
    """

    token_U: torch.Tensor
    slot_TM: torch.Tensor
    load_G: torch.Tensor
    bits_TGB: torch.Tensor
    weight_TM: torch.Tensor


class Deduplicator:
    """Finds unique rows. sizes: experts of each group, in the order of the places.

    most_experts: e of the largest group. num_bytes: B.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.num_groups, self.most_experts = len(sizes), max(sizes)
        self.num_bytes = -(-self.most_experts // 8)
        group_P = [group for group, size in enumerate(sizes) for _ in range(size)]
        offset_P = [offset for size in sizes for offset in range(size)]
        # The last entry of each serves place -1.
        self._host = [
            [*group_P, self.num_groups],
            [
                *(g * self.num_bytes + o // 8 for g, o in zip(group_P, offset_P, strict=True)),
                self.num_groups * self.num_bytes,
            ],
            [*(1 << offset % 8 for offset in offset_P), 0],
            [
                *(g * self.most_experts + o for g, o in zip(group_P, offset_P, strict=True)),
                self.num_groups * self.most_experts,
            ],
        ]
        self._tables: dict[torch.device, torch.Tensor] = {}

    def unique(self, place_TM: torch.Tensor) -> UniqueRows:
        """Find this rank's unique rows. place_TM: int64, -1 where there is no assignment."""
        num_tokens, columns = place_TM.shape
        num_groups = self.num_groups
        group_TM, byte_TM, bit_TM, weight_TM = self._table(place_TM.device)[:, place_TM]
        column_TM = torch.arange(columns, device=place_TM.device).expand(num_tokens, -1)
        first_TG = column_TM.new_full((num_tokens, num_groups + 1), columns)
        first_TG.scatter_reduce_(1, group_TM, column_TM, "amin")
        leads_TM = (first_TG.gather(1, group_TM) == column_TM) & (group_TM < num_groups)
        token_U, slot_TM, load_G = sort_op.sort_by_expert(group_TM.where(leads_TM, -1), num_groups)
        bits = torch.zeros(
            (num_tokens, num_groups * self.num_bytes + 1), dtype=torch.int32, device=place_TM.device
        )
        bits.scatter_add_(1, byte_TM, bit_TM.int())  # an expert comes once a token: or is plus
        bits_TGB = bits[:, :-1].to(torch.uint8).view(num_tokens, num_groups, self.num_bytes)
        return UniqueRows(token_U, slot_TM, load_G, bits_TGB, weight_TM)

    def count(self, place_WTM: torch.Tensor) -> torch.Tensor:
        """Unique rows of every rank's groups: int64 [W, G]. place_WTM: int64, -1 for nothing."""
        num_ranks = place_WTM.shape[0]
        group_WTM = self._table(place_WTM.device)[0][place_WTM].sort(dim=-1).values
        again_WTM = torch.zeros_like(group_WTM, dtype=torch.bool)
        again_WTM[..., 1:] = group_WTM[..., 1:] == group_WTM[..., :-1]
        group_WN = group_WTM.masked_fill(again_WTM, self.num_groups).flatten(1)
        count_WG = group_WN.new_zeros((num_ranks, self.num_groups + 1))
        return count_WG.scatter_add_(1, group_WN, torch.ones_like(group_WN))[:, :-1]

    def weights(self, unique: UniqueRows, weights_TM: torch.Tensor) -> torch.Tensor:
        """Combine weights by group and expert of the group: float32 [T, G, e], 0 elsewhere."""
        num_tokens = weights_TM.shape[0]
        size = self.num_groups * self.most_experts
        flat = torch.zeros((num_tokens, size + 1), device=weights_TM.device)
        flat.scatter_(1, unique.weight_TM, weights_TM.float())
        return flat[:, :-1].view(num_tokens, self.num_groups, self.most_experts)

    def _table(self, device: torch.device) -> torch.Tensor:
        """Of every place its group, byte, bit and weight: int64 [4, P + 1]."""
        if device not in self._tables:
            self._tables[device] = to_device(torch.tensor(self._host), device)
        return self._tables[device]


def read_bits(bits_VB: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The bitmaps of arrived rows, expert by expert: bool [e, V]; bits_VB: uint8, any strides."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits_VB.device)
    flags_VB8 = (bits_VB[:, :, None] >> shifts) & 1
    return flags_VB8.flatten(1)[:, :num_experts].t().contiguous().bool()


def rows_by_expert(flags_eV: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the experts find their rows: index_R, int64 [num_rows], the arrived row of each
    assignment by expert; slot_Ve, int64, each row's place in that order for each expert, -1 for
    none. num_rows: R, known from the exchanged counts.
    """
    num_experts, num_arrived = flags_eV.shape
    flags = flags_eV.flatten()
    place = flags.cumsum(0) - 1
    source = torch.arange(num_arrived, device=flags.device).repeat(num_experts)
    # The entry past the end takes what is no assignment. Zeros, so that no index is ever wild.
    index = place.new_zeros(num_rows + 1)
    index.scatter_(0, place.where(flags, num_rows).clamp(max=num_rows), source)
    slot_eV = place.where(flags, -1).view(num_experts, num_arrived)
    return index[:num_rows], slot_eV.t().contiguous()


def expected_unique(sizes: Sequence[int], top_k: int) -> float:
    """Unique rows of a token on average where every choice of experts is as likely.

    sizes: experts of each group.
    """
    total = sum(sizes)
    all_choices = math.comb(total, top_k)
    return sum(1 - math.comb(total - size, top_k) / all_choices for size in sizes)
