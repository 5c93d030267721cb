"""Token shard: a tensor rank's part of the tokens that its whole tensor group holds.

Under attention tensor parallelism every rank of a tensor group has the same tokens. Before the
experts each takes one contiguous part, so that no assignment is sent twice; after them the parts
are gathered.

Worked example: 7 tokens on a tensor group of 2: parts of ceil(7/2) = 4 rows, [0, 4) and [4, 7); the
second is padded to 4 rows for the gather, and the padding is removed after it.

Legend: T tokens of the tensor group, t tokens of this rank's part, D model dim.
"""

from __future__ import annotations

import torch

from engine.distributed.collectives import all_gather_rows
from engine.distributed.groups import Group
from engine.profiling.phase_clock import NO_LAYER, Phase, PhaseClock


def part_bounds(num_tokens: int, size: int, rank: int) -> tuple[int, int]:
    """Return the first row and the end of a rank's part, in a tensor group of `size` ranks."""
    part = -(-num_tokens // size)
    start = min(rank * part, num_tokens)
    return start, min(start + part, num_tokens)


class TokenShard:
    """Scatters tokens over a tensor group and gathers the parts; the identity for one rank."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def scatter(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows [t, ...] of a tensor [T, ...]; possibly none."""
        if self._group.size == 1:
            return x_TD
        start, end = part_bounds(x_TD.shape[0], self._group.size, self._group.rank)
        return x_TD[start:end]

    @property
    def num_collectives(self) -> int:
        """Collectives per `gather`."""
        return int(self._group.size > 1)

    def gather(
        self, out_tD: torch.Tensor, num_tokens: int, clock: PhaseClock, layer: int = NO_LAYER
    ) -> torch.Tensor:
        """Return all rows [T, D]. Collective over the tensor group: every rank must call.

        Args:
            out_tD: this rank's rows.
            num_tokens: T, the same on every rank.
            clock: enters TENSOR; the caller's next phase ends it.
            layer: for the clock.
        """
        if self._group.size == 1:
            return out_tD
        part = -(-num_tokens // self._group.size)
        padded = out_tD.new_zeros((part, out_tD.shape[1]))
        padded[: out_tD.shape[0]] = out_tD
        clock.enter_collective(Phase.TENSOR, layer, part)
        clock.sent(padded.numel() * padded.element_size() * (self._group.size - 1))
        return all_gather_rows(padded, self._group)[:num_tokens]
