"""Layer calls of several ranks in one process, for tests: real plans and payloads, the all-to-alls
are copies.

The experts are elementwise, so a row's result does not depend on the rows next to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.exchange import AllToAll
from engine.moe.dispatch.payload import make_payload
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
    """One layer call of all ranks."""

    outs: list[torch.Tensor]  # each rank's output
    plans: list[list[DispatchPlan]]  # each rank's
    sent: tuple[int, int]  # bytes to other ranks in dispatches and combines


def exchange(calls: list[AllToAll]) -> int:
    """Carry out one all-to-all; return the bytes that went to other ranks."""
    num_bytes = 0
    for target, own in enumerate(calls):
        parts = []
        for source, other in enumerate(calls):
            part = other.send.split(other.send_splits)[target]
            assert part.shape[0] == own.recv_splits[source], "splits of two ranks do not match"
            num_bytes += part.numel() * part.element_size() if source != target else 0
            parts.append(part.clone())
        own.recv.copy_(torch.cat(parts))
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
    """Run one layer call.

    Args:
        layout: of all ranks.
        ids: [T, M] of each rank, -1 where dropped.
        xs: [T, D] of each rank.
        ws: [T, M] of each rank.
        late: every all-to-all moves its rows as late as `pipeline.py` allows, otherwise at once.
        known: what each rank has of all ranks' counts [W, n]; everything by default.
    """
    orders = [layout.sort(part) for part in ids]
    if known is None:
        counts = [order.counts_to_exchange for order in orders]
        known = [torch.stack(counts).numpy()] * len(ids)
    plans = [layout.plans(order, known[rank], rank) for rank, order in enumerate(orders)]
    experts = [Scaled(first) for first in layout.first_experts[:-1]]
    payloads = [
        make_payload(x, w, plan, RowBuffers(), single_rank=len(ids) == 1)
        for x, w, plan in zip(xs, ws, plans, strict=True)
    ]

    def pack(chunk: int) -> list[AllToAll]:
        return [payload.pack_dispatch(chunk) for payload in payloads]

    def work(chunk: int, dispatches: list[AllToAll]) -> list[AllToAll]:
        combines = []
        for payload, run, rows in zip(payloads, experts, dispatches, strict=True):
            out_RD = run(*payload.unpack(chunk, rows.recv))
            combines.append(payload.pack_combine(chunk, out_RD))
        return combines

    last, dispatch_bytes, combine_bytes = layout.num_chunks - 1, 0, 0
    dispatches = pack(0)
    dispatch_bytes += 0 if late else exchange(dispatches)
    combines = []
    for chunk in range(last + 1):
        following = pack(chunk + 1) if chunk < last else []
        if late or following:
            dispatch_bytes += exchange(dispatches if late else following)
        combines.append(work(chunk, dispatches))
        combine_bytes += 0 if late else exchange(combines[-1])
        dispatches = following
    if late:
        combine_bytes = sum(exchange(each) for each in combines)
    outs = [
        combine_rows(payload.combined_SD, *plan[0].terms(w))
        for payload, plan, w in zip(payloads, plans, ws, strict=True)
    ]
    return Call(outs, plans, (dispatch_bytes, combine_bytes))
