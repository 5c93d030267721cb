"""Pipeline: chunks of rows through dispatch, experts and combine, each while others travel.

Steps 5 to 7 of `layer.py`. With one chunk it is the plain sequence; `overlap.py` says what a chunk
is and shows the order of the collectives.

Legend: D model dim, A rows sent, R rows received.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from engine.distributed.collectives import Pending
from engine.moe.dispatcher import Dispatcher
from engine.moe.experts import ExpertsBackend
from engine.moe.plan import DispatchPlan
from engine.ops.permute import gather_rows
from engine.profiling.phases import Phase, PhaseClock


@dataclass(frozen=True, slots=True)
class _Trip:
    """An all-to-all under way. arrival: its number, None where the clock already stands at it."""

    phase: Phase
    pending: Pending
    num_rows: int
    num_bytes: int
    arrival: int | None


class Pipeline:
    """Moves rows to the experts' ranks and their results back."""

    def __init__(self, dispatcher: Dispatcher, experts: ExpertsBackend, layer: int) -> None:
        self._dispatcher = dispatcher
        self._experts = experts
        self._layer = layer

    def run(self, x_TD: torch.Tensor, plans: list[DispatchPlan], clock: PhaseClock) -> torch.Tensor:
        """Return the results [A, D] of this rank's rows, in the order of the plans. Collective over
        EP: every rank must call, with as many plans.

        clock: told DISPATCH and COMBINE once a chunk, for the time that this rank waits. Where
        something fails, all that is under way is waited for first.
        """
        serial, layer = len(plans) == 1, self._layer
        sent = [plan.order.token_N.numel() for plan in plans]
        received = [plan.num_received for plan in plans]
        buffers = self._dispatcher.buffers(sum(sent), sum(received), x_TD)
        sends = buffers.send.split(sent)
        arrived, grouped = buffers.arrived.split(received), buffers.grouped.split(received)
        under_way: list[_Trip] = []

        def start(
            phase: Phase,
            rows: torch.Tensor,
            into: torch.Tensor,
            send_splits: list[int],
            recv_splits: list[int],
        ) -> _Trip:
            num_bytes, arrival = self._dispatcher.remote_bytes(rows, send_splits), None
            if serial:  # the rank waits at once
                clock.meet(phase, layer, rows.shape[0])
                clock.sent(num_bytes)
            else:
                arrival = clock.arrive()
            pending = self._dispatcher.start(rows, into, send_splits, recv_splits)
            under_way.append(_Trip(phase, pending, rows.shape[0], num_bytes, arrival))
            return under_way[-1]

        def wait(trip: _Trip) -> torch.Tensor:
            if trip.arrival is not None:
                clock.meet(trip.phase, layer, trip.num_rows, trip.arrival)
                clock.sent(trip.num_bytes)
            return trip.pending.wait()

        def start_out(index: int) -> _Trip:
            plan = plans[index]
            clock.enter(Phase.PLAN, layer)
            gather_rows(x_TD, plan.order.token_N, sends[index])
            return start(
                Phase.DISPATCH, sends[index], arrived[index], plan.send_splits, plan.recv_splits
            )

        def start_back(index: int, results: torch.Tensor) -> _Trip:
            plan = plans[index]
            return start(Phase.COMBINE, results, sends[index], plan.recv_splits, plan.send_splits)

        try:
            coming = start_out(0)
            backs: list[_Trip] = []
            for index, plan in enumerate(plans):
                following = start_out(index + 1) if index + 1 < len(plans) else None
                rows = wait(coming)
                clock.enter(Phase.EXPERTS, layer, plan.num_received)
                results = self._compute(plan, rows, grouped[index])
                backs.append(start_back(index, results))
                if following is not None:
                    coming = following
            rows = buffers.send
            for back in backs:
                home = wait(back)
                rows = home if serial else rows
            return rows
        except BaseException:
            for trip in under_way:
                with suppress(RuntimeError):  # the first failure is the one to tell
                    trip.pending.wait()
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
