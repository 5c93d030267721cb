"""One MoE call by a transport and by the NCCL way, on real ranks, with experts that only multiply.

An expert computes each row by itself to the same bits wherever the row is, so what differs is what
the transport did.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from engine.distributed.collectives import GroupCollectives
from engine.distributed.groups import Group
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.exchange import Exchange
from engine.moe.dispatch.pipeline import Pipeline
from engine.moe.dispatch.plan import ExpertOrder, make_plan
from engine.moe.dispatch.transports.transport import DeviceTransport, Limits, Outgoing, Setup
from engine.moe.dispatch.two_batch import run_to_end
from engine.ops.permute import combine_rows
from engine.ops.sort_by_expert import sort_by_expert
from engine.profiling.device_clocks import NoClock

WIDTH = 16


class Case(NamedTuple):
    """What the ranks route."""

    first_experts: tuple[int, ...]
    top_k: int
    counts: tuple[int, ...]  # tokens of each rank
    dropped: float = 0.0  # share of assignments that capacity has dropped


class Factors:
    """Expert j of the rank multiplies by its number over all ranks + 1, and adds half of it."""

    def __init__(self, setup: Setup) -> None:
        self.first = setup.first_experts[setup.group.rank]

    def __call__(
        self,
        rows_RD: torch.Tensor,
        expert_counts: list[int],
        out_RD: torch.Tensor | None = None,
        index_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run grouped rows, or those at the index; see `ExpertsBackend.__call__`."""
        out_RD = torch.empty_like(rows_RD) if out_RD is None else out_RD
        load_e = torch.tensor(expert_counts).to(rows_RD.device)
        grouped_RD = rows_RD if index_R is None else rows_RD[index_R]
        made_RD = self.run_bounded(grouped_RD, load_e)
        return out_RD.copy_(made_RD) if index_R is None else out_RD.index_copy_(0, index_R, made_RD)

    def run_bounded(self, rows_RD: torch.Tensor, load_e: torch.Tensor) -> torch.Tensor:
        """Run the first rows; the others come out as what nobody may read."""
        place_R = torch.arange(rows_RD.shape[0], device=rows_RD.device)
        expert_R = torch.searchsorted(load_e.cumsum(0), place_R, right=True)
        factor_R1 = (expert_R + self.first + 1)[:, None].to(rows_RD.dtype)
        made_RD = rows_RD * factor_R1 + factor_R1 / 2
        return made_RD.masked_fill((place_R >= load_e.sum())[:, None], torch.nan)


def setup_of(case: Case, group: Group, device: torch.device | None = None) -> Setup:
    """Return the setup of a case."""
    return Setup(
        group=group,
        device=device or torch.device("cpu"),
        dtype=torch.bfloat16,
        width=WIDTH,
        first_experts=case.first_experts,
        top_k=case.top_k,
    )


def limits_of(case: Case) -> Limits:
    """Return limits that no call exceeds, though one may reach them."""
    tokens = max(case.counts)
    most = max(b - a for a, b in pairwise(case.first_experts))
    received = len(case.counts) * tokens * min(case.top_k, most)
    return Limits(tokens=tokens, sent=tokens * case.top_k, received=received)


def routed(case: Case, rank: int, seed: int = 0, device: str = "cpu") -> Outgoing:
    """Return the tokens of a rank, which prefer the first experts."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    num, total = case.counts[rank], case.first_experts[-1]
    x_TD = torch.randn(num, WIDTH, generator=generator).bfloat16()
    score_TE = torch.rand(num, total, generator=generator) - 0.05 * torch.arange(total)
    ids_TK = score_TE.topk(case.top_k).indices
    lost_TK = torch.rand(num, case.top_k, generator=generator) < case.dropped
    ids_TK = ids_TK.masked_fill(lost_TK, -1)
    weights_TK = torch.rand(num, case.top_k, generator=generator)
    x_TD, ids_TK, weights_TK = (each.to(device) for each in (x_TD, ids_TK, weights_TK))
    order = ExpertOrder(*sort_by_expert(ids_TK, total))
    most = min(case.top_k, max(b - a for a, b in pairwise(case.first_experts)))
    return Outgoing(
        x_TD,
        ids_TK,
        weights_TK,
        order,
        most_received=sum(case.counts) * most,
        most_tokens=max(case.counts),
    )


def by_transport(transport: DeviceTransport, setup: Setup, outgoing: Outgoing) -> torch.Tensor:
    """Return the sums of a rank's tokens, [T, D]."""
    arrived = transport.dispatch(outgoing).wait()
    assert arrived.load_e.shape == (setup.num_local,)
    out_RD = Factors(setup).run_bounded(arrived.rows_RD, arrived.places_e)
    return combine_rows(*transport.combine(arrived, out_RD))


def by_nccl(setup: Setup, outgoing: Outgoing) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of a rank's tokens the NCCL way, and those of its ranks' partial sums."""
    group, order = setup.group, outgoing.order
    collectives = GroupCollectives(group)
    counts_WE = collectives.all_gather(order.load_E).wait().cpu().view(group.size, -1).numpy()
    plan = make_plan(order, counts_WE, group.rank, list(setup.first_experts))
    pipeline = Pipeline(Exchange(group, collectives), Factors(setup), RowBuffers(), 0)  # pyright: ignore[reportArgumentType]
    steps = pipeline.steps(outgoing.x_TD, outgoing.weights_TK, [plan], NoClock())
    rows_SD = run_to_end(steps)
    slot_TK, weights_TK = plan.terms(outgoing.weights_TK)
    whole_TD = combine_rows(rows_SD, slot_TK, weights_TK)
    total_TD = torch.zeros_like(outgoing.x_TD, dtype=torch.float32)
    for first, end in pairwise(setup.first_experts):
        of_rank = (outgoing.ids_TK >= first) & (outgoing.ids_TK < end)
        place_TK, order_TK = slot_TK.where(of_rank, -1).sort(1)  # in the order of the experts
        total_TD += combine_rows(rows_SD, place_TK, weights_TK.gather(1, order_TK)).float()
    return whole_TD, total_TD.to(outgoing.x_TD.dtype)
