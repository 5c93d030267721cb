"""Dispatch plan: which row goes to which rank and expert, frozen before any row moves.

`engine.ops.sort_by_expert` orders this rank's rows, the ranks exchange their counts, and
`make_plan` (pure) derives the plan from the counts of all. `chunk_layout.py` makes one plan per
chunk and adds the row format where rows are packed; `payload.py` carries it out.

Worked example, 2 ranks, 4 experts (0,1 on rank 0; 2,3 on rank 1), this is rank 0 with T=2 tokens,
K=2:
    topk_ids_TK = [[3, 0], [0, 2]]    assignments n = t*K+k: 0 (t0,e3) 1 (t0,e0) 2 (t1,e0) 3 (t1,e2)
    order_N     = [1, 2, 3, 0]        stable sort by expert: e0, e0, e2, e3
    token_N     = [0, 1, 1, 0]        the rows to send, in that order
    slot_TK     = [[3, 0], [1, 2]]    the row in which each assignment's result is returned
    load_E      = [2, 0, 1, 1]        rank 0 keeps 2 rows and sends 2: send_splits = [2, 2]
If rank 1 sends load [1, 1, 0, 0], rank 0 receives recv_splits = [2, 2]: rows (from rank 0: e0 e0)
(from rank 1: e0 e1); grouped by expert that is recv_index_R = [0, 1, 2, 3], expert_counts = [3, 1].

Legend: T tokens on this rank, K top-k, N assignments (T*K), E experts, R rows received, U unique
rows sent, W expert-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.moe.dispatch.dedup import Deduplicator, UniqueRows
from engine.moe.dispatch.row_format import RowFormat
from engine.moe.dispatch.shared_rows import SharedMoves
from engine.ops.to_device import to_device


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """This rank's assignments sorted by expert; device tensors only, no host sync."""

    token_N: (
        torch.Tensor
    )  # int64, the token of each row to send; dropped assignments last, undefined
    slot_TK: torch.Tensor  # int64, the row of each assignment, -1 where it is dropped
    load_E: torch.Tensor  # int64, this rank's assignments of each expert
    # int64 [n], what the other ranks need to make their plans (`ExpertLayout.sort`); None: load_E
    counts_to_exchange: torch.Tensor | None = None
    unique: UniqueRows | None = None  # the same assignments by token and rank; None: not counted


@dataclass(frozen=True, slots=True, kw_only=True)
class UniquePlan:
    """The deduplicated rows of one chunk."""

    rows: UniqueRows  # of the whole call
    groups: Deduplicator  # of the whole call
    token_U: torch.Tensor  # int64, the token of each row to send
    cell_U: torch.Tensor  # int64, t * G + g of each row
    send_splits: list[int]  # unique rows per destination rank
    recv_splits: list[int]  # unique rows per source rank
    num_experts: int  # local experts of this chunk
    num_shared: int = 0  # shared rows that this rank computes for others
    moves: SharedMoves | None = None  # of the whole call; None: all shared rows stay


