"""Dispatch plan: which row goes to which rank and expert, frozen before any row moves.

`layer.py` makes one plan a layer: `sort_by_expert` (pure, this rank only) -> the count exchange in
`dispatcher.py` -> `make_plan` (pure, from the exchanged counts). `overlap.py` cuts it into chunks
and adds how rows travel where they do not go as they are; `freight.py` carries it out.

Worked example, 2 ranks, 4 experts (0,1 on rank 0; 2,3 on rank 1), this is rank 0 with T=2 tokens,
K=2:
    topk_ids_TK = [[3, 0], [0, 2]]    assignments n = t*K+k: 0 (t0,e3) 1 (t0,e0) 2 (t1,e0) 3 (t1,e2)
    order_N     = [1, 2, 3, 0]        stable sort by expert: e0, e0, e2, e3
    token_N     = [0, 1, 1, 0]        the rows to send, in that order
    slot_TK     = [[3, 0], [1, 2]]    where each assignment's result comes back
    load_E      = [2, 0, 1, 1]        rank 0 keeps 2 rows and sends 2: send_splits = [2, 2]
If rank 1 sends load [1, 1, 0, 0], rank 0 receives recv_splits = [2, 2]: rows (from rank 0: e0 e0)
(from rank 1: e0 e1); grouped by expert that is arrival_R = [0, 1, 2, 3], expert_counts = [3, 1].

Legend: T tokens on this rank, K top-k, N assignments (T*K), E experts, R rows received, U unique
rows sent, W expert-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.moe.dispatch.dedup import Deduplicator, UniqueRows
from engine.moe.dispatch.row_format import RowFormat
from engine.ops import sort_by_expert as sort_op
from engine.ops.to_device import to_device


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """This rank's assignments sorted by expert; device tensors only, no host sync.

    token_N: int64 [N], the token of the n-th row to send; the places of dropped assignments come
    last and mean nothing. slot_TK: int64 [T, K], the row that carries each assignment, -1 where it
    is dropped. load_E: int64 [E], assignments of each expert on this rank. numbers: int64 [n], what
    the other ranks must know to make their plans (`ExpertLayout.sort`); None: load_E. unique: the
    same assignments by token and rank, where they are counted.
    """

    token_N: torch.Tensor
    slot_TK: torch.Tensor
    load_E: torch.Tensor
    numbers: torch.Tensor | None = None
    unique: UniqueRows | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UniquePlan:
    """What the unique rows of one chunk need besides.

    rows, groups: of the whole call. token_U: int64, the token of each row to send. cell_U: int64,
    t * G + g of it. send_splits, recv_splits: unique rows to and from each rank. num_experts: local
    experts of this chunk.
    """

    rows: UniqueRows
    groups: Deduplicator
    token_U: torch.Tensor
    cell_U: torch.Tensor
    send_splits: list[int]
    recv_splits: list[int]
    num_experts: int


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """Everything dispatch and combine need.

    order: what this rank sends, without the places of what was dropped. send_splits, recv_splits:
    assignments to and from each rank of the group. expert_counts: rows of each local expert after
    grouping. arrival_R: int64 [R], the arrival index of each grouped row (None: rows already arrive
    grouped). wire: how rows look on the way out; None: as they are. once: rows go out once a rank;
    None: once an assignment.
    """

    order: ExpertOrder
    send_splits: list[int]
    recv_splits: list[int]
    expert_counts: list[int]
    arrival_R: torch.Tensor | None
    wire: RowFormat | None = None
    once: UniquePlan | None = None

    @property
    def num_received(self) -> int:
        """Rows this rank's experts work on."""
        return sum(self.recv_splits)

    @property
    def partial(self) -> bool:
        """Whether a token's rows come home summed by the rank of its experts."""
        return self.wire is not None and self.wire.num_weights > 0

    def terms(self, weights_TM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that came home for each token and by what to weigh them: slot [T, M], weights
        [T, M]; the same for all plans of a call.
        """
        if self.partial and self.once is not None:
            return self.once.rows.slot_TM, torch.ones_like(weights_TM)
        return self.order.slot_TK, weights_TM


def sort_by_expert(topk_ids_TK: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sort this rank's assignments by expert, stably, so that an expert's rows stay in token order.

    topk_ids_TK: int64 [T, K], -1 where an assignment is dropped. T may be 0.
    """
    return ExpertOrder(*sort_op.sort_by_expert(topk_ids_TK, num_experts))


def make_plan(
    order: ExpertOrder, counts_WE: np.ndarray, rank: int, first_experts: list[int]
) -> DispatchPlan:
    """Derive the plan of one rank from every rank's counts; pure.

    counts_WE: int64 [W, E] on the host, row w = load_E of rank w; rows that another rank keeps for
    itself (its extras) may be missing. first_experts: W+1 boundaries,
    rank w hosts experts first_experts[w] .. first_experts[w+1]-1.
    """
    if len(counts_WE) == 1:  # one rank keeps everything
        rows = counts_WE[0].tolist()
        total = sum(rows)
        return DispatchPlan(_cut(order, total), [total], [total], rows, None)
    # Prefix sums rather than reduceat, which gives a rank without experts its neighbour's count.
    upto_WE = np.concatenate((np.zeros((len(counts_WE), 1), np.int64), counts_WE.cumsum(1)), axis=1)
    bounds = np.asarray(first_experts)
    to_rank_WW = upto_WE[:, bounds[1:]] - upto_WE[:, bounds[:-1]]
    local_We = counts_WE[:, first_experts[rank] : first_experts[rank + 1]]
    return DispatchPlan(
        order=_cut(order, int(to_rank_WW[rank].sum())),
        send_splits=to_rank_WW[rank].tolist(),
        recv_splits=to_rank_WW[:, rank].tolist(),
        expert_counts=local_We.sum(0).tolist(),
        arrival_R=_arrival_by_expert(local_We, order.token_N.device),
    )


def _cut(order: ExpertOrder, num_rows: int) -> ExpertOrder:
    """The order without the places of dropped assignments, now that the host knows how many."""
    if num_rows == order.token_N.numel():
        return order
    return ExpertOrder(order.token_N[:num_rows], order.slot_TK, order.load_E)


def _arrival_by_expert(local_We: np.ndarray, device: torch.device) -> torch.Tensor | None:
    """Arrival index of each row in (expert, source) order; rows arrive by (source, expert)."""
    num_ranks, num_local = local_We.shape
    if num_ranks == 1 or num_local <= 1:
        return None
    starts = np.concatenate(([0], local_We.ravel().cumsum()[:-1])).reshape(local_We.shape)
    lengths = local_We.T.ravel()
    grouped_starts = np.concatenate(([0], lengths.cumsum()[:-1]))
    # Row r of the grouped order lies in block b; its arrival index is the block's arrival start
    # plus its offset in it.
    shift = np.repeat(starts.T.ravel() - grouped_starts, lengths)
    arrival = torch.from_numpy(shift + np.arange(int(lengths.sum())))
    return to_device(arrival, device)
