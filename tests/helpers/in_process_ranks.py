"""Layer calls of several ranks in one process, for tests: real plans and freight, the all-to-alls
are copies.

The experts are elementwise, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.payload import AllToAll, load
from engine.moe.dispatch.plan import DispatchPlan
from engine.ops.permute import combine_rows


class Scaled:
    """Experts of one rank: expert e turns a row into tanh(row) * (e + 2), elementwise."""

    name = "scaled"

    def __init__(self, first_expert: int) -> None:
        self.first_expert = first_expert
        self.seen: list[torch.Tensor] = []

    def __call__(self, rows_RD, expert_counts, out_RD=None, index_R=None):
        if index_R is not None:
            results = torch.empty_like(rows_RD) if out_RD is None else out_RD
            results[index_R] = self(rows_RD[index_R], expert_counts)
            return results
        self.seen.append(rows_RD.clone())
        local = torch.arange(len(expert_counts)).repeat_interleave(torch.tensor(expert_counts))
        assert local.numel() == rows_RD.shape[0]
        factor_R1 = (local + self.first_expert + 2).to(rows_RD.dtype)[:, None]
        result = rows_RD.tanh() * factor_R1
        return result if out_RD is None else out_RD.copy_(result)


@dataclass
class Call:
    """outs: each rank's output. plans: each rank's. sent: bytes to other ranks, out and back."""

    outs: list[torch.Tensor]
    plans: list[list[DispatchPlan]]
    sent: tuple[int, int]


def travel(legs: list[AllToAll]) -> int:
    """Carry out one all-to-all; return the bytes that went to other ranks."""
    num_bytes = 0
    for target, leg in enumerate(legs):
        parts = []
        for source, other in enumerate(legs):
            part = other.rows.split(other.send_splits)[target]
            assert part.shape[0] == leg.recv_splits[source], "splits of two ranks do not match"
            num_bytes += part.numel() * part.element_size() if source != target else 0
            parts.append(part.clone())
        leg.into.copy_(torch.cat(parts))
    return num_bytes


def call(
    layout: ExpertLayout,
    ids: list[torch.Tensor],
    xs: list[torch.Tensor],
    ws: list[torch.Tensor],
    *,
    late: bool = False,
    known: list[np.ndarray] | None = None,
) -> Call:
    """One layer call. ids: [T, M] of each rank, -1 where dropped. xs: [T, D]. ws: [T, M].

    late: every all-to-all moves its rows as late as `pipeline.py` allows, otherwise at once. known:
    what each rank knows of all ranks' numbers [W, n]; everything by default.
    """
    orders = [layout.sort(part) for part in ids]
    if known is None:
        known = [torch.stack([order.numbers for order in orders]).numpy()] * len(ids)
    plans = [layout.plans(order, known[rank], rank) for rank, order in enumerate(orders)]
    firsts = layout.first_experts
    freights = [
        load(x, w, plan, Scaled(firsts[rank]), RowBuffers(), alone=len(ids) == 1)
        for rank, (x, w, plan) in enumerate(zip(xs, ws, plans, strict=True))
    ]

    def pack(index: int) -> list[AllToAll]:
        return [freight.pack(index) for freight in freights]

    last, out, back = layout.num_chunks - 1, 0, 0
    coming = pack(0)
    out += 0 if late else travel(coming)
    homeward = []
    for index in range(last + 1):
        following = pack(index + 1) if index < last else []
        out += travel(coming) if late else travel(following) if following else 0
        pairs = zip(freights, coming, strict=True)
        homeward.append([freight.work(index, leg.into) for freight, leg in pairs])
        back += 0 if late else travel(homeward[-1])
        coming = following
    if late:
        back = sum(travel(legs) for legs in homeward)
    outs = [
        combine_rows(freight.home, *plan[0].terms(w))
        for freight, plan, w in zip(freights, plans, ws, strict=True)
    ]
    return Call(outs, plans, (out, back))
