"""Record: what an MoE layer tells the profiler of a call: loads, and decisions where asked.

Legend: E experts, W expert-parallel ranks.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from engine.moe.agreement import Decision
from engine.moe.plan import DispatchPlan
from engine.moe.router import Routing
from engine.moe.step import MoEStep
from engine.profiling.decisions import DecisionLog, LayerDecision
from engine.profiling.loads import LoadCounter


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
