"""Dispatcher: the collectives of the MoE layer. Counts first, then rows out, then results back.

Buffer sizes and splits come from the exchanged counts alone, so every rank calls the same
collectives with shapes that match, whatever its own load: a rank without tokens sends zero rows and
still takes part. The local reorderings stand beside the collectives as methods of their own, so
that the clock can tell copying from communicating.

Rows move between three buffers of `workspace.py`: packed into SEND, received into ARRIVED,
reordered into GROUPED, results back into whichever of the last two is free, and home into SEND.

Legend: T tokens on this rank, D model dim, A rows sent, R rows received, E experts, W ranks.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from engine.distributed.collectives import GroupCollectives
from engine.distributed.groups import Group
from engine.moe.plan import DispatchPlan
from engine.moe.workspace import Slot, Workspace
from engine.ops.permute import gather_rows


class Dispatcher:
    """All-to-all of one expert-parallel group; holds nothing between calls but its row buffers."""

    def __init__(self, group: Group, collectives: GroupCollectives, workspace: Workspace) -> None:
        self._group = group
        self._collectives = collectives
        self._workspace = workspace

    def exchange_counts(self, load_E: torch.Tensor) -> np.ndarray:
        """Gather every rank's load_E; return int64 [W, E] on the host. Collective over EP: every
        rank must call.
        """
        counts_WE = self._collectives.all_gather(load_E).wait()
        # SYNC: all_to_all takes its splits as host integers; one copy a layer.
        return counts_WE.cpu().numpy()

    def pack(self, x_TD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Copy each assignment's token row into send order: [A, D]."""
        token_A = plan.order.token_N
        out = self._workspace.rows(Slot.SEND, token_A.numel(), x_TD)
        return gather_rows(x_TD, token_A, out)

    def dispatch(self, rows_AD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Send rows to their experts' ranks: [R, D] as they arrive, by source rank. Collective over
        EP: every rank must call.
        """
        return self._exchange(rows_AD, plan.send_splits, plan.recv_splits, Slot.ARRIVED)

    def group_by_expert(self, rows_RD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Reorder arrived rows so that each local expert's stand together."""
        if plan.arrival_R is None:
            return rows_RD
        out = self._workspace.rows(Slot.GROUPED, rows_RD.shape[0], rows_RD)
        return gather_rows(rows_RD, plan.arrival_R, out)

    def results(self, rows_RD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """A buffer [R, D] for the experts' results, other than the one that `rows_RD` is in."""
        one_rank, grouped = self._group.size == 1, plan.arrival_R is not None
        slot = Slot.ARRIVED if one_rank or grouped else Slot.GROUPED
        return self._workspace.rows(slot, rows_RD.shape[0], rows_RD)

    def ungroup(self, rows_RD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Undo `group_by_expert`."""
        if plan.arrival_R is None:
            return rows_RD
        out = self._workspace.rows(Slot.GROUPED, rows_RD.shape[0], rows_RD)
        return out.index_copy_(0, plan.arrival_R, rows_RD)

    def combine(self, rows_RD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Return results to their senders: [A, D] in send order. Collective over EP: every rank
        must call.
        """
        return self._exchange(rows_RD, plan.recv_splits, plan.send_splits, Slot.SEND)

    def _exchange(
        self, rows: torch.Tensor, send_splits: list[int], recv_splits: list[int], into: Slot
    ) -> torch.Tensor:
        group = self._group
        if group.size == 1:
            return rows
        received = self._workspace.rows(into, sum(recv_splits), rows)
        dist.all_to_all_single(
            received, rows.contiguous(), recv_splits, send_splits, group=group.handle
        )
        remote = rows.shape[0] - send_splits[group.rank]
        self._collectives.bytes_sent += remote * rows.shape[1] * rows.element_size()
        self._collectives.num_collectives += 1
        return received
