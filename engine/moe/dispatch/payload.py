"""Payload: the rows that one MoE call exchanges, and the buffers they use.

`pipeline.py` schedules the all-to-alls. A payload fills the send buffer of each one and interprets
what was received. `RowPayload` sends rows in the model's dtype, `PackedPayload` in a packed format
(`row_format.py`), deduplicated per rank where the plan has unique rows.

    SEND      rows to dispatch; later the combined results
    RECV      received rows; later the experts' outputs
    EXPERT    outputs in receive order, ready to combine; for packed rows first the rows by expert

A packed row may be longer than a row, so the packed rows of chunk c begin at the offset of its
unpacked rows, or after those of chunk c - 1 where these reach further: they overlap rows of their
own and later chunks alone, which are written when the packed rows of both have been read.

Legend: T tokens, M columns of the decision, D model dim, S rows sent, R rows received, U unique
rows sent, V unique rows received, L bytes of a packed row, e experts of the chunk, C cells.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import nn

from engine.moe.dispatch.buffers import RowBuffers, Slot
from engine.moe.dispatch.exchange import AllToAll
from engine.moe.dispatch.plan import DispatchPlan
from engine.moe.dispatch.row_format import RowFormat
from engine.ops.permute import combine_rows, gather_rows
from engine.ops.unique_rows import rows_by_expert


class ExpertRows(NamedTuple):
    """What the experts work on: the arguments of `ExpertsBackend.__call__`."""

    rows_RD: torch.Tensor
    expert_counts: list[int]  # rows of each local expert
    out_RD: torch.Tensor  # a buffer for the results
    index_R: torch.Tensor | None  # int64, where the rows of each expert are; None: grouped


class Payload(Protocol):
    """The rows of one MoE call."""

    combined_SD: torch.Tensor  # results for this rank's tokens; valid once every combine completed

    def pack_dispatch(self, chunk: int) -> AllToAll:
        """Fill the send buffer of `chunk`."""
        ...

    def prepare(self, chunk: int) -> None:
        """Do what unpacking `chunk` needs and the received rows do not, while they travel."""
        ...

    def unpack(self, chunk: int, recv: torch.Tensor) -> ExpertRows:
        """Return the received rows of `chunk` as the experts take them."""
        ...

    def pack_combine(self, chunk: int, out_RD: torch.Tensor) -> AllToAll:
        """Prepare the experts' outputs for the combine of `chunk`, the last one unpacked."""
        ...


class RowPayload:
    """Rows in the model's dtype, one per assignment.

    Args:
        x_TD: this rank's tokens.
        plans: one per chunk.
        buffers: where rows are sent from and received.
        single_rank: nothing is exchanged, so the experts read the send buffer.
        packed: the send buffer holds the rows already.
    """

    def __init__(
        self,
        x_TD: torch.Tensor,
        plans: list[DispatchPlan],
        buffers: RowBuffers,
        *,
        single_rank: bool,
        packed: bool = False,
    ) -> None:
        self._x_TD, self._plans, self._packed = x_TD, plans, packed
        sent = [plan.order.token_N.numel() for plan in plans]
        received = [plan.num_received for plan in plans]
        self.combined_SD = buffers.rows(Slot.SEND, sum(sent), x_TD)
        recv, out_slot = self.combined_SD, Slot.RECV
        if not single_rank:
            recv, out_slot = buffers.rows(Slot.RECV, sum(received), x_TD), Slot.EXPERT
        out = buffers.rows(out_slot, sum(received), x_TD)
        if len(plans) == 1:
            self._send, self._recv, self._out = (self.combined_SD,), (recv,), (out,)
        else:
            self._send = self.combined_SD.split(sent)
            self._recv, self._out = recv.split(received), out.split(received)

    def pack_dispatch(self, chunk: int) -> AllToAll:
        """Gather the tokens' rows by rank and expert."""
        plan, send = self._plans[chunk], self._send[chunk]
        if not self._packed:
            gather_rows(self._x_TD, plan.order.token_N, send)
        return AllToAll(send, self._recv[chunk], plan.send_splits, plan.recv_splits)

    def prepare(self, chunk: int) -> None:
        """Make the receive index."""
        _ = self._plans[chunk].recv_index_R

    def unpack(self, chunk: int, recv: torch.Tensor) -> ExpertRows:
        """Return the rows in receive order; the experts read and write them there."""
        plan = self._plans[chunk]
        return ExpertRows(recv, plan.expert_counts, self._out[chunk], plan.recv_index_R)

    def pack_combine(self, chunk: int, out_RD: torch.Tensor) -> AllToAll:
        """Send each output back to the rank of its token, over the rows that were dispatched."""
        plan = self._plans[chunk]
        return AllToAll(out_RD, self._send[chunk], plan.recv_splits, plan.send_splits)


