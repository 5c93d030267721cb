"""Overlap: the layer's rows travel in chunks, so that one chunk's experts work while others travel.

    compute    pack 0  pack 1 | experts 0 | experts 1 | experts 2 |        | weigh
    network            | out 0  | out 1   | back 0, out 2 | back 1 | back 2 |

Two ways to cut (`moe.overlap.by`):

    experts   chunk j holds the j-th part of every rank's experts. An expert's rows stay together,
              so its matrix products are as large as without chunks and its results the same bit
              for bit. A rank with one expert (Mixtral on 8 ranks) has nothing to cut.
    tokens    chunk j holds the j-th part of every rank's tokens, with all their experts. Always
              possible, but every chunk reads all weights, and an expert's rows come in several
              products: bit for bit the same where a product's rows do not depend on each other
              (the native CPU kernel), otherwise up to the rounding of the library's kernels.

All ranks start the same collectives in the same order: out 0, out 1, back 0, out 2, back 1, ... On
CUDA they run on NCCL's own stream, which waits for the compute stream where a collective is
started, and a wait holds up the compute stream and not the host. On gloo they are handles that
background threads work on.

A layout is also where deduplication (`dedup.py`) is decided: what every rank must know of the
others, `ExpertOrder.numbers`, carries their unique rows beside their loads, and once a call's
numbers are there `plans` takes what moves fewer bytes, the same on every rank.

Worked example, 2 ranks, experts 0 1 2 on rank 0 and 3 4 on rank 1, two chunks of experts: rank 0
cuts 0 | 1 2, rank 1 cuts 3 | 4. Rows travel in the order of experts 0 3 | 1 2 4. In two chunks of
tokens, rank 0 with 5 tokens cuts t0 t1 | t2 t3 t4, a rank with one token none | t0, and experts
travel in the order 0 1 2 3 4 twice.

Legend: T tokens, M columns of the ids, E experts, C chunks, W ranks, P places (experts in the order
of travel, C * E of them for chunks of tokens), G groups (C * W), A rows sent, R rows received, D
model dim, n numbers of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from engine.moe.dispatch.dedup import Deduplicator, UniqueRows
from engine.moe.dispatch.plan import (
    DispatchPlan,
    ExpertOrder,
    UniquePlan,
    make_plan,
    sort_by_expert,
)
from engine.moe.dispatch.row_format import RowFormat, RowFormats
from engine.ops.to_device import to_device

By = Literal["experts", "tokens"]

# Rows of a chunk on the mean rank from which it pays: below, the collectives cost more than they
# hide. 256 rows of 512 floats are 0.5 MB, a millisecond on a 4 Gbit/s link.
MIN_CHUNK_ROWS = 256


def fills_chunks(group_rows: int, num_ranks: int, num_chunks: int) -> bool:
    """Return whether `group_rows` rows over all ranks give each chunk of the mean rank at least
    MIN_CHUNK_ROWS.
    """
    return group_rows >= MIN_CHUNK_ROWS * num_chunks * num_ranks


@dataclass(frozen=True, slots=True)
class Chunk:
    """One part of the places. columns: where they stand in the order of travel. bounds: W + 1
    boundaries between the ranks inside it. local_starts: the first local expert of each rank.
    """

    columns: slice
    bounds: list[int]
    local_starts: list[int]


class ExpertLayout:
    """In which order experts' rows travel: chunk after chunk, in a chunk rank after rank.

    first_experts: W + 1 boundaries, rank w hosts first_experts[w] .. first_experts[w + 1] - 1.
    num_chunks: as many as asked for, of experts at most the most experts of a rank; 1 on one rank.
    by: what is cut. rows: how rows travel; as they are by default. deduplicate: count unique rows,
    and send those where that moves fewer bytes.
    """

    def __init__(
        self,
        first_experts: list[int],
        num_chunks: int,
        by: By = "experts",
        rows: RowFormats | None = None,
        *,
        deduplicate: bool = False,
    ) -> None:
        sizes = np.diff(first_experts)
        self.first_experts = first_experts
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
        self._places: dict[torch.device, torch.Tensor] = {}
        self._rows = rows
        self._each: RowFormat | None = None
        if rows is not None and self._num_ranks > 1:
            self._each = rows.each()
        self._dedup: Deduplicator | None = None
        self._once_wire: RowFormat | None = None
        if deduplicate and rows is not None and self._num_ranks > 1:
            bounds = [chunk.bounds for chunk in self.chunks]
            self._dedup = groups = Deduplicator(np.diff(bounds).ravel().tolist())
            self._once_wire = rows.once(groups.most_experts, groups.num_bytes)

    @property
    def deduplicates(self) -> bool:
        """Whether unique rows are counted."""
        return self._dedup is not None

    @property
    def group_sizes(self) -> list[int]:
        """Experts of the groups that one token's rows may go to."""
        chunks = self.chunks[:1] if self.by_tokens else self.chunks
        return [int(size) for chunk in chunks for size in np.diff(chunk.bounds)]

    @property
    def unique_row_bytes(self) -> int:
        """Bytes of a unique row on the way out, 0 where they are not counted."""
        return 0 if self._once_wire is None else self._once_wire.row_bytes

    @property
    def has_extra_counts(self) -> bool:
        """Whether ranks must know more of each other than their loads by expert."""
        return self.by_tokens or self.deduplicates

    def pays(self, group_tokens: int, top_k: int) -> bool:
        """Whether a step of so many tokens over all ranks is worth cutting up."""
        return fills_chunks(group_tokens * top_k, self._num_ranks, self.num_chunks)

    def sort(self, ids_TM: torch.Tensor) -> ExpertOrder:
        """Sort this rank's assignments into the order of travel; load_E is by expert as ever.

        ids_TM: int64, -1 where an assignment is dropped.
        """
        place_TM = self._place(ids_TM[None], [ids_TM.shape[0]])[0]
        order = sort_by_expert(place_TM, len(self._experts))
        load_E = load_P = order.load_E
        if self.by_tokens:
            load_E = load_P.view(self.num_chunks, -1).sum(0)
        elif self.num_chunks > 1:
            load_E = load_P = load_P[self._table(ids_TM.device)[:-1]]
        if self._dedup is None:
            return ExpertOrder(order.token_N, order.slot_TK, load_E, load_P)
        unique = self._dedup.unique(place_TM)
        numbers = torch.cat((load_P, unique.load_G))
        return ExpertOrder(order.token_N, order.slot_TK, load_E, numbers, unique)

    def numbers(self, ids_WTM: torch.Tensor, num_tokens_W: Sequence[int]) -> torch.Tensor:
        """What `sort` tells of every rank, from all ranks' ids: int64 [W, n].

        ids_WTM: int64, -1 where there is no assignment; of rank w the first num_tokens_W[w] rows.
        """
        place_WTM = self._place(ids_WTM, num_tokens_W)
        place_WN = place_WTM.flatten(1)
        place_WN = place_WN.where(place_WN >= 0, len(self._experts))
        load_WP = place_WN.new_zeros((len(place_WN), len(self._experts) + 1))
        load_WP = load_WP.scatter_add_(1, place_WN, torch.ones_like(place_WN))[:, :-1]
        if not self.by_tokens and self.num_chunks > 1:
            load_WP = load_WP[:, self._table(ids_WTM.device)[:-1]]
        if self._dedup is None:
            return load_WP
        return torch.cat((load_WP, self._dedup.count(place_WTM)), dim=1)

    def counts(self, exchanged_Wn: np.ndarray) -> np.ndarray:
        """Rows that each rank has for each expert, int64 [W, E], from all ranks' numbers."""
        if not self.by_tokens:
            return exchanged_Wn[:, : self._num_experts]
        loads = exchanged_Wn[:, : len(self._experts)]
        return loads.reshape(len(loads), self.num_chunks, -1).sum(1)

    def plans(self, order: ExpertOrder, exchanged_Wn: np.ndarray, rank: int) -> list[DispatchPlan]:
        """One plan a chunk from every rank's numbers; pure. A plan's `order` is its own rows'."""
        counts_WP = exchanged_Wn[:, : len(self._experts)]
        if self.num_chunks > 1 and not self.by_tokens:
            counts_WP = counts_WP[:, self._experts]
        num_local = self.first_experts[rank + 1] - self.first_experts[rank]
        found: list[DispatchPlan] = []
        sent = 0
        for chunk in self.chunks:
            rest = ExpertOrder(order.token_N[sent:], order.slot_TK, order.load_E)
            plan = make_plan(rest, counts_WP[:, chunk.columns], rank, chunk.bounds)
            before = chunk.local_starts[rank]
            after = num_local - before - len(plan.expert_counts)
            if before or after or self._each is not None:
                expert_counts = [0] * before + plan.expert_counts + [0] * after
                plan = replace(plan, expert_counts=expert_counts, wire=self._each)
            found.append(plan)
            sent += sum(plan.send_splits)
        if self._dedup is None or order.unique is None:
            return found
        return self._once(found, order.unique, exchanged_Wn, counts_WP, rank)

    def _once(
        self,
        plans: list[DispatchPlan],
        unique: UniqueRows,
        exchanged_Wn: np.ndarray,
        counts_WP: np.ndarray,
        rank: int,
    ) -> list[DispatchPlan]:
        """The plans with unique rows where these move fewer bytes, which all ranks see alike."""
        groups, rows, wire, num_ranks = self._dedup, self._rows, self._once_wire, self._num_ranks
        assert groups is not None and rows is not None and wire is not None
        unique_WCW = exchanged_Wn[:, -groups.num_groups :].reshape(num_ranks, -1, num_ranks)
        bounds = [
            chunk.columns.start + bound for chunk in self.chunks for bound in chunk.bounds[:-1]
        ]
        upto_WP = np.concatenate((np.zeros((num_ranks, 1), np.int64), counts_WP.cumsum(1)), axis=1)
        each_WCW = np.diff(upto_WP[:, [*bounds, -1]]).reshape(unique_WCW.shape)
        # A rank's rows to itself do not travel, and others may not know of its extras.
        remote = ~np.eye(num_ranks, dtype=bool)[:, None]
        num_each, num_once = int(each_WCW.sum(where=remote)), int(unique_WCW.sum(where=remote))
        home = num_once if rows.partial else num_each
        if num_once * wire.row_bytes + home * rows.home_bytes >= num_each * (
            rows.out_bytes + rows.home_bytes
        ):
            return plans
        total = int(unique_WCW[rank].sum())
        token_U = unique.token_U[:total]
        group_G = torch.arange(groups.num_groups, device=token_U.device)
        group_U = group_G.repeat_interleave(unique.load_G, output_size=total)
        cell_U = token_U * groups.num_groups + group_U
        found, sent = [], 0
        for index, (plan, chunk) in enumerate(zip(plans, self.chunks, strict=True)):
            to_W = unique_WCW[rank, index].tolist()
            part = slice(sent, sent := sent + sum(to_W))
            once = UniquePlan(
                rows=unique,
                groups=groups,
                token_U=token_U[part],
                cell_U=cell_U[part],
                send_splits=to_W,
                recv_splits=unique_WCW[:, index, rank].tolist(),
                num_experts=chunk.bounds[rank + 1] - chunk.bounds[rank],
            )
            found.append(replace(plan, wire=wire, once=once))
        return found

    def _place(self, ids_WTM: torch.Tensor, num_tokens_W: Sequence[int]) -> torch.Tensor:
        """The place of every rank's assignments in the order of travel, -1 for none."""
        if self.num_chunks == 1:
            return ids_WTM
        if not self.by_tokens:
            return self._table(ids_WTM.device)[ids_WTM]
        device, most = ids_WTM.device, ids_WTM.shape[1]
        token_T = torch.arange(1, most + 1, device=device)
        # Chunk j of T tokens is [T * j // C, T * (j + 1) // C).
        num_W = to_device(torch.tensor([max(num, 1) for num in num_tokens_W]), device)
        chunk_WT = (token_T * self.num_chunks - 1) // num_W[:, None]
        place_WTM = ids_WTM + self._num_experts * chunk_WT[:, :, None]
        return place_WTM.where(ids_WTM >= 0, -1)

    def _table(self, device: torch.device) -> torch.Tensor:
        """The place of each expert in the order of travel, int64 [E + 1], and -1 at the end."""
        if device not in self._places:
            place = np.full(len(self._experts) + 1, -1)
            place[self._experts] = np.arange(len(self._experts))
            self._places[device] = to_device(torch.from_numpy(place), device)
        return self._places[device]
