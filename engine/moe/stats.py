"""Layer statistics: loads, drops and recorded decisions of one MoE layer.

Drops are summed on the device and read at the end of a step or run; only tokens subject to capacity
are counted.

Legend: T tokens on this rank, K top-k, E experts, e experts on this rank, W expert-parallel ranks.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import torch

from engine.moe.capacity.decision import Decision, DeviceDecision, Kept
from engine.moe.dispatch.plan import DispatchPlan
from engine.moe.placement.instances import Instances
from engine.moe.router import Routing
from engine.moe.step import MoEStep
from engine.profiling.decisions import LayerDecision
from engine.profiling.loads import LayerDrops
from engine.profiling.routing.claim_log import LayerClaims
from engine.profiling.telemetry import Telemetry


class LayerStats:
    """One layer's statistics on this rank.

    Args:
        layer: the layer's index.
        instances: of the layer.
        rank: this rank's position in the group.
    """

    def __init__(self, layer: int, instances: Instances, rank: int) -> None:
        self.drops = DropStats()
        self._layer, self._rank = layer, rank
        self.instances = instances
        # Of a step's first micro-batch, until the second's are added.
        self._held: tuple[np.ndarray, list[DispatchPlan]] | None = None

    @property
    def instances(self) -> Instances:
        """The layer's."""
        return self._instances

    @instances.setter
    def instances(self, instances: Instances) -> None:
        self._instances = instances
        self._bounds = list(pairwise(instances.first_homes))
        self._own_experts = instances.local_experts(self._rank)

    def add(
        self,
        telemetry: Telemetry,
        routing: Routing,
        decision: Decision,
        plans: list[DispatchPlan],
        step: MoEStep | None,
        micro_batch: int | None = None,
    ) -> None:
        """Add one call. micro_batch: 0 or 1 in a step of two, whose loads are added together."""
        if step is not None:
            self.drops.add(routing, decision, step, self._copied(decision))
        self._add_loads(telemetry, decision.before_WE, plans, micro_batch)
        if step is not None and decision.keep_TK is not None:
            self._record_decision(telemetry, routing, decision, decision.keep_TK, step)
        if telemetry.claims.step is not None:
            self._record_claims(telemetry, routing, step)

    def add_static(
        self, telemetry: Telemetry, routing: Routing, load_I: torch.Tensor, step: MoEStep | None
    ) -> None:
        """Add one call of the static exchange, in which nothing was dropped.

        load_I: int64, assignments of every instance over all ranks, this rank's first. On CUDA it
        is read a step late (`LateLoads`).
        """
        if step is not None:
            self.drops.add(routing, None, step)
        if telemetry.claims.step is not None:
            self._record_claims(telemetry, routing, step)
        instances, rank, own = self._instances, self._rank, self._own_experts
        first_I = instances.first_instances
        loads, layer, bounds = telemetry.loads, self._layer, self._bounds

        def record(load_I: np.ndarray, *, is_late: bool) -> None:
            own_after = load_I[: len(own)].tolist()
            load_I = np.roll(load_I, first_I[rank])
            before_E = instances.fold(load_I[None])[0] if instances.has_copies else load_I
            loads.record(
                layer,
                before_E=instances.by_expert(before_E),
                rank_before=[int(before_E[first:end].sum()) for first, end in bounds],
                own_after=own_after,
                own_experts=own,
                after_W=np.array([load_I[a:b].sum() for a, b in pairwise(first_I)])
                if is_late
                else None,
            )

        if load_I.is_cpu:
            record(load_I.numpy(), is_late=False)
        else:
            loads.late.add(load_I, partial(record, is_late=True))

    def add_on_device(
        self,
        telemetry: Telemetry,
        routing: Routing,
        decision: DeviceDecision,
        step: MoEStep | None,
    ) -> None:
        """Add one call whose counts are on the device: they are read a step late (`LateLoads`).

        Raises:
            ValueError: from the late reading, on every rank: router scores are NaN or infinite.
        """
        if step is not None:
            self.drops.add(routing, decision, step)
        loads, layer, own, rank = telemetry.loads, self._layer, self._own_experts, self._rank
        instances, bounds, num_ranks = self._instances, self._bounds, len(decision.after_WE)
        parts = [decision.after_WE, decision.before_WE, decision.non_finite_W]
        counts_Wn = torch.cat(
            [part.view(num_ranks, -1) for part in parts if part is not None], dim=1
        )
        num_experts, limits = decision.after_WE.shape[1], decision.before_WE is not None

        def record(counts_N: np.ndarray) -> None:
            counts_Wn = counts_N.reshape(num_ranks, -1)
            after_E = counts_Wn[:, :num_experts].sum(0)
            before_E = after_E
            if limits:
                _check_finite(counts_Wn[:, -1], layer)
                before_E = counts_Wn[:, num_experts:-1].sum(0)
            first, end = bounds[rank]
            loads.record(
                layer,
                before_E=instances.by_expert(before_E),
                rank_before=[int(before_E[first:end].sum()) for first, end in bounds],
                own_after=after_E[first:end].tolist(),
                own_experts=own,
                after_W=np.array([after_E[first:end].sum() for first, end in bounds]),
            )

        loads.late.add(counts_Wn.flatten(), record)
        if telemetry.claims.step is not None:
            self._record_claims(telemetry, routing, step)
        if step is None or decision.keep_TK is None or telemetry.decisions.entries is None:
            return
        assert decision.before_WE is not None
        # SYNC: only while decisions are recorded.
        before_WE, after_WE = decision.before_WE.cpu().numpy(), decision.after_WE.cpu().numpy()
        known = Decision(
            ids_TM=decision.ids_TM,
            weights_TM=decision.weights_TM,
            order=decision.order,
            keep_TK=decision.keep_TK,
            exchanged_Wn=after_WE,
            before_WE=before_WE,
            counts_WE=after_WE,
        )
        self._record_decision(telemetry, routing, known, decision.keep_TK, step)

    def _copied(self, decision: Decision) -> torch.Tensor | None:
        """Return how many of each token's assignments a copy computes, float32 [T]; None: none."""
        instances = self._instances
        if not instances.has_copies or decision.keep_TK is None:
            return None
        ids_TK = decision.ids_TM[:, : decision.keep_TK.shape[1]]
        return instances.is_copy(ids_TK).sum(1, dtype=torch.float32)

    def _add_loads(
        self,
        telemetry: Telemetry,
        before_WE: np.ndarray,
        plans: list[DispatchPlan],
        micro_batch: int | None,
    ) -> None:
        """Record the loads of all ranks before capacity, and what this rank's experts get."""
        if micro_batch == 0:
            self._held = before_WE, plans
            return
        if micro_batch == 1 and self._held is not None:
            before_WE, plans = before_WE + self._held[0], plans + self._held[1]
        before_E = before_WE.sum(0)  # in home order
        # Python integers: with a few experts, numpy calls would cost more than the sums.
        rows = before_E.tolist()
        counts = [plan.expert_counts for plan in plans]
        telemetry.loads.record(
            self._layer,
            before_E=self._instances.by_expert(before_E),
            rank_before=[sum(rows[first:end]) for first, end in self._bounds],
            own_after=counts[0] if len(counts) == 1 else list(map(sum, zip(*counts, strict=True))),
            own_experts=self._own_experts,
        )

    def _record_decision(
        self,
        telemetry: Telemetry,
        routing: Routing,
        decision: Decision,
        keep_TK: torch.Tensor,
        step: MoEStep,
    ) -> None:
        """Record what capacity decided, where decisions are recorded."""
        log = telemetry.decisions
        if log.entries is None:
            return
        # SYNC: only while decisions are recorded.
        extra, eligible_T = decision.extra_Te, step.eligible_T
        if eligible_T is None:
            eligible_T = torch.ones_like(step.request_T, dtype=torch.bool)
        log.entries.append(
            LayerDecision(
                step=log.step,
                layer=self._layer,
                request_T=step.request_T.cpu().numpy(),
                position_T=step.position_T.cpu().numpy(),
                eligible_T=eligible_T.cpu().numpy(),
                topk_ids_TK=routing.topk_ids_TK.cpu().numpy(),
                keep_TK=keep_TK.cpu().numpy(),
                extra_Te=None if extra is None else extra.cpu().numpy(),
                own_experts=self._own_experts,
                before_WE=self._instances.by_expert(decision.before_WE),
                after_WE=self._instances.by_expert(decision.counts_WE),
            )
        )

    def _record_claims(self, telemetry: Telemetry, routing: Routing, step: MoEStep | None) -> None:
        """Record what the router chose for this rank's tokens, in a step whose claims are kept."""
        ids_TK = routing.topk_ids_TK
        unknown_T = np.full(ids_TK.shape[0], -1, dtype=np.int32)
        eligible_T = None if step is None else step.eligible_T
        # SYNC: only in a step whose claims are recorded.
        claims = LayerClaims(
            request_T=unknown_T if step is None else step.request_T.cpu().numpy(),
            position_T=unknown_T if step is None else step.position_T.cpu().numpy(),
            eligible_T=unknown_T < 0 if eligible_T is None else eligible_T.cpu().numpy(),
            topk_ids_TK=ids_TK.cpu().numpy(),
            scores_TK=routing.scores_TE.gather(1, ids_TK.clamp(min=0))
            .masked_fill(ids_TK < 0, 0.0)
            .cpu()
            .numpy(),
        )
        telemetry.claims.add(self._layer, claims)