class PackedPayload:
    """Rows in a packed format, deduplicated per rank or one per assignment.

    Args:
        x_TD: this rank's tokens.
        weights_TM: float32 combine weights; sent with the rows where these are pre-reduced.
        plans: one per chunk, all with a row format.
        buffers: where rows are sent from and received.
        shared: the shared expert, where its rows may move.
    """

    def __init__(
        self,
        x_TD: torch.Tensor,
        weights_TM: torch.Tensor,
        plans: list[DispatchPlan],
        buffers: RowBuffers,
        shared: nn.Module | None = None,
    ) -> None:
        row_format = plans[0].row_format
        assert row_format is not None, "rows in the model's dtype need no row format"
        self._format, self._plans, self._shared = row_format, plans, shared
        self._encoded = row_format.encode(x_TD)
        combined = [plan.order.token_N.numel() for plan in plans]
        received = [plan.num_held for plan in plans]
        self._weights_Ce: torch.Tensor | None = None
        self._bits_CB: torch.Tensor | None = None
        if (unique := plans[0].unique) is not None:
            bits, moves = unique.rows.bits_TGB, unique.moves
            if plans[0].pre_reduced:
                combined = [sum(_dispatch_splits(plan)[0]) for plan in plans]
                weights = unique.groups.weights(unique.rows, weights_TM)
                if moves is not None and moves.num_moved:
                    bits, weights = moves.bits(bits), moves.weights(weights)
                self._weights_Ce = weights.flatten(0, 1)
            self._bits_CB = bits.flatten(0, 1)
        # Packed rows of each chunk, sent and received.
        num_send, num_recv = zip(
            *([sum(splits) for splits in _dispatch_splits(plan)] for plan in plans), strict=True
        )
        row, packed = x_TD.shape[1] * x_TD.element_size(), row_format.row_bytes
        send_starts, send_end = packed_offsets(
            [row * n for n in combined], [packed * n for n in num_send]
        )
        recv_starts, recv_end = packed_offsets(
            [row * n for n in received], [packed * n for n in num_recv]
        )
        # The larger view first: a buffer that grows loses its contents.
        send = buffers.bytes(Slot.SEND, max(send_end, row * sum(combined)), x_TD.device)
        recv = buffers.bytes(Slot.RECV, max(recv_end, row * sum(received)), x_TD.device)
        self.combined_SD = buffers.rows(Slot.SEND, sum(combined), x_TD)
        self._combined = self.combined_SD.split(combined)
        self._out = buffers.rows(Slot.RECV, sum(received), x_TD).split(received)
        self._grouped = buffers.rows(Slot.EXPERT, sum(received), x_TD).split(received)
        self._send = _packed_rows(send, send_starts, num_send, row_format)
        self._recv = _packed_rows(recv, recv_starts, num_recv, row_format)
        # Of the chunk last unpacked, for its combine.
        self._slot_Ve: torch.Tensor | None = None
        self._weights_Ve: torch.Tensor | None = None

    def pack_dispatch(self, chunk: int) -> AllToAll:
        """Pack the tokens' rows, with the bitmaps and weights that the receiver needs."""
        plan, out_UL = self._plans[chunk], self._send[chunk]
        unique = plan.unique
        token_U = plan.order.token_N if unique is None else unique.token_U
        self._format.pack(self._encoded, token_U, out_UL)
        if unique is not None and self._bits_CB is not None:
            self._format.pack_header(unique.cell_U, self._bits_CB, self._weights_Ce, out_UL)
        return AllToAll(out_UL, self._recv[chunk], *_dispatch_splits(plan))

    def prepare(self, chunk: int) -> None:
        """Make the receive index, which deduplicated rows need only for the combine."""
        plan = self._plans[chunk]
        if not (plan.pre_reduced and plan.unique is not None):
            _ = plan.recv_index_R

    def unpack(self, chunk: int, recv: torch.Tensor) -> ExpertRows:
        """Return the rows grouped by expert, a deduplicated one once per expert that it serves."""
        plan, row_format = self._plans[chunk], self._format
        if plan.unique is None:
            index_R = plan.recv_index_R
        else:
            num_experts = plan.unique.num_experts + (plan.unique.num_shared > 0)
            index_R, self._slot_Ve = rows_by_expert(
                row_format.bits(recv),
                num_experts,
                plan.num_held,
                with_slots=plan.pre_reduced,
            )
            if plan.pre_reduced:  # a copy: the outputs will overwrite the received rows
                self._weights_Ve = row_format.weights(recv)[:, :num_experts].clone()
        grouped_RD = self._grouped[chunk]
        row_format.unpack(recv, index_R, grouped_RD)
        end = plan.num_received  # behind them are the rows of the shared expert
        return ExpertRows(grouped_RD[:end], plan.expert_counts, self._out[chunk][:end], None)

    def pack_combine(self, chunk: int, out_RD: torch.Tensor) -> AllToAll:
        """Sum the outputs per token where rows are pre-reduced, else put them in receive order."""
        plan = self._plans[chunk]
        send_splits, recv_splits = plan.send_splits, plan.recv_splits
        if plan.num_held > plan.num_received:
            out_RD = self._with_shared(chunk, out_RD)
        if self._slot_Ve is not None and self._weights_Ve is not None:
            out_RD = combine_rows(out_RD, self._slot_Ve, self._weights_Ve)
            send_splits, recv_splits = _dispatch_splits(plan)
        elif plan.recv_index_R is not None:
            out_RD = self._grouped[chunk].index_copy_(0, plan.recv_index_R, out_RD)
        return AllToAll(out_RD, self._combined[chunk], recv_splits, send_splits)

    def _with_shared(self, chunk: int, out_RD: torch.Tensor) -> torch.Tensor:
        """Return the experts' outputs, and behind them those of the shared expert."""
        assert self._shared is not None
        both_RD, end = self._out[chunk], out_RD.shape[0]
        if out_RD.data_ptr() != both_RD.data_ptr():  # a backend may return a tensor of its own
            both_RD[:end].copy_(out_RD)
        both_RD[end:].copy_(self._shared(self._grouped[chunk][end:]))
        return both_RD


