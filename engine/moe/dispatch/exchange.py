"""Exchange: the collectives of the MoE layer. Counts first, then rows out, then results back.

Buffer sizes and splits come from the exchanged counts alone, so every rank calls the same
collectives with shapes that match, whatever its own load: a rank without tokens sends zero rows and
still takes part. `pipeline.py` calls them; `freight.py` says what the rows are.

Legend: n numbers of a rank (its loads, and its unique rows where they are counted), W ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from engine.distributed.collectives import Done, GroupCollectives, Pending, Started
from engine.distributed.groups import Group
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.payload import Payload, load
from engine.moe.dispatch.plan import DispatchPlan
from engine.moe.experts import ExpertsBackend


class Exchange:
    """All-to-all of one expert-parallel group; holds nothing between calls but its row buffers."""

    def __init__(self, group: Group, collectives: GroupCollectives, workspace: RowBuffers) -> None:
        self._group = group
        self._collectives = collectives
        self._workspace = workspace

    def exchange_counts(self, numbers: torch.Tensor) -> Pending:
        """Begin to gather every rank's numbers, int64 [n], to [W, n]. Collective over EP: every
        rank must call.
        """
        return self._collectives.all_gather(numbers)

    def load(
        self,
        x_TD: torch.Tensor,
        weights_TM: torch.Tensor,
        plans: list[DispatchPlan],
        experts: ExpertsBackend,
    ) -> Payload:
        """This call's rows, in the buffers of the workspace."""
        alone = self._group.size == 1
        return load(x_TD, weights_TM, plans, experts, self._workspace, alone=alone)

    def start(
        self, rows: torch.Tensor, into: torch.Tensor, send_splits: list[int], recv_splits: list[int]
    ) -> Pending:
        """Start an all-to-all of rows; `wait` on what it returns gives `into`, filled.

        rows must not change before the wait. Collective over EP: every rank must call.
        """
        group = self._group
        if group.size == 1:
            return Done(rows)
        work = dist.all_to_all_single(
            into, rows, recv_splits, send_splits, group=group.handle, async_op=True
        )
        self._collectives.bytes_sent += self.remote_bytes(rows, send_splits)
        self._collectives.num_collectives += 1
        return Started(work, into)

    def remote_bytes(self, rows: torch.Tensor, send_splits: list[int]) -> int:
        """Bytes of `rows` that go to other ranks."""
        remote = rows.shape[0] - send_splits[self._group.rank]
        return remote * rows.shape[1] * rows.element_size()
