"""Faults that would be wrong or slow on a GPU and that no CPU test sees, planted into the engine.

Each takes the patch to plant it with. `FAULTS` has what the emulation says of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

from engine.distributed.collectives import Done, GroupCollectives, Started
from engine.generation import runner
from engine.generation.sampling import step_outcome
from engine.moe.capacity import claim_split
from engine.moe.capacity.consensus_global import GatheredClaims
from engine.moe.dispatch.exchange import AllToAll, Exchange
from engine.moe.layer import MoELayer
from engine.moe.router import Routing
from engine.ops import to_device


def no_fault(patch: pytest.MonkeyPatch) -> None:
    """Plant nothing."""


def forgotten_wait_for_counts(patch: pytest.MonkeyPatch) -> None:
    """Read the counts of all ranks while they are on their way."""
    patch.setattr(Started, "wait", lambda self: self._result)


def forgotten_wait_for_rows(patch: pytest.MonkeyPatch) -> None:
    """Leave out each wait for an all-to-all of the way back."""
    wait, number = Started.wait, count()

    def wait_twice_of_three(self: Started) -> torch.Tensor:
        return self._result if next(number) % 3 == 2 else wait(self)

    patch.setattr(Started, "wait", wait_twice_of_three)


def send_buffer_overwritten(patch: pytest.MonkeyPatch) -> None:
    """Change the rows while they are sent."""
    start = Exchange.start

    def start_and_clear(self: Exchange, rows: AllToAll) -> Any:
        pending = start(self, rows)
        rows.send.zero_()
        return pending

    patch.setattr(Exchange, "start", start_and_clear)


def cpu_tensor_in_an_nccl_group(patch: pytest.MonkeyPatch) -> None:
    """Gather counts that are on the host."""
    gather = GroupCollectives.all_gather

    def gather_of_the_host(self: GroupCollectives, part: torch.Tensor) -> Any:
        return gather(self, torch.zeros(part.shape, dtype=part.dtype))

    patch.setattr(GroupCollectives, "all_gather", gather_of_the_host)


def strided_rows(patch: pytest.MonkeyPatch) -> None:
    """Send rows that are columns of a wider buffer."""
    start = Exchange.start

    def start_strided(self: Exchange, rows: AllToAll) -> Any:
        wide = torch.cat((rows.send, rows.send), dim=1)[:, : rows.send.shape[1]]
        return start(self, AllToAll(wide, rows.recv, rows.send_splits, rows.recv_splits))

    patch.setattr(Exchange, "start", start_strided)


def reused_pinned_buffer(patch: pytest.MonkeyPatch) -> None:
    """Upload every array of a step through the same pinned memory."""
    buffer = torch.empty(4096, dtype=torch.int64).pin_memory()

    def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
        part = buffer.view(host.dtype)[: host.numel()].view(host.shape)
        part.copy_(host)
        return part.to(device, non_blocking=True)

    patch.setattr(
        runner, "all_to_device", lambda hosts, device: [upload(host, device) for host in hosts]
    )


def pageable_copy(patch: pytest.MonkeyPatch) -> None:
    """Upload the arrays of a step out of memory that is not pinned."""
    patch.setattr(to_device, "to_device", lambda host, device: host.to(device, non_blocking=True))


def unread_copy_to_the_host(patch: pytest.MonkeyPatch) -> None:
    """Read the tokens from pinned memory before they have arrived there."""
    sample_rows = step_outcome.sample_rows

    def sample_early(logits_SV: torch.Tensor, *rest: Any) -> Any:
        sampled = sample_rows(logits_SV, *rest)
        tokens_S = logits_SV.argmax(1).to("cpu", non_blocking=True)
        return replace(sampled, tokens=(tokens_S % logits_SV.shape[1]).tolist())

    patch.setattr(step_outcome, "sample_rows", sample_early)


def item_in_a_layer(patch: pytest.MonkeyPatch) -> None:
    """Read one number of the router's scores on the host."""
    route = MoELayer.route

    def route_and_read(self: MoELayer, x_tD: torch.Tensor, *ids_T: torch.Tensor | None) -> Routing:
        routing = route(self, x_tD, *ids_T)
        routing.scores_TE.sum().item()
        return routing

    patch.setattr(MoELayer, "route", route_and_read)


def mask_in_a_layer(patch: pytest.MonkeyPatch) -> None:
    """Choose rows by a mask, whose number of rows the host has to learn."""
    route = MoELayer.route

    def route_and_choose(
        self: MoELayer, x_tD: torch.Tensor, *ids_T: torch.Tensor | None
    ) -> Routing:
        routing = route(self, x_tD, *ids_T)
        routing.scores_TE[routing.scores_TE > 0.5]
        return routing

    patch.setattr(MoELayer, "route", route_and_choose)


def table_on_the_host(patch: pytest.MonkeyPatch) -> None:
    """Add a tensor of the host to one on the GPU."""
    route = MoELayer.route
    patch.setattr(
        MoELayer, "route", lambda self, x, *ids: route(self, x + torch.zeros(x.shape[1]), *ids)
    )


def forgotten_wait_for_claims(patch: pytest.MonkeyPatch) -> None:
    """Split the claims of all ranks while they are on their way."""
    wait = GatheredClaims.wait

    def wait_for_none(self: GatheredClaims) -> None:
        self._pending = Done(self._pending._result)  # pyright: ignore[reportAttributeAccessIssue]
        wait(self)

    patch.setattr(GatheredClaims, "wait", wait_for_none)


def pageable_ends_of_copies(patch: pytest.MonkeyPatch) -> None:
    """Upload where the rows of every instance end out of memory that is not pinned."""
    patch.setattr(claim_split, "to_device", lambda host, device: host.to(device, non_blocking=True))


def number_read_in_the_split(patch: pytest.MonkeyPatch) -> None:
    """Read on the host how many rows were dealt."""
    deal = claim_split.deal_claims

    def deal_and_read(*args: Any) -> Any:
        made = deal(*args)
        made[1].sum().item()
        return made

    patch.setattr(claim_split, "deal_claims", deal_and_read)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    forgotten_wait_for_counts: "RaceError.*reads memory of all_gather from .*collectives.py",
    forgotten_wait_for_rows: "RaceError.*memory of all_to_all from .*exchange.py",
    send_buffer_overwritten: "RaceError.*zero_ writes memory of all_to_all",
    cpu_tensor_in_an_nccl_group: "DeviceError.*all_gather.*a CPU tensor in an NCCL group",
    strided_rows: "DeviceError.*all_to_all.*NCCL takes contiguous tensors",
    reused_pinned_buffer: "RaceError: .*faults.py.*pinned memory was written before its copy",
    pageable_copy: "HostSyncError: .*faults.py.*a copy from pageable memory",
    item_in_a_layer: "HostSyncError: .*faults.py.*_local_scalar_dense",
    mask_in_a_layer: "HostSyncError: .*faults.py.*a mask",
    table_on_the_host: "DeviceError: .*faults.py.*a CPU tensor",
}

# Of a layer whose experts have copies, split by claims.
COPIES_FAULTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    forgotten_wait_for_claims: "RaceError.*memory of all_gather from .*collectives.py",
    pageable_ends_of_copies: "HostSyncError: .*faults.py.*a copy from pageable memory",
    number_read_in_the_split: "HostSyncError: .*faults.py.*_local_scalar_dense",
}
