"""Host data to the device of the step without stopping the host.

A copy out of pageable memory makes the host wait for everything queued before it: the rows of a
layer would no longer be dispatched while its experts compute. Out of pinned memory it is queued
like a kernel. Every host-to-device copy of a step goes through here; a test keeps it so.
"""

from __future__ import annotations

import torch


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `host`, a CPU tensor, on `device`: itself there, else a copy in the order of the
    current stream. The caller may drop `host` at once and must not change it.
    """
    if device.type == "cpu":
        return host
    # torch's pinned memory is not used again before the copy has passed.
    return host.pin_memory().to(device, non_blocking=True)
