"""Payload: one layer call's rows between the tokens, the wire and the experts.

`pipeline.py` says when; this says what each all-to-all carries and what is done to rows before and
after it. Rows live in the three buffers of `workspace.py`:

    SEND      packed rows on their way out; later the results that came home
    ARRIVED   rows as they arrive; later the experts' results
    GROUPED   results in the order of arrival, on their way home; in a wire format, and for experts
              that need it, first the rows by expert

Rows travel as they are (`RowPayload`) or in a wire format (`PackedPayload`). A wire row may be
longer than a row, so the wire rows of chunk c begin where its rows would, or after those of chunk c
- 1 where these reach further: they lie over rows of their own and later chunks alone, which are
written when the wire rows of both are spent.

Legend: T tokens, D model dim, A rows home, R rows received, U unique rows sent, V unique rows
received, L bytes of a wire row, e experts of the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from engine.moe.dispatch.buffers import RowBuffers, Slot
from engine.moe.dispatch.dedup import read_bits, rows_by_expert
from engine.moe.dispatch.plan import DispatchPlan
from engine.moe.dispatch.row_format import RowFormat
from engine.moe.experts import ExpertsBackend
from engine.ops.permute import combine_rows, gather_rows


@dataclass(frozen=True, slots=True)
class AllToAll:
    """An all-to-all to be started: rows and where others' go, with the splits of both."""

    rows: torch.Tensor
    into: torch.Tensor
    send_splits: list[int]
    recv_splits: list[int]


class Payload(Protocol):
    """One layer call's rows. home: [A, D], complete once every chunk's way back has ended."""

    home: torch.Tensor

    def pack(self, index: int) -> AllToAll:
        """Make chunk `index` ready to go out."""
        ...

    def work(self, index: int, arrived: torch.Tensor) -> AllToAll:
        """Run the experts on what has arrived of chunk `index`; its results' way home."""
        ...


class RowPayload:
    """Rows travel as they are, one an assignment."""

    def __init__(
        self,
        x_TD: torch.Tensor,
        plans: list[DispatchPlan],
        experts: ExpertsBackend,
        workspace: RowBuffers,
        *,
        alone: bool,
    ) -> None:
        """alone: one rank; nothing travels, and what is packed is what the experts read."""
        self._x_TD, self._plans, self._experts = x_TD, plans, experts
        sent = [plan.order.token_N.numel() for plan in plans]
        received = [plan.num_received for plan in plans]
        rows = workspace.rows
        self.home = rows(Slot.SEND, sum(sent), x_TD)
        arrived = self.home if alone else rows(Slot.ARRIVED, sum(received), x_TD)
        results = rows(Slot.ARRIVED if alone else Slot.GROUPED, sum(received), x_TD)
        if len(plans) == 1:
            self._sends, self._arrived, self._results = (self.home,), (arrived,), (results,)
        else:
            self._sends = self.home.split(sent)
            self._arrived, self._results = arrived.split(received), results.split(received)

    def pack(self, index: int) -> AllToAll:
        """Gather the tokens' rows by rank and expert."""
        plan, send = self._plans[index], self._sends[index]
        gather_rows(self._x_TD, plan.order.token_N, send)
        return AllToAll(send, self._arrived[index], plan.send_splits, plan.recv_splits)

    def work(self, index: int, arrived: torch.Tensor) -> AllToAll:
        """Run the experts on the rows where they lie; results come in the order of arrival."""
        plan = self._plans[index]
        results_RD = self._experts(
            arrived, plan.expert_counts, self._results[index], plan.arrival_R
        )
        return AllToAll(results_RD, self._sends[index], plan.recv_splits, plan.send_splits)


