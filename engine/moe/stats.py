"""Record: what an MoE layer tells the profiler of a call: loads, and decisions where asked.

Legend: E experts, W expert-parallel ranks.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from engine.moe.capacity.agreement import Decision
from engine.moe.dispatch.plan import DispatchPlan
from engine.moe.router import Routing
from engine.moe.step import MoEStep
from engine.profiling.decisions import DecisionLog, LayerDecision
from engine.profiling.loads import LayerDrops, LoadCounter


class Recorder:
    """Tells of one layer's calls. first_experts: W + 1 boundaries. rank: this one."""

    def __init__(self, layer: int, first_experts: list[int], rank: int) -> None:
        self._layer = layer
        self._bounds = list(pairwise(first_experts))
        self._first_expert = first_experts[rank]
        self._held: tuple[np.ndarray, list[DispatchPlan]] | None = None

    def loads(
        self,
        counter: LoadCounter,
        before_WE: np.ndarray,
        plans: list[DispatchPlan],
        half: int | None,
    ) -> None:
        """Note a call's loads; those of two half batches together, with the second.

        before_WE: int64, of all ranks before capacity. plans: what this rank's experts get. half: 0
        or 1 in a step of two.
        """
        if half == 0:
            self._held = before_WE, plans
            return
        if half == 1 and self._held is not None:
            before_WE, plans = before_WE + self._held[0], plans + self._held[1]
        before_E = before_WE.sum(0)
        # Plain numbers: of a few experts each numpy call would cost more than the sums.
        rows = before_E.tolist()
        counts = [plan.expert_counts for plan in plans]
        counter.record(
            self._layer,
            before_E=before_E,
            rank_before=[sum(rows[first:end]) for first, end in self._bounds],
            own_after=counts[0] if len(counts) == 1 else list(map(sum, zip(*counts, strict=True))),
            first_expert=self._first_expert,
        )

    def decision(
        self, log: DecisionLog, routing: Routing, decision: Decision, step: MoEStep
    ) -> None:
        """Note what capacity decided, where somebody asked."""
        if log.entries is None:
            return
        # SYNC: only while somebody records decisions.
        extra, competes_T = decision.extra_Te, step.competes_T
        if competes_T is None:
            competes_T = torch.ones_like(step.request_T, dtype=torch.bool)
        log.entries.append(
            LayerDecision(
                step=log.step,
                layer=self._layer,
                request_T=step.request_T.cpu().numpy(),
                position_T=step.position_T.cpu().numpy(),
                competes_T=competes_T.cpu().numpy(),
                topk_ids_TK=routing.topk_ids_TK.cpu().numpy(),
                keep_TK=decision.keep_TK.cpu().numpy(),
                extra_Te=None if extra is None else extra.cpu().numpy(),
                first_expert=self._first_expert,
                before_WE=decision.before_WE,
                after_WE=decision.counts_WE,
            )
        )


class DropStats:
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
