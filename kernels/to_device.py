"""Host data to the device of the step without stopping the host.

A copy out of pageable memory makes the host wait for everything queued before it: the rows of a
layer would no longer be dispatched while its experts compute. Out of pinned memory it is queued
like a kernel. Every host-to-device copy of a step goes through here; a test keeps it so.
Copies to the host that nobody waits for at once are queued here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

_ALIGNED = 16  # bytes, at a multiple of which each of several tensors begins


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `host`, a CPU tensor, on `device`: itself there, else a copy in the order of the
    current stream. The caller may drop `host` at once and must not change it.
    """
    if device.type == "cpu":
        return host
    # torch's pinned memory is not used again before the copy has passed.
    return host.pin_memory().to(device, non_blocking=True)


def all_to_device(hosts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return contiguous CPU tensors on `device`, as `to_device` does, by one copy for all."""
    if device.type == "cpu":
        return list(hosts)
    ends = list(accumulate(-(-host.nbytes // _ALIGNED) * _ALIGNED for host in hosts))
    places = list(zip([0, *ends], hosts, strict=False))
    packed = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8)
    for start, host in places:
        if host.nbytes:  # an empty tensor may have strides of 0, which no view takes
            packed[start : start + host.nbytes] = host.flatten().view(torch.uint8)
    sent = to_device(packed, device)
    return [
        sent[start : start + host.nbytes].view(host.dtype).view(host.shape)
        for start, host in places
    ]


def copy_into(target: torch.Tensor, host: torch.Tensor) -> None:
    """Copy pinned `host` into `target`, on a device, in the order of the current stream. The caller
    may drop `host` at once and must not change it.
    """
    target.copy_(host, non_blocking=True)


def queue_copy_out(source: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Return pinned memory that a copy of `source`, on a device, is queued into, and what to wait
    for before it is read.
    """
    host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    host.copy_(source, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
