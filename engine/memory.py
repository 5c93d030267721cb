"""Memory plan: how many KV cache blocks a rank gets.

Called once by `llm.py` after the weights stand in memory. A dropless MoE layer must be ready for
the worst case, all tokens of the group choosing experts of one rank; on CUDA that much is kept
free, because the caching allocator takes it from the same memory.

Legend: T tokens a step and rank, W expert-parallel ranks, K top-k, e experts on this rank, D model
dim, F expert dim.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from engine.config import SchedulerConfig

_GIB = 1 << 30
_CUDA_SHARE = 0.92  # of the free device memory; the rest is for fragmentation and libraries
_CPU_SHARE = 0.25  # of the host's available memory, divided by the host's ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """What the worst case of a MoE layer depends on; dims as in the module's legend."""

    num_ranks: int
    top_k: int
    num_local_experts: int
    hidden: int
    ffn: int


def dropless_activation_bytes(shape: MoEShape, max_tokens: int, dtype: torch.dtype) -> int:
    """Bytes one MoE layer may need on one rank without capacity: W*T*min(K, e) rows of 3D + 3F
    numbers.

    Rows arrive (D), are grouped (D), give gate and up (2F) and their product (F), and leave (D).
    """
    rows = shape.num_ranks * max_tokens * min(shape.top_k, shape.num_local_experts)
    return rows * (3 * shape.hidden + 3 * shape.ffn) * dtype.itemsize


def num_kv_blocks(
    config: SchedulerConfig,
    *,
    bytes_per_block: int,
    max_model_len: int,
    reserve_bytes: int,
    device: torch.device,
    local_world_size: int,
) -> int:
    """Return the number of KV cache blocks of this rank.

    `scheduler.kv_cache_blocks` and `scheduler.kv_cache_gib` decide if given; otherwise what
    `max_sequences` sequences of `max_model_len` tokens need, within the free memory of the device
    less `reserve_bytes`.

    Raises:
        ValueError: when not even one block fits.
    """
    if config.kv_cache_blocks is not None:
        return config.kv_cache_blocks
    if config.kv_cache_gib is not None:
        blocks = int(config.kv_cache_gib * _GIB) // bytes_per_block
        if blocks < 1:
            raise ValueError(
                f"scheduler.kv_cache_gib: {config.kv_cache_gib} is less than one block of "
                f"{bytes_per_block} bytes; give at least {bytes_per_block / _GIB:.6f}"
            )
        return blocks
    wanted = config.max_sequences * -(-max_model_len // config.block_size)
    free = _free_bytes(device, local_world_size)
    fits = (free - reserve_bytes) // bytes_per_block
    if fits < 1:
        raise ValueError(
            f"scheduler.kv_cache_gib: no memory is left for a KV cache on {device}: "
            f"{free / _GIB:.2f} GiB are free and {reserve_bytes / _GIB:.2f} GiB are kept for the "
            "MoE layer's worst case; lower scheduler.max_batch_tokens, use more ranks, or set "
            "scheduler.kv_cache_gib"
        )
    return min(wanted, fits)


def _free_bytes(device: torch.device, local_world_size: int) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _CUDA_SHARE)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return int(available * _CPU_SHARE) // local_world_size
