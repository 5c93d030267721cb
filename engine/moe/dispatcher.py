"""Dispatcher: the collectives of the MoE layer. Counts first, then rows out, then results back.

Buffer sizes and splits come from the exchanged counts alone, so every rank calls the same
collectives with shapes that match, whatever its own load: a rank without tokens sends zero rows and
still takes part. The local reorderings stand beside the collectives as methods of their own, so
that the clock can tell copying from communicating.

Legend: T tokens on this rank, D model dim, N assignments sent, R rows received, E experts, W ranks.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from engine.distributed.collectives import all_gather_rows
from engine.distributed.groups import Group
from engine.moe.plan import DispatchPlan
from engine.ops.permute import gather_rows


class Dispatcher:
    """All-to-all of one expert-parallel group; holds no state between calls but its counters."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.bytes_sent = 0
        self.num_collectives = 0

    def exchange_counts(self, load_E: torch.Tensor) -> np.ndarray:
        """Gather every rank's load_E; return int64 [W, E] on the host. Collective over EP: every
        rank must call.
        """
        if self.group.size == 1:
            # SYNC: the host needs the counts to size the experts' work.
            return load_E.cpu().numpy()[None]
        counts_WE = all_gather_rows(load_E[None], self.group)
        self.bytes_sent += load_E.numel() * load_E.element_size() * (self.group.size - 1)
        self.num_collectives += 1
        # SYNC: all_to_all takes its splits as host integers; one copy a layer.
        return counts_WE.cpu().numpy()

    def pack(self, x_TD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Copy each assignment's token row into send order: [N, D]."""
        return gather_rows(x_TD, plan.order.token_N)

    def dispatch(self, rows_ND: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Send rows to their experts' ranks: [R, D] as they arrive, by source rank. Collective over
        EP: every rank must call.
        """
        return self._exchange(rows_ND, plan.send_splits, plan.recv_splits)

    def group_by_expert(self, rows_RD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Reorder arrived rows so that each local expert's stand together."""
        return rows_RD if plan.arrival_R is None else gather_rows(rows_RD, plan.arrival_R)

    def ungroup(self, rows_RD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Undo `group_by_expert`."""
        if plan.arrival_R is None:
            return rows_RD
        return torch.empty_like(rows_RD).index_copy_(0, plan.arrival_R, rows_RD)

    def combine(self, rows_RD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Return results to their senders: [N, D] in send order. Collective over EP: every rank
        must call.
        """
        return self._exchange(rows_RD, plan.recv_splits, plan.send_splits)

    def _exchange(
        self, rows: torch.Tensor, send_splits: list[int], recv_splits: list[int]
    ) -> torch.Tensor:
        if self.group.size == 1:
            return rows
        received = rows.new_empty((sum(recv_splits), rows.shape[1]))
        dist.all_to_all_single(
            received, rows.contiguous(), recv_splits, send_splits, group=self.group.handle
        )
        remote = rows.shape[0] - send_splits[self.group.rank]
        self.bytes_sent += remote * rows.shape[1] * rows.element_size()
        self.num_collectives += 1
        return received
