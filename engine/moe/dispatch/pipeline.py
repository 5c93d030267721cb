"""Pipeline: chunks of rows through dispatch, experts and combine, each while others travel.

Steps 5 to 7 of `layer.py`. With one chunk it is the plain sequence; `overlap.py` says what a chunk
is and shows the order of the collectives; `freight.py` says what is done to the rows.

Where a step is two half batches (`halves.py`), a call stops twice: while its rows are under way to
the experts, and on their way back.

Legend: T tokens, M columns of the decision, D model dim, A rows home.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from engine.distributed.collectives import Pending
from engine.moe.dispatch.exchange import Exchange
from engine.moe.dispatch.payload import AllToAll
from engine.moe.dispatch.plan import DispatchPlan
from engine.moe.dispatch.two_batch import Stages
from engine.moe.experts import ExpertsBackend
from engine.profiling.phase_clock import Phase, PhaseClock


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

    def __init__(self, dispatcher: Exchange, experts: ExpertsBackend, layer: int) -> None:
        self._dispatcher = dispatcher
        self._experts = experts
        self._layer = layer

    def stages(
        self,
        x_TD: torch.Tensor,
        weights_TM: torch.Tensor,
        plans: list[DispatchPlan],
        clock: PhaseClock,
        *,
        stops: bool = False,
    ) -> Stages[torch.Tensor]:
        """Return the rows [A, D] that came home, in the order of the plans; `DispatchPlan.terms`
        says which of them make up a token. Collective over EP: every rank must call, with as many
        plans.

        weights_TM: float32 combine weights. clock: told DISPATCH and COMBINE once a chunk, for the
        time that this rank waits. stops: yield where all there is to do is to wait. Where something
        fails, or the generator is closed, all that is under way is waited for first.
        """
        serial, layer = len(plans) == 1 and not stops, self._layer
        freight = self._dispatcher.load(x_TD, weights_TM, plans, self._experts)
        under_way: list[_Trip] = []

        def start(phase: Phase, leg: AllToAll) -> _Trip:
            rows = leg.rows
            num_bytes, arrival = self._dispatcher.remote_bytes(rows, leg.send_splits), None
            if serial:  # the rank waits at once
                clock.enter_collective(phase, layer, rows.shape[0])
                clock.sent(num_bytes)
            else:
                arrival = clock.record_arrival()
            pending = self._dispatcher.start(rows, leg.into, leg.send_splits, leg.recv_splits)
            under_way.append(_Trip(phase, pending, rows.shape[0], num_bytes, arrival))
            return under_way[-1]

        def wait(trip: _Trip) -> torch.Tensor:
            if trip.arrival is not None:
                clock.enter_collective(trip.phase, layer, trip.num_rows, trip.arrival)
                clock.sent(trip.num_bytes)
            return trip.pending.wait()

        def start_out(index: int) -> _Trip:
            clock.enter(Phase.PLAN, layer)
            return start(Phase.DISPATCH, freight.pack(index))

        try:
            coming = start_out(0)
            if stops:
                yield
            backs: list[_Trip] = []
            for index, plan in enumerate(plans):
                following = start_out(index + 1) if index + 1 < len(plans) else None
                arrived = wait(coming)
                clock.enter(Phase.EXPERTS, layer, plan.num_received)
                backs.append(start(Phase.COMBINE, freight.work(index, arrived)))
                if following is not None:
                    coming = following
            if stops:
                yield
            rows = freight.home
            for back in backs:
                home = wait(back)
                rows = home if len(plans) == 1 else rows
            return rows
        except BaseException:
            for trip in under_way:
                with suppress(RuntimeError):  # the first failure is the one to tell
                    trip.pending.wait()
            raise
