"""Layer device: calls of an MoE layer whose row counts stay on the device.

Steps 3 to 7 of `layer.py` over a transport of `dispatch/transports/`: the decision is the counted
way's, rows come into a buffer of bounded size in the order of their experts, and nothing is read on
the host. Loads, and scores that are not finite, are read a step late.

A layer takes this way in every call where it has a transport, but for the two that have another:
the static exchange of small steps, and a step in which extras are added (a capacity policy that was
set after the start; `dispatch/transports/choice.py` refuses the setting).

Legend: T tokens of this rank, D width of rows, E instances.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.exchange import Exchange
from engine.moe.dispatch.transports.transport import DeviceTransport, Outgoing
from engine.moe.layer_agreement import LayerAgreement
from engine.moe.local_experts import LocalExperts
from engine.moe.router import Routing
from engine.moe.step import MoEStep
from engine.ops.permute import combine_rows
from engine.profiling.phase_clock import Phase
from engine.profiling.telemetry import Telemetry


class DeviceCalls:
    """The calls of one layer over a transport.

    Args:
        transport: of the layer; None: it has none.
        agreement: of the layer.
        exchange: whose collectives are counted.
        experts: of this rank.
        layer: its index.
    """

    def __init__(
        self,
        transport: DeviceTransport | None,
        *,
        agreement: LayerAgreement,
        exchange: Exchange,
        experts: LocalExperts,
        layer: int,
    ) -> None:
        self.transport = transport
        self._agreement, self._experts, self._layer = agreement, experts, layer
        self._collectives = exchange.collectives
        self._layout = ExpertLayout(agreement.instances.first_instances, 1)

    def serves(self, step: MoEStep | None, micro_batch: int | None) -> bool:
        """Return whether a call goes this way, the same on every rank."""
        return (
            self.transport is not None
            and micro_batch is None
            and not (self._agreement.adds_extras and self._agreement.applies(step))
        )

    def run(
        self,
        x_TD: torch.Tensor,
        routing: Routing,
        scale_E: torch.Tensor | None,
        step: MoEStep | None,
        group_tokens: int | None,
        telemetry: Telemetry,
        overlap: Callable[[], None] | None,
        *,
        weights_on_input: bool,
    ) -> torch.Tensor:
        """Return the sums of this rank's tokens [T, D]. Collective over EP: every rank must call.

        Args:
            x_TD: rows to send, as `ExpertRows.before` makes them.
            routing: of this rank's tokens.
            scale_E: float32, by which results of each expert are multiplied; None: by nothing.
            step: which tokens are subject to capacity.
            group_tokens: of the call over all ranks; None: not known.
            telemetry: of the layer.
            overlap: work to do while the ranks agree.
            weights_on_input: whether rows bear their weights.
        """
        transport, agreement = self.transport, self._agreement
        clock, layer = telemetry.clock, self._layer
        assert transport is not None
        decision = agreement.agree_on_device(routing, step, telemetry, overlap, self._layout)
        weights_TK = decision.weights_TM
        if weights_on_input:
            weights_TK = torch.ge(decision.ids_TM, 0, out=torch.empty_like(weights_TK))
        elif scale_E is not None:
            weights_TK = agreement.scaled(decision, scale_E).weights_TM
        most = agreement.most_received(group_tokens)
        clock.enter_collective(Phase.DISPATCH, layer)
        outgoing = Outgoing(x_TD, decision.ids_TM, weights_TK, decision.order, most, group_tokens)
        arrived = transport.dispatch(outgoing).wait()
        clock.enter(Phase.EXPERTS, layer)
        out_RD = self._experts.run_bounded(arrived.rows_RD, arrived.places_e)
        clock.enter_collective(Phase.COMBINE, layer)
        returned = transport.combine(arrived, out_RD)
        self._collectives.num_collectives += 2  # of how many bytes the host does not know
        clock.enter(Phase.PLAN, layer)
        return combine_rows(*returned)
