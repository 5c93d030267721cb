"""Overlap: the layer's rows travel in chunks, so that one chunk's experts work while others travel.

Chunks are groups of local experts: chunk j holds the j-th part of every rank's experts. An expert's
rows stay together, so its matrix products are as large as without chunks and its results the same
bit for bit, and no rank needs other counts than those it has. The price is that a rank with one
expert (Mixtral on 8 ranks) has nothing to cut.

    compute    pack 0  pack 1 | experts 0 | experts 1 | experts 2 |        | weigh
    network            | out 0  | out 1   | back 0, out 2 | back 1 | back 2 |

All ranks start the same collectives in the same order: out 0, out 1, back 0, out 2, back 1, ... On
CUDA they run on NCCL's own stream, which waits for the compute stream where a collective is
started, and a wait holds up the compute stream and not the host. On gloo they are handles that
background threads work on.

Worked example, 2 ranks, experts 0 1 2 on rank 0 and 3 4 on rank 1, two chunks: rank 0 cuts 0 | 1 2,
rank 1 cuts 3 | 4. Rows travel in the order of experts 0 3 | 1 2 4.

Legend: T tokens, M columns of the ids, E experts, W ranks, A rows sent, R rows received, D model
dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.moe.plan import DispatchPlan, ExpertOrder, make_plan, sort_by_expert

# Rows of a chunk on the mean rank from which it pays: below, the collectives cost more than they
# hide. 256 rows of 512 floats are 0.5 MB, a millisecond on a 4 Gbit/s link.
MIN_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Chunk:
    """One part of all ranks' experts. columns: where they stand in the order of travel. bounds: W +
    1 boundaries between the ranks inside it. local_starts: the first local expert of each rank.
    """

    columns: slice
    bounds: list[int]
    local_starts: list[int]


class ExpertLayout:
    """In which order experts' rows travel: chunk after chunk, in a chunk rank after rank.

    first_experts: W + 1 boundaries, rank w hosts first_experts[w] .. first_experts[w + 1] - 1.
    num_chunks: as many as asked for, at most the most experts of a rank; 1 on one rank.
    """

    def __init__(self, first_experts: list[int], num_chunks: int) -> None:
        sizes = np.diff(first_experts)
        self.first_experts = first_experts
        self.num_chunks = 1 if len(sizes) == 1 else max(1, min(num_chunks, int(sizes.max())))
        self.chunks: list[Chunk] = []
        experts: list[int] = []
        for index in range(self.num_chunks):
            begin, bounds, starts = len(experts), [0], []
            for first, size in zip(first_experts, sizes.tolist(), strict=False):
                start, end = (size * part // self.num_chunks for part in (index, index + 1))
                experts += range(first + start, first + end)
                bounds.append(len(experts) - begin)
                starts.append(start)
            self.chunks.append(Chunk(slice(begin, len(experts)), bounds, starts))
        self._experts = np.array(experts)
        self._places: dict[torch.device, torch.Tensor] = {}

    def pays(self, group_tokens: int, top_k: int) -> bool:
        """Whether a step of so many tokens over all ranks is worth cutting up."""
        rows = group_tokens * top_k / (len(self.first_experts) - 1)
        return rows >= MIN_CHUNK_ROWS * self.num_chunks

    def sort(self, ids_TM: torch.Tensor) -> ExpertOrder:
        """Sort this rank's assignments into the order of travel; load_E is by expert as ever.

        ids_TM: int64, -1 where an assignment is dropped.
        """
        num_experts = self.first_experts[-1]
        if self.num_chunks == 1:
            return sort_by_expert(ids_TM, num_experts)
        place_E1 = self._place(ids_TM.device)  # its last entry serves id -1
        order = sort_by_expert(place_E1[ids_TM], num_experts)
        return ExpertOrder(order.token_N, order.slot_TK, order.load_E[place_E1[:-1]])

    def plans(self, order: ExpertOrder, counts_WE: np.ndarray, rank: int) -> list[DispatchPlan]:
        """One plan a chunk from every rank's counts; pure. A plan's `order` is its own rows'."""
        if self.num_chunks == 1:
            return [make_plan(order, counts_WE, rank, self.first_experts)]
        counts_WP = counts_WE[:, self._experts]
        num_local = self.first_experts[rank + 1] - self.first_experts[rank]
        found, sent = [], 0
        for chunk in self.chunks:
            rest = ExpertOrder(order.token_N[sent:], order.slot_TK, order.load_E)
            plan = make_plan(rest, counts_WP[:, chunk.columns], rank, chunk.bounds)
            before = chunk.local_starts[rank]
            after = num_local - before - len(plan.expert_counts)
            found.append(
                replace(plan, expert_counts=[0] * before + plan.expert_counts + [0] * after)
            )
            sent += sum(plan.send_splits)
        return found

    def _place(self, device: torch.device) -> torch.Tensor:
        """The place of each expert in the order of travel, int64 [E + 1], and -1 at the end."""
        if device not in self._places:
            place = np.full(len(self._experts) + 1, -1)
            place[self._experts] = np.arange(len(self._experts))
            self._places[device] = torch.from_numpy(place).to(device)
        return self._places[device]
