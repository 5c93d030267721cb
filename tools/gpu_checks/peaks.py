"""What the device can do at most: published peaks by its name, and what is measured here."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Dense bfloat16 operations and bytes of memory per second, as the makers publish them, by words
# of the device's name; the longest that it has counts.
PUBLISHED = (
    ("H100 PCIe", 756e12, 2.0e12),
    ("H100 NVL", 835e12, 3.9e12),
    ("H100", 989e12, 3.35e12),
    ("H200", 989e12, 4.8e12),
    ("GH200", 989e12, 4.0e12),
    ("GB200", 2500e12, 8.0e12),
    ("B200", 2250e12, 8.0e12),
    ("A100-SXM4-80GB", 312e12, 2.039e12),
    ("A100 80GB PCIe", 312e12, 1.935e12),
    ("A100", 312e12, 1.555e12),
    ("L40S", 362e12, 0.864e12),
    ("A10", 125e12, 0.6e12),
    ("L4", 121e12, 0.3e12),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """Of this device; published ones are None where its name is not in the table."""

    copy_bytes: float  # per second, read and written together
    matmul_flops: float  # per second, bfloat16
    published_bytes: float | None
    published_flops: float | None


def measure_peaks(device: torch.device, is_tiny: bool) -> Peaks:
    """Measure a copy and a matrix product, both far larger than the caches."""
    size, side = (1 << 20, 256) if is_tiny else (1 << 30, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source), device)
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(left)
    matmul_s = seconds_of(lambda: torch.mm(left, left, out=product), device)
    flops, memory = published(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    )
    return Peaks(
        copy_bytes=2 * size / copy_s,
        matmul_flops=2 * side**3 / matmul_s,
        published_bytes=memory,
        published_flops=flops,
    )


def published(name: str) -> tuple[float | None, float | None]:
    """Return operations and bytes per second of a device, by its name."""
    for known, flops, memory in sorted(PUBLISHED, key=lambda row: -len(row[0])):
        if re.search(rf"\b{known}\b", name):  # an L40 is no L4
            return flops, memory
    return None, None


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 9) -> float:
    """Return the median seconds of a call, after two that are not timed.

    On CUDA by events around each call, so that the host's part of a call is left out where the
    device is the slower one.
    """
    for _ in range(2):
        run()
    if device.type != "cuda":
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
        return statistics.median(found)
    pairs = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1e-3
