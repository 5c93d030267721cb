"""Transport: what moves the rows of one MoE call to the ranks of their experts and back.

There are two kinds, by where the counts are.

**Counts on the host** (`nccl`, on the CPU gloo): `engine.moe.dispatch.exchange.Exchange`. The ranks
exchange their counts, the host reads them, and `plan.py`, `payload.py` and `pipeline.py` cut
buffers and splits to size. Everything that this project can do runs this way.

**Counts on the device** (`DeviceTransport`, here): nothing of a call is read on the host. Rows come
into a buffer whose size is a bound, grouped by local expert, and the device knows how many there
are. A call is

    1. dispatch   `dispatch(outgoing)` starts to move the rows; `wait` on the result gives `Arrived`
    2. experts    `LocalExperts.run_bounded(arrived.rows_RD, arrived.places_e)`, not the transport's
    3. combine    `combine(arrived, out_RD)` moves the results home and says where they are

`Returned` is what `combine_rows` takes: each token's sum over its terms. A transport that brings
home one row per assignment returns `order.slot_TK` and the weights that came in, and the sum is the
router's, k = 0 .. K - 1, bit for bit that of `nccl`. One that sums on the way (`sums`) returns one
term per token of weight 1, and its results are those of moe.dispatch.partial_sums up to rounding.

A module of this folder has one transport, and two functions that `choice.py` calls:

    obstacle(setup, config) -> str | None    why it cannot run here, in words: hardware, library,
                                             dtype, layout; None: it can. Before weights are read,
                                             without communication, on every rank. Imports lazily
    make(setup) -> DeviceTransport           one per `Setup` and model: its layers share the buffers

Legend: T tokens of this rank, K top-k, D model dim, R places of the buffer, S rows home, E experts
in the order of their ranks, e experts of this rank, W expert-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from engine.distributed.groups import Group
from engine.moe.dispatch.plan import ExpertOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a transport is made for; the same on every rank but for `group.rank` and `device`."""

    group: Group  # expert-parallel, more than one rank
    device: torch.device
    dtype: torch.dtype  # of rows, out and home
    width: int  # D
    first_experts: tuple[int, ...]  # W + 1, rank w has first_experts[w] .. first_experts[w+1] - 1
    top_k: int  # K

    @property
    def num_local(self) -> int:
        """Experts of this rank, e."""
        return self.first_experts[self.group.rank + 1] - self.first_experts[self.group.rank]

    @property
    def most_local(self) -> int:
        """Experts of the rank that has most."""
        bounds = self.first_experts
        return max(end - first for first, end in zip(bounds, bounds[1:], strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one call has, the same on every rank."""

    tokens: int  # of one rank
    sent: int  # rows that a rank sends: one per assignment
    received: int  # rows that a rank receives, all experts together; never more come

    def join(self, other: Limits | None) -> Limits:
        """Return the limits of calls that keep either."""
        if other is None:
            return self
        return Limits(
            tokens=max(self.tokens, other.tokens),
            sent=max(self.sent, other.sent),
            received=max(self.received, other.received),
        )


class Outgoing(NamedTuple):
    """This rank's part of a call. All tensors are on the device; T may be 0."""

    x_TD: torch.Tensor  # contiguous rows
    ids_TK: torch.Tensor  # int64, 0 .. E - 1; -1: no assignment, dropped
    weights_TK: torch.Tensor  # float32 combine weights
    order: ExpertOrder  # ids_TK sorted by expert: which row is sent, and how many for each
    # Rows that no rank receives more of in this call, the same on every rank; None: those of the
    # limits. A transport may give the experts fewer places by it.
    most_received: int | None = None
    # Tokens that no rank has more of in this call, the same on every rank; None: those of the
    # limits. A transport may take other kernels by it.
    most_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """The rows for this rank's experts.

    The rows of expert j begin after the places of experts 0 .. j - 1. Its first load_e[j] places
    are rows, in any order that is the same for the same inputs; a group may end in padding, which
    the experts compute (each row by itself) and nobody reads.
    """

    rows_RD: torch.Tensor  # R places; the experts may not write to them
    load_e: torch.Tensor  # int64, rows of each local expert, on the device
    places_e: torch.Tensor  # int64, places of each: rows and padding; at most R in all
    handle: object = None  # the transport's own, for `combine`


class Returned(NamedTuple):
    """Results at home: token t's is the sum over k of weights_TK[t, k] * rows_SD[slot_TK[t, k]]."""

    rows_SD: torch.Tensor  # undefined where no slot is; valid until the next `dispatch`
    slot_TK: torch.Tensor  # int64, -1: no term. May have fewer columns than ids_TK
    weights_TK: torch.Tensor  # float32


class Arriving(Protocol):
    """Rows in flight."""

    def wait(self) -> Arrived:
        """Let the device's stream, not the host, wait for the rows."""
        ...


class DeviceTransport(Protocol):
    """Moves rows with counts on the device. No method but `reserve` may read a device value on the
    host, allocate by a count or block; all are collective over the group, on every rank in the same
    order, whatever tokens each has.
    """

    name: str  # the value of moe.dispatch.transport
    sums: bool  # whether results are summed on the way, as under moe.dispatch.partial_sums

    def reserve(self, limits: Limits) -> int:
        """Allocate what calls within the limits need; return its bytes. Before the first call, and
        again with larger limits, which replace what there is.

        Raises:
            ValueError: it cannot, in words, on every rank.
        """
        ...

    def dispatch(self, outgoing: Outgoing) -> Arriving:
        """Start to move rows to their experts; `outgoing` must not change before the wait.

        Results of the call before have been read: at most one call is between dispatch and combine.
        """
        ...

    def combine(self, arrived: Arrived, out_RD: torch.Tensor) -> Returned:
        """Bring results home.

        Args:
            arrived: of the last dispatch.
            out_RD: outputs at the places of their rows, anywhere in memory.
        """
        ...


@runtime_checkable
class BorrowsGroup(Protocol):
    """A transport whose library uses the group's communicator until it is told to end."""

    def release(self) -> None:
        """End the library's use of the group; without communication, safe to call twice."""
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """Rows that the stream has waited for already."""

    arrived: Arrived

    def wait(self) -> Arrived:
        """Return the rows."""
        return self.arrived