def make_payload(
    x_TD: torch.Tensor,
    weights_TM: torch.Tensor,
    plans: list[DispatchPlan],
    buffers: RowBuffers,
    *,
    single_rank: bool,
    packed: bool = False,
    shared: nn.Module | None = None,
) -> Payload:
    """Build the payload that the plans ask for; see `RowPayload` and `PackedPayload`."""
    if plans[0].row_format is None:
        return RowPayload(x_TD, plans, buffers, single_rank=single_rank, packed=packed)
    return PackedPayload(x_TD, weights_TM, plans, buffers, shared)


def packed_offsets(row_bytes: list[int], packed_bytes: list[int]) -> tuple[list[int], int]:
    """Return where each chunk's packed rows begin, a multiple of 16 bytes, and where the last end.

    Args:
        row_bytes: bytes of each chunk's unpacked rows.
        packed_bytes: bytes of each chunk's packed rows.

    Worked example: rows of 32, 16 and 64 bytes, packed rows of 64, 32 and 16: they begin at 0, 64
    (the rows of chunk 1 at 32) and 96 (at 48), and end at 112.
    """
    starts, end = [], 0
    for begin, size in zip(accumulate(row_bytes, initial=0), packed_bytes, strict=False):
        start = -(-max(begin, end) // 16) * 16
        starts.append(start)
        end = start + size
    return starts, end


def _dispatch_splits(plan: DispatchPlan) -> tuple[list[int], list[int]]:
    """Return the dispatch's rows per destination and per source rank."""
    rows = plan if plan.unique is None else plan.unique
    return rows.send_splits, rows.recv_splits


def _packed_rows(
    buffer: torch.Tensor, starts: list[int], counts: tuple[int, ...], row_format: RowFormat
) -> list[torch.Tensor]:
    length = row_format.row_bytes
    return [
        buffer[start : start + count * length].view(count, length)
        for start, count in zip(starts, counts, strict=True)
    ]
