"""Accounting: what capacity did, token by token for their requests and summed for the layer.

Everything is added up on the device and read at the end of a step or run. Only tokens that compete
for capacity are counted.

Legend: T tokens on this rank, K top-k, e experts on this rank.
"""

from __future__ import annotations

import torch

from engine.moe.agreement import Decision
from engine.moe.router import Routing
from engine.moe.step import MoEStep
from engine.profiling.loads import LayerDrops


class DropAccount:
    """One layer's sums over a run, of this rank's tokens."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None  # float64 [6], in the order of LayerDrops

    def add(self, routing: Routing, decision: Decision | None, step: MoEStep) -> None:
        """Count one call in, here and in the step's tally; decision: None where nothing could be
        dropped. No host sync.
        """
        weights_TK = routing.topk_weights_TK
        mass_T = weights_TK.sum(1)
        if decision is None:
            kept_T = mass_T
            dropped_T = added_T = orphan_T = torch.zeros_like(mass_T)
        else:
            keep_TK, extra_Te = decision.keep_TK, decision.extra_Te
            kept_T = weights_TK.where(keep_TK, 0.0).sum(1)
            left_T = keep_TK.sum(1, dtype=torch.float32)
            dropped_T = keep_TK.shape[1] - left_T
            added_T = torch.zeros_like(mass_T)
            if extra_Te is not None:
                added_T = extra_Te.sum(1, dtype=torch.float32)
            orphan_T = (left_T + added_T == 0).float()
        parts_6T = torch.stack(
            (
                torch.full_like(mass_T, weights_TK.shape[1]),
                dropped_T,
                added_T,
                orphan_T,
                mass_T,
                kept_T,
            )
        )
        if step.competes_T is not None:
            parts_6T = parts_6T.where(step.competes_T, 0.0)
        if step.tally is not None:
            step.tally.dropped_T += parts_6T[1]
            step.tally.added_T += parts_6T[2]
            step.tally.mass_T += parts_6T[4]
            step.tally.mass_kept_T += parts_6T[5]
        sums = parts_6T.sum(1, dtype=torch.float64)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> LayerDrops:
        """Return the sums so far and start anew."""
        if self._sums is None:
            return LayerDrops()
        # SYNC: once a run, for its report.
        routed, dropped, added, orphans, mass, kept = self._sums.tolist()
        self._sums = None
        return LayerDrops(int(routed), int(dropped), int(added), int(orphans), mass, kept)
