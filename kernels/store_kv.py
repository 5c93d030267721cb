"""Writes the keys and values of this step's tokens into the paged cache.

Legend: T tokens, G kv heads, Dk/Dv head dims; a slot is block * block_size + offset.
"""

import torch

from engine.ops import native, triton_support
from engine.ops.float8_cache import as_bytes, is_float8, rounded


def store_kv(
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Stores k_TGD [T, G, Dk] and v_TGD [T, G, Dv] at slots_T (int64) of the caches, in place.

    k_cache is [num_blocks, G, block_size, Dk], v_cache [num_blocks, G, block_size, Dv]; both may be
    strided views. Slots are distinct; T may be 0. Caches in float8 take what `rounded` makes.
    """
    if native.serves(k_TGD, v_TGD, k_cache, v_cache):
        torch.ops.lockstep_cpu.store_kv(k_TGD, v_TGD, k_cache, v_cache, slots_T)
    elif triton_support.serves(k_TGD):
        from engine.ops.gpu.store_kv import store_kv_triton

        store_kv_triton(k_TGD, v_TGD, k_cache, v_cache, slots_T)
    else:
        store_kv_reference(k_TGD, v_TGD, k_cache, v_cache, slots_T)


def store_kv_reference(
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Plain torch form of `store_kv`."""
    block_size = k_cache.shape[2]
    blocks_T, offsets_T = slots_T // block_size, slots_T % block_size
    for cache, rows_TGD in ((k_cache, k_TGD), (v_cache, v_TGD)):
        if is_float8(cache):
            rows_TGD = as_bytes(rounded(rows_TGD))
        as_bytes(cache)[blocks_T, :, offsets_T] = rows_TGD
