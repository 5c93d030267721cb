"""Chunk layout: how a call's rows are cut into chunks, so that they can be overlapped.

    compute    pack 0  pack 1 | experts 0 | experts 1  | experts 2  |           | weigh
    network            | disp 0 | disp 1  | comb 0, disp 2 | comb 1 | comb 2    |

Two ways to cut (`moe.overlap.by`):

    experts   chunk j holds the j-th part of every rank's experts. An expert's rows stay together,
              so its matrix products are as large as without chunks and its results the same bit
              for bit. A rank with one expert (Mixtral on 8 ranks) has nothing to cut.
    tokens    chunk j holds the j-th part of every rank's tokens, with all their experts. Always
              possible, but every chunk reads all weights, and an expert's rows come in several
              products: bit for bit the same where a product's rows do not depend on each other
              (the native CPU kernel), otherwise up to the rounding of the library's kernels.

All ranks start the same collectives in the same order: dispatch 0, dispatch 1, combine 0,
dispatch 2, combine 1, ... On CUDA they run on NCCL's own stream, which waits for the compute stream
where a collective is started; waiting for one holds up the compute stream and not the host. On gloo
they are handles that background threads work on.

A layout also decides on deduplication (`dedup.py`): what every rank needs to know of the others,
`ExpertOrder.counts_to_exchange`, holds their unique rows after their loads, and from the exchanged
counts `plans` takes what moves fewer bytes, the same on every rank.

Worked example, 2 ranks, experts 0 1 2 on rank 0 and 3 4 on rank 1, two chunks of experts: rank 0
cuts 0 | 1 2, rank 1 cuts 3 | 4. The send order of experts is 0 3 | 1 2 4. In two chunks of tokens,
rank 0 with 5 tokens cuts t0 t1 | t2 t3 t4, a rank with one token none | t0, and experts are sent in
the order 0 1 2 3 4 twice.

Legend: T tokens, M columns of the ids, E experts, C chunks, W ranks, P positions (experts in send
order, C * E of them for chunks of tokens), G groups (C * W), D model dim, n counts per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from engine.moe.dispatch.dedup import Deduplicator, UniqueRows
from engine.moe.dispatch.plan import DispatchPlan, ExpertOrder, UniquePlan, make_plan
from engine.moe.dispatch.row_format import RowFormat, RowFormats
from engine.moe.dispatch.shared_rows import SharedRows
from engine.ops import sort_by_expert as sort_op
from engine.ops.to_device import to_device
from engine.ops.unique_rows import cells_of_rows

Granularity = Literal["experts", "tokens"]  # what is cut into chunks

# Rows per chunk on the mean rank from which a chunk pays: below, its collectives cost more than
# they hide. 256 rows of 512 floats are 0.5 MB, a millisecond on a 4 Gbit/s link.
MIN_CHUNK_ROWS = 256


def fills_chunks(group_rows: int, num_ranks: int, num_chunks: int, least_rows: float = 0.0) -> bool:
    """Return whether `group_rows` rows over all ranks give each chunk of the mean rank at least
    MIN_CHUNK_ROWS, and `least_rows`, from which it pays on a link that was measured.
    """
    return group_rows >= max(MIN_CHUNK_ROWS, least_rows) * num_chunks * num_ranks


@dataclass(frozen=True, slots=True)
class Chunk:
    """One part of the positions."""

    columns: slice  # its positions
    bounds: list[int]  # W + 1 boundaries between the ranks inside it
    local_starts: list[int]  # the first local expert of each rank


class ExpertLayout:
    """The send order of experts' rows: chunk by chunk, within a chunk rank by rank.

    Args:
        first_experts: W + 1 boundaries, rank w hosts first_experts[w] .. first_experts[w + 1] - 1.
        num_chunks: how many to cut; of experts at most the most experts of a rank, 1 on one rank.
        by: what is cut.
        rows: the formats that rows may be sent in; None: unpacked.
        deduplicate: count unique rows, and send those where that moves fewer bytes.
        shared: lets shared rows move with unique rows that are pre-reduced; None: they stay.
    """

    def __init__(
        self,
        first_experts: list[int],
        num_chunks: int,
        by: Granularity = "experts",
        rows: RowFormats | None = None,
        *,
        deduplicate: bool = False,
        shared: SharedRows | None = None,
    ) -> None:
        self.first_experts, sizes = first_experts, np.diff(first_experts)
        self._num_ranks, self._num_experts = len(sizes), first_experts[-1]
        limit = num_chunks if by == "tokens" else int(sizes.max())
        self.num_chunks = 1 if self._num_ranks == 1 else max(1, min(num_chunks, limit))
        self.by_tokens = by == "tokens" and self.num_chunks > 1
        self.chunks: list[Chunk] = []
        experts: list[int] = []
        for index in range(self.num_chunks):
            begin, bounds, starts = len(experts), [0], []
            for first, size in zip(first_experts, sizes.tolist(), strict=False):
                parts = (0, self.num_chunks) if self.by_tokens else (index, index + 1)
                start, end = (size * part // self.num_chunks for part in parts)
                experts += range(first + start, first + end)
                bounds.append(len(experts) - begin)
                starts.append(start)
            self.chunks.append(Chunk(slice(begin, len(experts)), bounds, starts))
        self._experts = np.array(experts)
        self._tables: dict[torch.device, torch.Tensor] = {}
        self._rows = rows
        self._format: RowFormat | None = None  # of rows sent once per assignment
        if rows is not None and self._num_ranks > 1:
            self._format = rows.per_assignment()
        self._groups: Deduplicator | None = None
        self._shared: SharedRows | None = None
        self._unique_format: RowFormat | None = None
        if deduplicate and rows is not None and self._num_ranks > 1:
            bounds = [chunk.bounds for chunk in self.chunks]
            self._shared = shared if rows.pre_reduced else None
            sizes = np.diff(bounds).ravel().tolist()
            self._groups = groups = Deduplicator(sizes, has_shared=self.moves_shared)
            self._unique_format = rows.deduplicated(groups.most_experts, groups.num_bytes)

    @property
    def deduplicates(self) -> bool:
        """Whether unique rows are counted."""
        return self._groups is not None

    @property
    def moves_shared(self) -> bool:
        """Whether shared rows may move."""
        return self._shared is not None

    @property
    def group_sizes(self) -> list[int]:
        """Experts of the groups that one token's rows may be sent to."""
        chunks = self.chunks[:1] if self.by_tokens else self.chunks
        return [int(size) for chunk in chunks for size in np.diff(chunk.bounds)]

    @property
    def unique_row_bytes(self) -> int:
        """Bytes of a dispatched unique row, 0 where they are not counted."""
        return 0 if self._unique_format is None else self._unique_format.row_bytes

    @property
    def has_extra_counts(self) -> bool:
        """Whether ranks exchange more than their loads by expert."""
        return self.by_tokens or self.deduplicates

    @property
    def sends_plain_rows(self) -> bool:
        """Whether rows are sent in the model's dtype, once per assignment, whatever the counts."""
        return self._format is None and not self.deduplicates

    def is_worthwhile(self, group_tokens: int, top_k: int, least_rows: float = 0.0) -> bool:
        """Return whether a step of so many tokens over all ranks is worth cutting."""
        return fills_chunks(group_tokens * top_k, self._num_ranks, self.num_chunks, least_rows)

    def sort(self, ids_TM: torch.Tensor) -> ExpertOrder:
        """Sort this rank's assignments into the send order; `load_E` stays by expert.

        ids_TM: int64, -1 where an assignment is dropped.
        """
        position_TM = self._positions(ids_TM[None], [ids_TM.shape[0]])[0]
        token_N, slot_TM, load_P = sort_op.sort_by_expert(position_TM, len(self._experts))
        load_E = load_P
        if self.by_tokens:
            load_E = load_P.view(self.num_chunks, -1).sum(0)
        elif self.num_chunks > 1:
            load_E = load_P = load_P[self._table(ids_TM.device)[:-1]]
        if self._groups is None:
            return ExpertOrder(token_N, slot_TM, load_E, load_P)
        unique = self._groups.unique(position_TM)
        if self._shared is None:
            counts = torch.cat((load_P, unique.load_G))
            return ExpertOrder(token_N, slot_TM, load_E, counts, unique)
        group_TM, num_groups = self._groups.group_of(position_TM), self._groups.num_groups
        found = self._shared.candidates(group_TM, num_groups, self._num_ranks)
        unique = replace(unique, candidates=found)
        num_1 = load_P.new_full((1,), ids_TM.shape[0])
        counts = torch.cat((load_P, unique.load_G, found.count_G, num_1))
        return ExpertOrder(token_N, slot_TM, load_E, counts, unique)

    def counts_to_exchange(
        self, ids_WTM: torch.Tensor, num_tokens_W: Sequence[int]
    ) -> torch.Tensor:
        """Return what `sort` would have every rank exchange, int64 [W, n], from all ranks' ids.

        ids_WTM: int64, -1 where there is none; num_tokens_W: how many rows are tokens, per rank.
        """
        position_WTM = self._positions(ids_WTM, num_tokens_W)
        position_WN = position_WTM.flatten(1)
        position_WN = position_WN.where(position_WN >= 0, len(self._experts))
        load_WP = position_WN.new_zeros((len(position_WN), len(self._experts) + 1))
        load_WP = load_WP.scatter_add_(1, position_WN, torch.ones_like(position_WN))[:, :-1]
        if not self.by_tokens and self.num_chunks > 1:
            load_WP = load_WP[:, self._table(ids_WTM.device)[:-1]]
        if self._groups is None:
            return load_WP
        counts = [load_WP, self._groups.count(position_WTM)]
        if self._shared is not None:
            group_WTM = self._groups.group_of(position_WTM)
            counts.append(self._shared.count(group_WTM, self._groups.num_groups))
            counts.append(to_device(torch.tensor(num_tokens_W), ids_WTM.device)[:, None])
        return torch.cat(counts, dim=1)

    def loads(self, exchanged_Wn: np.ndarray) -> np.ndarray:
        """Return the rows that each rank has for each expert, int64 [W, E], from the counts."""
        if not self.by_tokens:
            return exchanged_Wn[:, : self._num_experts]
        load_WP = exchanged_Wn[:, : len(self._experts)]
        return load_WP.reshape(len(load_WP), self.num_chunks, -1).sum(1)

    def first_slots(self, load_E: np.ndarray) -> np.ndarray:
        """Return the first slot of each expert's rows in an order that `sort` made, int64 [E]. Not
        for chunks of tokens, which have an expert's rows in several places.

        load_E: int64, this rank's rows.
        """
        assert not self.by_tokens
        load_P = load_E[self._experts]
        first_E = np.empty_like(load_E)
        first_E[self._experts] = load_P.cumsum() - load_P
        return first_E

    def plans(self, order: ExpertOrder, exchanged_Wn: np.ndarray, rank: int) -> list[DispatchPlan]:
        """Return one plan per chunk from every rank's counts; pure. A plan's `order` is its own."""
        counts_WP = self.by_position(exchanged_Wn)
        found: list[DispatchPlan] = []
        sent = 0
        for chunk in self.chunks:
            plan = self.chunk_plan(order, order.token_N[sent:], counts_WP, chunk, rank)
            found.append(plan)
            sent += sum(plan.send_splits)
        if self._groups is None or order.unique is None:
            return found
        return self._deduplicate(found, order.unique, exchanged_Wn, counts_WP, rank)

    def by_position(self, exchanged_Wn: np.ndarray) -> np.ndarray:
        """Return the rows of each rank for each position, int64 [W, P], from the counts."""
        counts_WP = exchanged_Wn[:, : len(self._experts)]
        return counts_WP if self.num_chunks == 1 or self.by_tokens else counts_WP[:, self._experts]

    def chunk_plan(
        self,
        order: ExpertOrder,
        token_N: torch.Tensor,
        counts_WP: np.ndarray,
        chunk: Chunk,
        rank: int,
    ) -> DispatchPlan:
        """Return the plan of one chunk, its rows sent once per assignment; pure.

        Args:
            order: of the whole call.
            token_N: int64, the tokens of the chunk's rows, and perhaps others behind them.
            counts_WP: as `by_position` returns them.
        """
        rest = ExpertOrder(token_N, order.slot_TK, order.load_E)
        plan = make_plan(rest, counts_WP[:, chunk.columns], rank, chunk.bounds)
        num_local = self.first_experts[rank + 1] - self.first_experts[rank]
        before = chunk.local_starts[rank]
        after = num_local - before - len(plan.expert_counts)
        if before or after or self._format is not None:
            expert_counts = [0] * before + plan.expert_counts + [0] * after
            plan = replace(plan, expert_counts=expert_counts, row_format=self._format)
        return plan

    def _deduplicate(
        self,
        plans: list[DispatchPlan],
        unique: UniqueRows,
        exchanged_Wn: np.ndarray,
        counts_WP: np.ndarray,
        rank: int,
    ) -> list[DispatchPlan]:
        """Return the plans with unique rows where these move fewer bytes, by the counts of all."""
        groups, rows, row_format = self._groups, self._rows, self._unique_format
        assert groups is not None and rows is not None and row_format is not None
        num_ranks, begin, count = self._num_ranks, len(self._experts), groups.num_groups
        unique_WCW = exchanged_Wn[:, begin : begin + count].reshape(num_ranks, -1, num_ranks)
        bounds = [part.columns.start + bound for part in self.chunks for bound in part.bounds[:-1]]
        upto_WP = np.concatenate((np.zeros((num_ranks, 1), np.int64), counts_WP.cumsum(1)), axis=1)
        assigned_WCW = np.diff(upto_WP[:, [*bounds, -1]]).reshape(unique_WCW.shape)
        # Only rows for other ranks count: a rank's own are not sent, and others may not know of its
        # extras.
        remote = ~np.eye(num_ranks, dtype=bool)[:, None]
        num_assigned = int(assigned_WCW.sum(where=remote))
        num_unique = int(unique_WCW.sum(where=remote))
        num_combined = num_unique if rows.pre_reduced else num_assigned
        unique_bytes = num_unique * row_format.row_bytes + num_combined * rows.combine_bytes
        if unique_bytes >= num_assigned * (rows.dispatch_bytes + rows.combine_bytes):
            return plans
        token_U = unique.token_U[: int(unique_WCW[rank].sum())]
        cell_U = cells_of_rows(token_U, unique.load_G)
        found, sent, moves = [], 0, None
        moved_WCW = np.zeros_like(unique_WCW)
        if self._shared is not None and unique.candidates is not None:
            candidates_WG = exchanged_Wn[:, begin + count : begin + 2 * count]
            moved_WG = self._shared.plan(
                assigned_WCW.reshape(num_ranks, -1), candidates_WG, exchanged_Wn[:, -1]
            )
            moved_WCW = moved_WG.reshape(unique_WCW.shape)
            moves = self._shared.moves(
                unique.candidates, candidates_WG, moved_WG, groups.size_of_groups(token_U.device)
            )
        for index, (plan, chunk) in enumerate(zip(plans, self.chunks, strict=True)):
            send_splits = unique_WCW[rank, index].tolist()
            part = slice(sent, sent := sent + sum(send_splits))
            rows_of_chunk = UniquePlan(
                rows=unique,
                groups=groups,
                token_U=token_U[part],
                cell_U=cell_U[part],
                send_splits=send_splits,
                recv_splits=unique_WCW[:, index, rank].tolist(),
                num_experts=chunk.bounds[rank + 1] - chunk.bounds[rank],
                num_shared=int(moved_WCW[:, index, rank].sum()),
                moves=moves,
            )
            found.append(replace(plan, row_format=row_format, unique=rows_of_chunk))
        return found

    def _positions(self, ids_WTM: torch.Tensor, num_tokens_W: Sequence[int]) -> torch.Tensor:
        """Return the position of every rank's assignments in the send order, -1 for none."""
        if self.num_chunks == 1:
            return ids_WTM
        if not self.by_tokens:
            return self._table(ids_WTM.device)[ids_WTM]
        device, num_rows = ids_WTM.device, ids_WTM.shape[1]
        token_T = torch.arange(1, num_rows + 1, device=device)
        # Chunk j of T tokens is [T * j // C, T * (j + 1) // C).
        num_W = to_device(torch.tensor([max(num, 1) for num in num_tokens_W]), device)
        chunk_WT = (token_T * self.num_chunks - 1) // num_W[:, None]
        position_WTM = ids_WTM + self._num_experts * chunk_WT[:, :, None]
        return position_WTM.where(ids_WTM >= 0, -1)

    def _table(self, device: torch.device) -> torch.Tensor:
        """Return the position of each expert in the send order, int64 [E + 1], last entry -1."""
        if device not in self._tables:
            position = np.full(len(self._experts) + 1, -1)
            position[self._experts] = np.arange(len(self._experts))
            self._tables[device] = to_device(torch.from_numpy(position), device)
        return self._tables[device]
