"""Pipeline: chunks of rows through dispatch, experts and combine, overlapped with each other.

Steps 5 to 7 of `layer.py`. With one chunk it is the plain sequence; `chunk_layout.py` defines
chunks and shows the order of the collectives, `payload.py` packs and unpacks the rows.

In a step of two micro-batches (`two_batch.py`) a call yields twice: while its rows are dispatched,
and while the results are combined.

Legend: T tokens, M columns of the decision, D model dim, S rows sent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from engine.distributed.collectives import Pending
from engine.moe.dispatch.buffers import RowBuffers, Slot
from engine.moe.dispatch.exchange import AllToAll, Exchange
from engine.moe.dispatch.payload import make_payload
from engine.moe.dispatch.plan import DispatchPlan, ExpertOrder
from engine.moe.dispatch.rounds import Round
from engine.moe.dispatch.two_batch import Steps, run_to_end
from engine.moe.experts import ExpertsBackend
from engine.ops.permute import gather_rows
from engine.profiling.phase_clock import Phase, PhaseClock


@dataclass(frozen=True, slots=True)
class _InFlight:
    """An all-to-all that has been started."""

    phase: Phase
    pending: Pending
    num_rows: int
    num_bytes: int
    arrival: int | None  # the clock's number of it; None: the clock has entered it already


class Pipeline:
    """Exchanges the rows of one layer's calls and runs its experts on them.

    shared: the shared expert, where its rows may move.
    """

    def __init__(
        self,
        exchange: Exchange,
        experts: ExpertsBackend,
        buffers: RowBuffers,
        layer: int,
        shared: nn.Module | None = None,
    ) -> None:
        self._exchange, self._experts, self._shared = exchange, experts, shared
        self._buffers, self._layer = buffers, layer

    def pack(self, x_TD: torch.Tensor, clock: PhaseClock, order: ExpertOrder) -> None:
        """Fill the send buffer before it is known how many rows go where, for rows in the model's
        dtype that are sent once per assignment: a GPU packs while the counts travel.
        """
        clock.enter(Phase.PLAN, self._layer)
        send_ND = self._buffers.rows(Slot.SEND, order.token_N.numel(), x_TD)
        gather_rows(x_TD, order.token_N, send_ND)

    def rounds(
        self,
        x_TD: torch.Tensor,
        weights_TM: torch.Tensor,
        rounds: list[Round],
        clock: PhaseClock,
    ) -> torch.Tensor:
        """Run the rounds of a call one after the other; return the combined rows [S, D] in the
        order of the call. Collective over EP: every rank must call, with as many rounds.
        """
        num_rows = sum(each.places_S.numel() for each in rounds)
        rows_SD = x_TD.new_empty((num_rows, x_TD.shape[1]))
        for each in rounds:
            part = run_to_end(self.steps(x_TD, weights_TM, [each.plan], clock))
            rows_SD.index_copy_(0, each.places_S, part)
        return rows_SD

    def steps(
        self,
        x_TD: torch.Tensor,
        weights_TM: torch.Tensor,
        plans: list[DispatchPlan],
        clock: PhaseClock,
        *,
        yields: bool = False,
        packed: bool = False,
        overlap: Callable[[], None] | None = None,
    ) -> Steps[torch.Tensor]:
        """Return the combined rows [S, D], in the order of the plans; `DispatchPlan.terms` maps
        them to tokens. Collective over EP: every rank must call, with as many plans.

        Where something fails, or the generator is closed, every collective in flight is waited for
        first.

        Args:
            x_TD: this rank's tokens.
            weights_TM: float32 combine weights.
            plans: one per chunk.
            clock: enters DISPATCH and COMBINE once per chunk, for the time that this rank waits.
            yields: yield where there is nothing left to do but wait.
            packed: `pack` has filled the send buffer.
            overlap: work to do while the first rows are in flight.
        """
        serial = len(plans) == 1 and not yields and overlap is None
        layer, exchange = self._layer, self._exchange
        payload = make_payload(
            x_TD,
            weights_TM,
            plans,
            self._buffers,
            single_rank=exchange.is_single_rank,
            packed=packed,
            shared=self._shared,
        )
        in_flight: list[_InFlight] = []

        def start(phase: Phase, rows: AllToAll) -> _InFlight:
            num_rows, num_bytes, arrival = rows.send.shape[0], exchange.remote_bytes(rows), None
            if serial:  # this rank waits at once
                clock.enter_collective(phase, layer, num_rows)
                clock.sent(num_bytes)
            else:
                arrival = clock.record_arrival()
            in_flight.append(_InFlight(phase, exchange.start(rows), num_rows, num_bytes, arrival))
            return in_flight[-1]

        def wait(started: _InFlight) -> torch.Tensor:
            if started.arrival is not None:
                clock.enter_collective(started.phase, layer, started.num_rows, started.arrival)
                clock.sent(started.num_bytes)
            return started.pending.wait()

        def start_dispatch(chunk: int) -> _InFlight:
            clock.enter(Phase.PLAN, layer)
            return start(Phase.DISPATCH, payload.pack_dispatch(chunk))

        try:
            dispatch = start_dispatch(0)
            if overlap is not None:
                clock.enter(Phase.EXPERTS, layer)
                overlap()
            if yields:
                yield
            combines: list[_InFlight] = []
            for chunk, plan in enumerate(plans):
                following = start_dispatch(chunk + 1) if chunk + 1 < len(plans) else None
                payload.prepare(chunk)
                recv = wait(dispatch)
                clock.enter(Phase.EXPERTS, layer, plan.num_received)
                out_RD = self._experts(*payload.unpack(chunk, recv))
                combines.append(start(Phase.COMBINE, payload.pack_combine(chunk, out_RD)))
                if following is not None:
                    dispatch = following
            if yields:
                yield
            results = [wait(combine) for combine in combines]
            return results[0] if len(plans) == 1 else payload.combined_SD
        except BaseException:
            for started in in_flight:
                with suppress(RuntimeError):  # the first failure is the one to report
                    started.pending.wait()
            raise
