"""Rank device: what a rank sets in its process once it knows its GPU, before anything runs there.

`bootstrap.py` calls it between the rendezvous and the process groups.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from engine.distributed.rendezvous import RankInfo

_PCI_DEVICES = Path("/sys/bus/pci/devices")
_MAX_CPUS = 1 << 16  # more in a list are a mistake


def use_gpu(device: torch.device) -> None:
    """Make `device` the current one, and float32 products on it exact.

    NVIDIA's containers export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, with which torch multiplies
    float32 with 10 bits of mantissa: a float32 router then chooses other experts.
    """
    torch.cuda.set_device(device)
    os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"  # torch has read it; children have not
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def bind_to_gpu_cpus(
    device: torch.device, rank: int, infos: Sequence[RankInfo], folder: Path = _PCI_DEVICES
) -> int | None:
    """Bind all threads of this process to the CPUs next to its GPU; return how many they are.

    Kernels launched from the other socket cost more. Does nothing (None) where the launcher has
    bound the ranks of this host, each to cores of its own, and where the CPUs are not known.

    Args:
        device: the GPU.
        rank: this rank.
        infos: of all ranks.
        folder: of the PCI devices, in which each has its `local_cpulist`.
    """
    own = infos[rank]
    if any(set(other.cores) != set(own.cores) for other in infos if other.host == own.host):
        return None
    local = _local_cpus(torch.cuda.get_device_properties(device), folder)
    cpus = local & set(own.cores)
    if not cpus or len(cpus) == len(own.cores):
        return None
    try:
        _bind_threads(cpus)
    except OSError:  # a cgroup that has changed since, or no permission: nothing is lost but speed
        return None
    return len(cpus)


def parse_cpu_list(text: str) -> set[int]:
    """Return the CPUs of a list as the kernel writes it: {0, 1, 2, 8} for `0-2,8`.

    Raises:
        ValueError: it has another form.
    """
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        end = int(last or first)
        if not 0 <= int(first) <= end < _MAX_CPUS:
            raise ValueError(f"{text!r} is no list of CPUs")
        cpus.update(range(int(first), end + 1))
    return cpus


def _local_cpus(properties: Any, folder: Path) -> set[int]:
    """Return the CPUs next to a GPU; none where they are not known."""
    # Older versions of torch do not have them.
    numbers = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in numbers:
        return set()
    address = "{:04x}:{:02x}:{:02x}.0".format(*numbers)
    with suppress(OSError, ValueError):
        return parse_cpu_list((folder / address / "local_cpulist").read_text("ascii"))
    return set()


def _bind_threads(cpus: Collection[int]) -> None:
    """Bind every thread that the process has; later ones take it over."""
    os.sched_setaffinity(0, cpus)
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cpus)