def _check_finite(flag_W: np.ndarray, layer: int) -> None:
    """Raise ValueError where a rank's router scores were not finite."""
    names = [str(rank) for rank in np.flatnonzero(flag_W)]
    if names:
        raise ValueError(
            f"layer {layer}: router scores were NaN or infinite in the step before on "
            f"expert-parallel rank {', '.join(names)}, so the best assignments are undefined; "
            "check the checkpoint and its dtype"
        )


class DropStats:
    """A layer's drops over a run, of this rank's tokens."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None  # float64 [6] or [7], in the order of LayerDrops

    def add(
        self,
        routing: Routing,
        decision: Kept | None,
        step: MoEStep,
        copied_T: torch.Tensor | None = None,
    ) -> None:
        """Add one call, here and to the step's token counts. No host sync.

        Args:
            routing: of this rank's tokens.
            decision: None, or one without keep_TK, where nothing could be dropped.
            step: which tokens are counted.
            copied_T: float32, assignments that copies compute; None: none.
        """
        weights_TK = routing.topk_weights_TK
        mass_T = weights_TK.sum(1)
        if decision is None or decision.keep_TK is None:
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
        routed_T = torch.full_like(mass_T, weights_TK.shape[1])
        parts = [routed_T, dropped_T, added_T, orphan_T, mass_T, kept_T]
        if routing.zero_weight_T is not None:
            # Kept, as far as keep_TK says, so neither dropped nor an orphan's; but not experts'.
            zero_T = (routing.topk_ids_TK < 0).sum(1, dtype=torch.float32)
            parts = [routed_T - zero_T, *parts[1:], zero_T]
        parts_NT = torch.stack(parts)
        if step.eligible_T is not None:
            parts_NT = parts_NT.where(step.eligible_T, 0.0)
        if step.counts is not None:
            step.counts.dropped_T += parts_NT[1]
            step.counts.added_T += parts_NT[2]
            step.counts.mass_T += parts_NT[4]
            step.counts.mass_kept_T += parts_NT[5]
            if copied_T is not None:
                step.counts.copied_T += copied_T
        if not step.limited:
            return
        sums = parts_NT.sum(1, dtype=torch.float64)
        self._sums = sums if self._sums is None else self._sums + sums

    def read_and_reset(self) -> LayerDrops:
        """Return the sums so far and set them to zero."""
        if self._sums is None:
            return LayerDrops()
        # SYNC: once per run, for its report.
        routed, dropped, added, orphans, mass, kept, *zero = self._sums.tolist()
        self._sums = None
        return LayerDrops(
            routed=int(routed),
            dropped=int(dropped),
            added=int(added),
            orphans=int(orphans),
            mass=mass,
            mass_kept=kept,
            zero=int(zero[0]) if zero else 0,
        )
