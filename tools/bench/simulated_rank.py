"""Simulated rank: one rank of the MoE layer without the others, its collectives replaced.

`simulated_ranks.py` runs several, one at a time. Collectives of the agreement return answers that
were computed beforehand; an all-to-all returns as many rows as would be received, with arbitrary
contents, so outputs mean nothing.

Legend: T tokens of this rank, D model dim, W ranks.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from bench.moe_case import MoEShape, MoEWeights
from bench.transfers import Kind
from engine.config import DispatchConfig, MoEConfig
from engine.distributed.collectives import COLLECTIVE_BYTES, Done, Pending
from engine.distributed.groups import Group, Topology
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.exchange import AllToAll, Exchange
from engine.moe.dispatch.plan import DispatchPlan
from engine.moe.layer import MoELayer
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec
from engine.moe.step import MoEStep
from engine.profiling.device_clocks import NoClock, make_clock
from engine.profiling.phase_clock import Phase

ALL_TO_ALLS = (Phase.DISPATCH, Phase.COMBINE)


class Unanswered(Exception):
    """A rank called a collective that not all ranks have reached yet."""

    def __init__(self, kind: Kind, part: torch.Tensor) -> None:
        super().__init__(kind)
        self.kind: Kind = kind
        self.part = part


class AnsweredCollectives:
    """`Collectives` of one simulated rank: returns the answers it was given, in order."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.bytes_sent = self.num_collectives = 0
        self.collective_bytes: float = COLLECTIVE_BYTES
        self._ready: list[torch.Tensor] = []

    def rewind(self, answers: list[torch.Tensor]) -> None:
        """Start again at the first of these answers, each of which is returned as a copy."""
        self._ready = [answer.clone() for answer in reversed(answers)]

    def all_gather(self, part: torch.Tensor) -> Pending:
        """Return [W, *part.shape].

        Raises:
            Unanswered: there is no answer yet.
        """
        return self._next("all_gather", part)

    def all_reduce(self, part: torch.Tensor) -> Pending:
        """Return the sum over ranks.

        Raises:
            Unanswered: there is no answer yet.
        """
        return self._next("all_reduce", part)

    def _next(self, kind: Kind, part: torch.Tensor) -> Pending:
        if not self._ready:
            raise Unanswered(kind, part.clone())
        return Done(self._ready.pop())


class RowlessExchange(Exchange):
    """All-to-alls that move no rows."""

    def start(self, rows: AllToAll) -> Pending:
        """Return `rows.recv` filled with a constant."""
        return Done(rows.recv.fill_(0.5))  # new memory may hold subnormal numbers, which are slow


class SimulatedRank(MoELayer):
    """One rank's layer and tokens x_TD, on their device and in their dtype.

    Ranks may share `row_buffers`: they run one at a time.
    """

    def __init__(
        self,
        shape: MoEShape,
        weights: MoEWeights,
        rank: int,
        size: int,
        x_TD: torch.Tensor,
        row_buffers: RowBuffers,
    ) -> None:
        device = x_TD.device
        topology, answered = _topology(rank, size, device), AnsweredCollectives(rank, size)
        router = RouterSpec(num_experts=shape.experts, top_k=shape.top_k, normalize=True)
        super().__init__(
            MoESpec(router=router, hidden=shape.hidden, ffn=shape.ffn),
            layer=0,
            topology=topology,
            # Rows without contents do not encode the experts they are for.
            config=MoEConfig(dispatch=DispatchConfig(deduplicate=False)),
            device=device,
            dtype=x_TD.dtype,
            row_buffers=row_buffers,
            exchange=RowlessExchange(topology.expert, answered),
        )
        self.answered = answered
        with torch.no_grad():
            self.gate.weight_ED.copy_(weights.gate_ED)
            for local, expert in enumerate(self.local_experts):
                w13_2FD, w2_DF = weights.w13_E2FD[expert], weights.w2_EDF[expert]
                self.experts.set_weights(local, w13_2FD, w2_DF)
        if device.type == "cuda":
            self.finalize_weights()
        self.x_TD = x_TD

    def ask(self, answers: list[torch.Tensor], step: MoEStep | None) -> DispatchPlan | Unanswered:
        """Route and agree; return the plan, or the first collective without an answer."""
        self.answered.rewind(answers)
        try:
            _, (plan,) = self.agreement.agree(
                self.route(self.x_TD), step, self.telemetry
            )  # one chunk
            return plan
        except Unanswered as asked:
            return asked

    def timed(self, answers: list[torch.Tensor], step: MoEStep | None) -> tuple[float, float]:
        """Run the layer; return seconds until dispatch and after it, without the all-to-alls."""
        self.answered.rewind(answers)
        self.telemetry.clock = clock = make_clock(self.x_TD.device)
        self(self.x_TD, step)
        clock.close_step()
        self.telemetry.clock = NoClock()
        spans = clock.read(ended=True)
        assert spans is not None
        seconds = (spans.ends - spans.starts) * 1e-9
        dispatch = int(np.flatnonzero(spans.phases == Phase.DISPATCH)[0])
        work = seconds[dispatch:][~np.isin(spans.phases[dispatch:], ALL_TO_ALLS)]
        return float(seconds[:dispatch].sum()), float(work.sum())


def _topology(rank: int, size: int, device: torch.device) -> Topology:
    """Return a topology without process groups: the layer's collectives are replaced."""
    no_group = cast(dist.ProcessGroup, None)
    world = Group(rank, size, tuple(range(size)), no_group)
    single = Group(0, 1, (rank,), no_group)
    return Topology(
        world=world,
        expert=world,
        tensor=single,
        control=world,
        counts=world,
        host_world=world,
        host_tensor=single,
        data_rank=rank,
        num_data=size,
        replica=0,
        device=device,
        store=dist.HashStore(),
        local_world_size=size,
        host="simulated",
    )
