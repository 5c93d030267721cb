"""Exchange: the all-to-alls and all-gathers of one expert-parallel group.

Sizes and splits follow from counts that all ranks have exchanged, so every rank starts the same
collectives with shapes that match, whatever its own load: a rank without tokens sends zero rows and
still takes part. `payload.py` fills and reads the buffers, `pipeline.py` orders the calls.

Legend: S rows sent, R rows received, U deduplicated rows sent, L bytes of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from engine.distributed.collectives import Collectives, Done, Pending, Started, start_all_gather
from engine.distributed.groups import Group


@dataclass(frozen=True, slots=True)
class AllToAll:
    """Arguments of one all-to-all."""

    send: torch.Tensor  # [S, D], or uint8 [U, L] when packed
    recv: torch.Tensor  # the same layout, from all ranks
    send_splits: list[int]  # rows per destination rank
    recv_splits: list[int]  # rows per source rank


class Exchange:
    """Starts collectives of rows and counts them in the `collectives` of the same group."""

    def __init__(self, group: Group, collectives: Collectives) -> None:
        self.collectives = collectives
        self._group = group

    @property
    def is_single_rank(self) -> bool:
        """Whether the group has one rank: received rows are the rows sent."""
        return self._group.size == 1

    def start(self, rows: AllToAll) -> Pending:
        """Start an all-to-all; `wait` on the result returns `rows.recv`, filled.

        `rows.send` must not change before the wait. Collective over EP: every rank must call.
        """
        if self.is_single_rank:
            return Done(rows.send)
        work = dist.all_to_all_single(
            rows.recv,
            rows.send,
            rows.recv_splits,
            rows.send_splits,
            group=self._group.handle,
            async_op=True,
        )
        self.collectives.bytes_sent += self.remote_bytes(rows)
        self.collectives.num_collectives += 1
        return Started(work, rows.recv)

    def gather(self, part: torch.Tensor) -> Pending:
        """Start an all-gather of parts of equal shape [n, L]; `wait` on the result returns all rows
        [W * n, L] in rank order.

        `part`, contiguous, must not change before the wait. Collective over EP: every rank must
        call.
        """
        if not self.is_single_rank:
            self.collectives.bytes_sent += part.nbytes * (self._group.size - 1)
            self.collectives.num_collectives += 1
        return start_all_gather(part, self._group)

    def remote_bytes(self, rows: AllToAll) -> int:
        """Return the bytes that go to other ranks."""
        remote = rows.send.shape[0] - rows.send_splits[self._group.rank]
        return remote * rows.send.shape[1] * rows.send.element_size()
