"""Pipeline: chunks of rows through dispatch, experts and combine, each while others travel.

Steps 5 to 7 of `layer.py`. With one chunk it is the plain sequence; `overlap.py` says what a chunk
is and shows the order of the collectives.

Legend: D model dim, A rows sent, R rows received.
"""

from __future__ import annotations

from contextlib import suppress

import torch

from engine.distributed.collectives import Pending
from engine.moe.dispatcher import Dispatcher
from engine.moe.experts import ExpertsBackend
from engine.moe.plan import DispatchPlan
from engine.ops.permute import gather_rows
from engine.profiling.phases import Phase, PhaseClock


class Pipeline:
    """Moves rows to the experts' ranks and their results back."""

    def __init__(self, dispatcher: Dispatcher, experts: ExpertsBackend) -> None:
        self._dispatcher = dispatcher
        self._experts = experts

    def run(self, x_TD: torch.Tensor, plans: list[DispatchPlan], clock: PhaseClock) -> torch.Tensor:
        """Return the results [A, D] of this rank's rows, in the order of the plans. Collective over
        EP: every rank must call, with as many plans.

        clock: told DISPATCH and COMBINE once a chunk, for the time that this rank waits. Where
        something fails, all that is under way is waited for first.
        """
        serial = len(plans) == 1
        sent = [plan.order.token_N.numel() for plan in plans]
        received = [plan.num_received for plan in plans]
        buffers = self._dispatcher.buffers(sum(sent), sum(received), x_TD)
        sends = buffers.send.split(sent)
        arrived, grouped = buffers.arrived.split(received), buffers.grouped.split(received)
        under_way: list[Pending] = []

        def start_out(index: int) -> Pending:
            plan = plans[index]
            clock.enter(Phase.PLAN)
            gather_rows(x_TD, plan.order.token_N, sends[index])
            if serial:  # a span that holds a collective starts where the rank arrives at it
                clock.enter(Phase.DISPATCH)
            pending = self._dispatcher.start(
                sends[index], arrived[index], plan.send_splits, plan.recv_splits
            )
            under_way.append(pending)
            return pending

        def start_back(index: int, results: torch.Tensor) -> Pending:
            plan = plans[index]
            if serial:
                clock.enter(Phase.COMBINE)
            pending = self._dispatcher.start(
                results, sends[index], plan.recv_splits, plan.send_splits
            )
            under_way.append(pending)
            return pending

        try:
            coming = start_out(0)
            backs: list[Pending] = []
            for index, plan in enumerate(plans):
                following = start_out(index + 1) if index + 1 < len(plans) else None
                if not serial:
                    clock.enter(Phase.DISPATCH)
                rows = coming.wait()
                clock.enter(Phase.EXPERTS)
                results = self._compute(plan, rows, grouped[index])
                backs.append(start_back(index, results))
                if following is not None:
                    coming = following
            rows = buffers.send
            for back in backs:
                if not serial:
                    clock.enter(Phase.COMBINE)
                home = back.wait()
                rows = home if serial else rows
            return rows
        except BaseException:
            for pending in under_way:
                with suppress(RuntimeError):  # the first failure is the one to tell
                    pending.wait()
            raise

    def _compute(
        self, plan: DispatchPlan, arrived_RD: torch.Tensor, grouped_RD: torch.Tensor
    ) -> torch.Tensor:
        """Run this rank's experts on arrived rows; the results in the order of arrival."""
        if plan.arrival_R is None:
            return self._experts(arrived_RD, plan.expert_counts, grouped_RD)
        gather_rows(arrived_RD, plan.arrival_R, grouped_RD)
        results_RD = self._experts(grouped_RD, plan.expert_counts, arrived_RD)
        return grouped_RD.index_copy_(0, plan.arrival_R, results_RD)
