"""Device agreement: decisions whose counts stay on the device, for transports that need none.

The same drops as `agreement.py` decides, without its host sync: claims are compared by all keys at
once, as after a call with equal claims, so no second selection can be needed. What the host would
have read (loads, scores that are not finite) it reads a step late (`engine.profiling.late_loads`).

Legend: W expert-parallel ranks, E experts, n counts per rank.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.moe.capacity.agreement import CapacityAgreement
from engine.moe.capacity.decision import DeviceDecision
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.router import Routing
from engine.moe.step import MoEStep
from engine.profiling.phase_clock import PhaseClock


class DeviceAgreement(CapacityAgreement):
    """`CapacityAgreement` of experts without copies, which need not tell the host."""

    def decide_on_device(
        self,
        routing: Routing,
        step: MoEStep,
        *,
        clock: PhaseClock,
        overlap: Callable[[], None] | None,
        layout: ExpertLayout,
    ) -> DeviceDecision:
        """Agree as `decide` does, to the same drops, without a host sync: claims are compared by
        all keys at once, so that no tie is left. Collective over EP: every rank must call.

        Scores that are not finite are for the caller to report. See `decide` for the arguments.

        Args:
            layout: one that has no counts but loads; nothing may be added (`adds_extras`).
        """
        claims, pending = self._begin(routing, step, clock, overlap, layout, True)
        selection = pending.select(exact=False)
        keep_TK, _, ids_TM, weights_TM = self._chosen(selection, routing, step, claims)
        order = layout.sort(ids_TM)
        rows_Wn2 = self._rows(selection, claims, order, layout, step, clock)
        num_experts = self._router.num_experts
        return DeviceDecision(
            ids_TM=ids_TM,
            weights_TM=weights_TM,
            order=order,
            keep_TK=keep_TK,
            after_WE=rows_Wn2[:, :num_experts],
            before_WE=rows_Wn2[:, num_experts : 2 * num_experts],
            non_finite_W=rows_Wn2[:, -2],
        )

    def keep_all_on_device(
        self,
        routing: Routing,
        *,
        clock: PhaseClock,
        overlap: Callable[[], None] | None,
        layout: ExpertLayout,
    ) -> DeviceDecision:
        """Keep every assignment as `keep_all` does, without a host sync. Collective over EP."""
        order, pending = self._start_loads(routing, clock, overlap, layout, None)
        return DeviceDecision(
            ids_TM=routing.topk_ids_TK,
            weights_TM=routing.topk_weights_TK,
            order=order,
            after_WE=pending.wait(),
        )
