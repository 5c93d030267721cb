"""Machine-dependent settings of training: memory policy, fastest dtype, hardware name."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from pathlib import Path

import torch

# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_BFLOAT16_GAIN = 1.5


def keep_freed_memory() -> None:
    """Stop glibc from returning large buffers to the kernel after every operation.

    Each step frees and asks again for the same hundreds of megabytes; without this a fifth of the
    step is page faults. Does nothing where the C library has no mallopt.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def gemm_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """Return floating-point operations per second of a square product of this dtype."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    torch.mm(left, right)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        torch.mm(left, right)
        count += 1
    return 2 * size**3 * count / elapsed


def choose_dtype(name: str) -> torch.dtype:
    """Return the dtype of that name; `auto`: bfloat16 where its products are clearly faster."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    gain = gemm_rate(torch.bfloat16) / gemm_rate(torch.float32)
    return torch.bfloat16 if gain > _BFLOAT16_GAIN else torch.float32


def hardware() -> str:
    """Return processor name, threads in use and package versions, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return (
        f"{model}, threads: {torch.get_num_threads()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
