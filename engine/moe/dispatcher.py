"""Dispatcher: the collectives of the MoE layer. Counts first, then rows out, then results back.

Buffer sizes and splits come from the exchanged counts alone, so every rank calls the same
collectives with shapes that match, whatever its own load: a rank without tokens sends zero rows and
still takes part. `pipeline.py` calls them and moves rows between the three buffers of
`workspace.py`: packed into SEND, received into ARRIVED, reordered into GROUPED, results back into
whichever of the last two is free, and home into SEND.

Legend: D model dim, A rows sent, R rows received, E experts, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from engine.distributed.collectives import Done, GroupCollectives, Pending, Started
from engine.distributed.groups import Group
from engine.moe.workspace import Slot, Workspace


@dataclass(frozen=True, slots=True)
class RowBuffers:
    """Rows of one layer call. send [A, D]: packed, later the results that came home. arrived,
    grouped [R, D]: as they arrive, and by expert.
    """

    send: torch.Tensor
    arrived: torch.Tensor
    grouped: torch.Tensor


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

    def buffers(self, num_sent: int, num_received: int, like: torch.Tensor) -> RowBuffers:
        """This call's rows of the workspace; like: any tensor of their width, dtype and device."""
        rows = self._workspace.rows
        if self._group.size == 1:  # nothing travels: what is packed is what the experts read
            send = rows(Slot.SEND, num_sent, like)
            return RowBuffers(send, send, rows(Slot.ARRIVED, num_received, like))
        return RowBuffers(
            rows(Slot.SEND, num_sent, like),
            rows(Slot.ARRIVED, num_received, like),
            rows(Slot.GROUPED, num_received, like),
        )

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