class ReceiveIndex:
    """The receive index of each grouped row, made when it is first read: that takes the host longer
    than the rest of the plan, and the rows can be sent without it.

    Args:
        local_We: int64 on the host, the rows that each rank sends to each local expert.
        device: of the index.
    """

    def __init__(self, local_We: np.ndarray, device: torch.device) -> None:
        self._local_We, self._device = local_We, device
        self._index_R: torch.Tensor | None = None
        self._is_made = False

    def read(self) -> torch.Tensor | None:
        """Return the index, int64 [R]; None: rows are received grouped."""
        if not self._is_made:
            self._index_R, self._is_made = _recv_index(self._local_We, self._device), True
        return self._index_R


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """Everything dispatch and combine need."""

    order: ExpertOrder  # what this rank sends, without what was dropped
    send_splits: list[int]  # assignments per destination rank
    recv_splits: list[int]  # assignments per source rank
    expert_counts: list[int]  # rows of each local expert
    receive_index: ReceiveIndex | None  # of one rank None: grouped
    row_format: RowFormat | None = None  # of dispatched rows; None: the model's dtype, unpacked
    unique: UniquePlan | None = None  # rows are deduplicated per rank; None: one per assignment

    @property
    def recv_index_R(self) -> torch.Tensor | None:
        """The receive index of each grouped row, int64; None: rows are received grouped."""
        return None if self.receive_index is None else self.receive_index.read()

    @property
    def shared_moves(self) -> SharedMoves | None:
        """Which shared rows of the call move; None: all stay."""
        return None if self.unique is None else self.unique.moves

    @property
    def num_held(self) -> int:
        """Rows that this rank computes, with those of the shared expert for other ranks."""
        return self.num_received + (0 if self.unique is None else self.unique.num_shared)

    @property
    def num_received(self) -> int:
        """Rows that this rank's experts work on."""
        return sum(self.recv_splits)

    @property
    def pre_reduced(self) -> bool:
        """Whether the ranks of a token's experts sum its results before the combine."""
        return self.row_format is not None and self.row_format.num_weights > 0

    def terms(self, weights_TM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the combined rows of each token and their weights: slot [T, M], weights [T, M].

        They are the same for all plans of a call.
        """
        if self.pre_reduced and self.unique is not None:
            return self.unique.rows.slot_TM, torch.ones_like(weights_TM)
        return self.order.slot_TK, weights_TM


def make_plan(
    order: ExpertOrder, counts_WE: np.ndarray, rank: int, first_experts: list[int]
) -> DispatchPlan:
    """Derive the plan of one rank from every rank's counts; pure.

    Args:
        order: this rank's assignments.
        counts_WE: int64 on the host, row w is load_E of rank w; the extras of other ranks, which
            stay there, may be missing.
        rank: this rank's position in the group.
        first_experts: W + 1 boundaries, rank w hosts first_experts[w] .. first_experts[w+1] - 1.
    """
    if len(counts_WE) == 1:  # one rank keeps everything
        rows = counts_WE[0].tolist()
        total = sum(rows)
        return DispatchPlan(_cut(order, total), [total], [total], rows, None)
    # Prefix sums, because reduceat gives a rank without experts its neighbour's count.
    upto_WE = np.concatenate((np.zeros((len(counts_WE), 1), np.int64), counts_WE.cumsum(1)), axis=1)
    bounds = np.asarray(first_experts)
    to_rank_WW = upto_WE[:, bounds[1:]] - upto_WE[:, bounds[:-1]]
    local_We = counts_WE[:, first_experts[rank] : first_experts[rank + 1]]
    return DispatchPlan(
        order=_cut(order, int(to_rank_WW[rank].sum())),
        send_splits=to_rank_WW[rank].tolist(),
        recv_splits=to_rank_WW[:, rank].tolist(),
        expert_counts=local_We.sum(0).tolist(),
        receive_index=ReceiveIndex(local_We, order.token_N.device),
    )


def _cut(order: ExpertOrder, num_rows: int) -> ExpertOrder:
    """Return the order without the dropped assignments: `num_rows` rows are left."""
    if num_rows == order.token_N.numel():
        return order
    return ExpertOrder(order.token_N[:num_rows], order.slot_TK, order.load_E)


def _recv_index(local_We: np.ndarray, device: torch.device) -> torch.Tensor | None:
    """Return the receive index of each row in (expert, source) order; rows are received by (source,
    expert). None: both orders are the same.
    """
    num_ranks, num_local = local_We.shape
    if num_ranks == 1 or num_local <= 1:
        return None
    starts = np.concatenate(([0], local_We.ravel().cumsum()[:-1])).reshape(local_We.shape)
    lengths = local_We.T.ravel()
    grouped_starts = np.concatenate(([0], lengths.cumsum()[:-1]))
    # Row r of the grouped order is in block (expert, source); its receive index is the start of
    # that block in receive order plus the row's offset in the block.
    shift = np.repeat(starts.T.ravel() - grouped_starts, lengths)
    index = torch.from_numpy(shift + np.arange(int(lengths.sum())))
    return to_device(index, device)