class PackedPayload:
    """Rows travel in a wire format, once a rank or once an assignment."""

    def __init__(
        self,
        x_TD: torch.Tensor,
        weights_TM: torch.Tensor,
        plans: list[DispatchPlan],
        experts: ExpertsBackend,
        workspace: RowBuffers,
    ) -> None:
        wire = plans[0].wire
        assert wire is not None, "rows that go as they are need no wire format"
        self._wire, self._plans, self._experts = wire, plans, experts
        self._encoded = wire.encode(x_TD)
        sent = [plan.order.token_N.numel() for plan in plans]
        received = [plan.num_received for plan in plans]
        home = sent
        self._weights_CE: torch.Tensor | None = None
        self._bits_CB: torch.Tensor | None = None
        if (once := plans[0].once) is not None:
            self._bits_CB = once.rows.bits_TGB.flatten(0, 1)
            if plans[0].partial:
                home = [sum(_splits(plan)[0]) for plan in plans]
                weights = once.groups.weights(once.rows, weights_TM)
                self._weights_CE = weights.flatten(0, 1)
        out = [sum(_splits(plan)[0]) for plan in plans]
        into = [sum(_splits(plan)[1]) for plan in plans]
        row = x_TD.shape[1] * x_TD.element_size()
        out_starts, out_end = packed_offsets(
            [row * n for n in home], [wire.row_bytes * n for n in out]
        )
        in_starts, in_end = packed_offsets(
            [row * n for n in received], [wire.row_bytes * n for n in into]
        )
        # The larger view first: a buffer that grows forgets what it held.
        send = workspace.bytes(Slot.SEND, max(out_end, row * sum(home)), x_TD.device)
        arrived = workspace.bytes(Slot.ARRIVED, max(in_end, row * sum(received)), x_TD.device)
        self.home = workspace.rows(Slot.SEND, sum(home), x_TD)
        self._homes = self.home.split(home)
        self._results = workspace.rows(Slot.ARRIVED, sum(received), x_TD).split(received)
        self._grouped = workspace.rows(Slot.GROUPED, sum(received), x_TD).split(received)
        self._sends = _rows_at(send, out_starts, out, wire)
        self._arrived = _rows_at(arrived, in_starts, into, wire)

    def pack(self, index: int) -> AllToAll:
        """Write the tokens' rows, and what the receiver must know of them, into wire rows."""
        plan, out_UL = self._plans[index], self._sends[index]
        once = plan.once
        token_U = plan.order.token_N if once is None else once.token_U
        self._wire.pack(self._encoded, token_U, out_UL)
        if once is not None and self._bits_CB is not None:
            weights_Ue = self._weights_CE
            if weights_Ue is not None:
                weights_Ue = weights_Ue.index_select(0, once.cell_U)
            self._wire.pack_header(self._bits_CB.index_select(0, once.cell_U), weights_Ue, out_UL)
        return AllToAll(out_UL, self._arrived[index], *_splits(plan))

    def work(self, index: int, arrived: torch.Tensor) -> AllToAll:
        """Read rows by expert, run the experts, and put results in the order of their way home."""
        plan, wire = self._plans[index], self._wire
        grouped_RD, results_RD = self._grouped[index], self._results[index]
        send_splits, recv_splits = plan.recv_splits, plan.send_splits
        index_R, slot_Ve, weights_Ve = plan.arrival_R, None, None
        if plan.once is not None:
            num_experts = plan.once.num_experts
            flags_eV = read_bits(wire.bits(arrived), num_experts)
            index_R, slot_Ve = rows_by_expert(flags_eV, plan.num_received)
            if plan.partial:  # a copy: the results will lie over the arrived rows
                weights_Ve = wire.weights(arrived)[:, :num_experts].clone()
                recv_splits, send_splits = _splits(plan)
        wire.unpack(arrived, index_R, grouped_RD)
        results_RD = self._experts(grouped_RD, plan.expert_counts, results_RD)
        if slot_Ve is not None and weights_Ve is not None:
            results_RD = combine_rows(results_RD, slot_Ve, weights_Ve)
        elif plan.arrival_R is not None:
            results_RD = grouped_RD.index_copy_(0, plan.arrival_R, results_RD)
        return AllToAll(results_RD, self._homes[index], send_splits, recv_splits)


def load(
    x_TD: torch.Tensor,
    weights_TM: torch.Tensor,
    plans: list[DispatchPlan],
    experts: ExpertsBackend,
    workspace: RowBuffers,
    *,
    alone: bool,
) -> Payload:
    """The freight of one layer call, as its plans say. weights_TM: combine weights. alone: one
    rank.
    """
    if plans[0].wire is None:
        return RowPayload(x_TD, plans, experts, workspace, alone=alone)
    return PackedPayload(x_TD, weights_TM, plans, experts, workspace)


def packed_offsets(row_bytes: list[int], wire_bytes: list[int]) -> tuple[list[int], int]:
    """Where each chunk's wire rows begin, a multiple of 16 bytes, and where the last ones end.

    row_bytes, wire_bytes: of each chunk. Worked example: rows of 32, 16 and 64 bytes, wire rows of
    64, 32 and 16: they begin at 0, 64 (the rows of chunk 1 at 32) and 96 (at 48), and end at 112.
    """
    starts, end = [], 0
    for begin, size in zip(accumulate(row_bytes, initial=0), wire_bytes, strict=False):
        start = -(-max(begin, end) // 16) * 16
        starts.append(start)
        end = start + size
    return starts, end


def _splits(plan: DispatchPlan) -> tuple[list[int], list[int]]:
    """Splits of the way out."""
    way = plan if plan.once is None else plan.once
    return way.send_splits, way.recv_splits


def _rows_at(
    buffer: torch.Tensor, starts: list[int], counts: list[int], wire: RowFormat
) -> list[torch.Tensor]:
    length = wire.row_bytes
    return [
        buffer[start : start + count * length].view(count, length)
        for start, count in zip(starts, counts, strict=True)
    ]
