"""Symmetric transport: torch's symmetric memory over NVSHMEM. Never executed on a GPU.

Rows go out by `all_to_all_vdev_2d`, which reads its splits on the device and lays rows out by local
expert, and come home by `all_to_all_vdev_2d_offset`, which undoes it: results are in the order in
which rows were sent, one per assignment, and sums are the router's, as with `nccl`.

    send    [S, D]  rows to send; then the results that came home
    places  [R, D]  rows by local expert; then their outputs
    splits  rows for each expert, e of every rank: ranks with fewer experts have some without rows

Each rank *pulls* its rows from the others, and each exchange begins with a barrier of the group on
the stream. So a buffer may be written as soon as the exchange after the one that reads it has
begun: `places` takes outputs where rows were, since no rank pulls from it on the way out, and
`send` takes results, since every rank has pulled its rows before it joins the way home. One call is
in flight at a time, and calls of all layers follow each other on one stream.

Legend: W ranks, S rows sent, R places, D model dim, E experts, e experts of the rank that has most.
"""

from __future__ import annotations

import torch

from engine.config import MoEConfig
from engine.moe.dispatch.row_format import RowFormats
from engine.moe.dispatch.transports.transport import (
    Arrived,
    Limits,
    Outgoing,
    Ready,
    Returned,
    Setup,
)
from engine.ops import symmetric_memory
from engine.ops.permute import gather_rows
from engine.ops.to_device import to_device


class SymmetricTransport:
    """`DeviceTransport` over symmetric memory. setup: of the layers that share it."""

    name = "symmetric"
    sums = False

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._limits = Limits(tokens=0, sent=0, received=0)
        self._send_SD = self._places_RD = torch.empty(0)
        self._splits_N = self._found_2N = self._home_2N = torch.empty(0)
        self._place_E: torch.Tensor | None = None  # of each expert's split; None: in order

    def reserve(self, limits: Limits) -> int:
        """Allocate the buffers; return their bytes. Collective over the group."""
        setup, size, most = self._setup, self._setup.group.size, self._setup.most_local
        # An expert without rows takes one place.
        rows = {"send": max(1, limits.sent), "places": max(1, limits.received + most)}
        group, device = setup.group.handle, setup.device

        def make(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return symmetric_memory.allocate(shape, dtype, device, group)

        try:
            self._send_SD = make(setup.dtype, rows["send"], setup.width)
            self._places_RD = make(setup.dtype, rows["places"], setup.width)
            self._splits_N = make(torch.int64, size * most).zero_()
            self._found_2N = make(torch.int64, 2, size * most)
            self._home_2N = make(torch.int64, 2, size * most)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"moe.dispatch.transport = 'symmetric': no symmetric memory for {rows['send']} "
                f"rows to send and {rows['places']} to receive ({reason}); lower "
                "scheduler.max_batch_tokens, set moe.capacity.policy to token_drop, which bounds "
                "them, raise NVSHMEM_SYMMETRIC_SIZE, or set moe.dispatch.transport to auto"
            ) from error
        bounds = setup.first_experts
        if any(end - first != most for first, end in zip(bounds, bounds[1:], strict=False)):
            place_E = [
                rank * most + local
                for rank in range(size)
                for local in range(bounds[rank + 1] - bounds[rank])
            ]
            self._place_E = to_device(torch.tensor(place_E), device)
        self._limits = limits
        buffers = (self._send_SD, self._places_RD, self._splits_N, self._found_2N, self._home_2N)
        return sum(buffer.nbytes for buffer in buffers)

    def dispatch(self, outgoing: Outgoing) -> Ready:
        """Send this rank's rows to their experts. Collective over the group."""
        order, setup, limits = outgoing.order, self._setup, self._limits
        num_rows = order.token_N.numel()
        if num_rows > limits.sent:
            raise ValueError(
                f"moe.dispatch.transport = 'symmetric': a call of {num_rows} rows, and buffers for "
                f"{limits.sent} were reserved; set moe.dispatch.transport to auto"
            )
        gather_rows(outgoing.x_TD, order.token_N, self._send_SD[:num_rows])
        if self._place_E is None:
            self._splits_N.copy_(order.load_E)
        else:
            self._splits_N.index_copy_(0, self._place_E, order.load_E)
        group, found_2N = setup.group.handle, self._found_2N
        symmetric_memory.send_out(self._send_SD, self._places_RD, self._splits_N, found_2N, group)
        places_RD = self._places_RD
        if outgoing.most_received is not None:  # activations take time for every place
            places_RD = places_RD[: outgoing.most_received + setup.most_local]
        load_e = found_2N[0].view(-1, setup.group.size)[: setup.num_local].sum(1)
        return Ready(
            Arrived(
                rows_RD=places_RD,
                load_e=load_e,
                places_e=load_e.clamp(min=1),
                handle=outgoing,
            )
        )

    def combine(self, arrived: Arrived, out_RD: torch.Tensor) -> Returned:
        """Send the results home. Collective over the group."""
        outgoing = arrived.handle
        assert isinstance(outgoing, Outgoing)
        # The outputs have to be where other ranks can pull them.
        self._places_RD[: len(out_RD)].copy_(out_RD)
        group = self._setup.group.handle
        symmetric_memory.send_home(
            self._places_RD, self._send_SD, self._found_2N, self._home_2N, group
        )
        return Returned(self._send_SD, outgoing.order.slot_TK, outgoing.weights_TK)


def obstacle(setup: Setup, config: MoEConfig) -> str | None:
    """Return why rows cannot travel so here; None: they can."""
    if config.dispatch.partial_sums:
        return "moe.dispatch.partial_sums = true sums rows that are deduplicated, and it sends each"
    payload = RowFormats.of(setup.width, setup.dtype, config.dispatch).payload
    if payload != setup.dtype:
        return f"moe.dispatch.dtype = {config.dispatch.dtype!r}, and it sends the model's dtype"
    if setup.group.size > symmetric_memory.MOST_RANKS:
        return (
            f"it serves at most {symmetric_memory.MOST_RANKS} expert-parallel ranks, and these are "
            f"{setup.group.size}"
        )
    if setup.most_local > symmetric_memory.MOST_EXPERTS:
        return (
            f"it serves at most {symmetric_memory.MOST_EXPERTS} experts per rank, and a rank has "
            f"{setup.most_local}"
        )
    return symmetric_memory.obstacle()


def make(setup: Setup) -> SymmetricTransport:
    """Make the transport; nothing is allocated yet."""
    return SymmetricTransport(setup)
