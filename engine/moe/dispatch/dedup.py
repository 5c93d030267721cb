"""Deduplication: a token whose experts share a rank is sent there once.

Top-8 of 64 experts on 8 ranks touch 5.4 ranks on average: a third of the rows would be copies. The
positions of `chunk_layout.py` (experts in send order) form groups, one per chunk and rank; a
*unique row* is a (token, group) pair. Each is sent with a bitmap of the group's experts that it
serves, bit i of byte b for the group's expert 8 b + i, from which the receiver finds the rows of
its experts without another collective. It orders them as if they had been sent one per assignment:
by expert, then by source rank, then by token. So results are the same bit for bit.

Worked example, one chunk, experts 0 1 2 on rank 0 and 3 4 on rank 1, ids [[0, 2], [4, 1], [-1, 4]]:
    unique rows   t0 (e0 e2) and t1 (e1) to rank 0; t1 (e4) and t2 (e4) to rank 1
    token_U       [0, 1, 1, 2]         load_G [2, 2]
    bits          0b101, 0b010, 0b10, 0b10
    rank 0 reads  e0: row 0, e1: row 1, e2: row 0      index_R [0, 1, 0]

Where a token's experts share no rank (one expert per rank, top-1, one rank) there is nothing to
save. `layout_policy.py` decides in advance whether a step has rows enough for counting them to pay,
and `chunk_layout.py` from the exchanged counts whether a call's rows are sent deduplicated.

Legend: T tokens on this rank, M columns of the ids, P positions, G groups, U unique rows sent, R
assignments received, e experts of the group, B bytes of a bitmap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.moe.dispatch.shared_rows import Candidates
from engine.ops import sort_by_expert as sort_op
from engine.ops import unique_rows
from engine.ops.to_device import to_device


@dataclass(frozen=True, slots=True)
class UniqueRows:
    """One rank's unique rows; device tensors only, no host sync."""

    token_U: torch.Tensor  # int64, the token of each row by group, then token; undefined at the end
    slot_TM: torch.Tensor  # int64, the row of a token's group at the group's first column, else -1
    load_G: torch.Tensor  # int64, rows of each group
    bits_TGB: torch.Tensor  # uint8, the bitmap of each token and group
    # int64, the position of each assignment's weight among a token's G * e; G * e where dropped
    weight_TM: torch.Tensor
    candidates: Candidates | None = None  # of shared rows that may move; None: all stay


class Deduplicator:
    """Finds unique rows.

    Args:
        sizes: experts of each group, in the order of the positions.
        has_shared: leave a bit and a weight for the shared expert behind each group's experts.
    """

    def __init__(self, sizes: Sequence[int], *, has_shared: bool = False) -> None:
        self.num_groups = len(sizes)
        self.most_experts = max(sizes) + has_shared  # e of the largest group
        self._sizes = list(sizes)
        self.num_bytes = -(-self.most_experts // 8)  # B
        group_P = [group for group, size in enumerate(sizes) for _ in range(size)]
        offset_P = [offset for size in sizes for offset in range(size)]
        # Position -1, a dropped assignment, reads the last entry of each table.
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
        self._size_G: dict[torch.device, torch.Tensor] = {}

    def unique(self, position_TM: torch.Tensor) -> UniqueRows:
        """Return this rank's unique rows. position_TM: int64, -1 where there is no assignment."""
        num_groups, table = self.num_groups, self._table(position_TM.device)
        first_group_TM, bits_TGB, weight_TM = unique_rows.mark_groups(
            position_TM, table, num_groups, self.num_bytes
        )
        token_U, slot_TM, load_G = sort_op.sort_by_expert(first_group_TM, num_groups)
        return UniqueRows(token_U, slot_TM, load_G, bits_TGB, weight_TM)

    def first_groups(self, position_TM: torch.Tensor) -> torch.Tensor:
        """Return the group of each position that is the first of its token there, int64 [T, M]; -1
        for others.
        """
        table = self._table(position_TM.device)
        return unique_rows.mark_groups(position_TM, table, self.num_groups, self.num_bytes)[0]

    def count(self, position_WTM: torch.Tensor) -> torch.Tensor:
        """Return the unique rows of every rank's groups, int64 [W, G].

        position_WTM: int64, -1 where there is no assignment.
        """
        table = self._table(position_WTM.device)
        return unique_rows.count_groups(position_WTM, table, self.num_groups)

    def weights(self, unique: UniqueRows, weights_TM: torch.Tensor) -> torch.Tensor:
        """Return the combine weights by group and its experts, float32 [T, G, e], 0 elsewhere."""
        num_tokens = weights_TM.shape[0]
        size = self.num_groups * self.most_experts
        flat = unique_rows.spread_weights(unique.weight_TM, weights_TM, size)
        return flat.view(num_tokens, self.num_groups, self.most_experts)

    def group_of(self, position_TM: torch.Tensor) -> torch.Tensor:
        """Return the group of each position, int64 [T, M], G where there is no assignment."""
        return self._table(position_TM.device)[0][position_TM]

    def size_of_groups(self, device: torch.device) -> torch.Tensor:
        """Return the experts of each group, int64 [G]."""
        if device not in self._size_G:
            self._size_G[device] = to_device(torch.tensor(self._sizes), device)
        return self._size_G[device]

    def _table(self, device: torch.device) -> torch.Tensor:
        """Return the group, byte, bit and weight of every position, int64 [4, P + 1]."""
        if device not in self._tables:
            self._tables[device] = to_device(torch.tensor(self._host), device)
        return self._tables[device]


def expected_unique(sizes: Sequence[int], top_k: int) -> float:
    """Return the mean unique rows per token where every choice of experts is equally likely.

    sizes: experts of each group.
    """
    total = sum(sizes)
    all_choices = math.comb(total, top_k)
    return sum(1 - math.comb(total - size, top_k) / all_choices for size in sizes)
