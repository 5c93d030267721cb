"""A KV cache in float8 (E4M3, scheduler.kv_dtype: fp8): numbers stored as they are, at scale 1.

Eight bits with 3 of significand: a number between 2^-6 and 448 is off by at most 1/16 of itself,
smaller ones by at most 2^-10, and larger ones become 448. Kernels on CUDA read the cache as it is;
on the CPU, whose compiled kernels read float32, the blocks of a step are widened first.

Legend: S sequences, B columns of the block table, G kv heads.
"""

import torch

FLOAT8 = torch.float8_e4m3fn
_LARGEST = 448.0  # torch's cast makes NaN of larger ones


def is_float8(cache: torch.Tensor) -> bool:
    """Whether keys or values are held in float8."""
    return cache.dtype is FLOAT8


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """Return a view of a float8 cache as bytes, of any other the cache itself."""
    return cache.view(torch.uint8) if is_float8(cache) else cache


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return x in float8, what is beyond its range as its largest number."""
    return x.clamp(-_LARGEST, _LARGEST).to(FLOAT8)


def widened(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_SB: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the blocks of a table in another dtype, each once, and a table of theirs.

    Args:
        k_cache, v_cache: float8, [num_blocks, G, block_size, Dk or Dv]; v may be the first columns
            of k.
        block_table_SB: int32.
        dtype: of the result.
    """
    blocks, table_SB = torch.unique(block_table_SB, return_inverse=True)

    def read(cache: torch.Tensor) -> torch.Tensor:
        return as_bytes(cache).index_select(0, blocks).view(FLOAT8).to(dtype)

    keys = read(k_cache)
    if v_cache.data_ptr() == k_cache.data_ptr():
        values = keys[..., : v_cache.shape[3]]
    else:
        values = read(v_cache)
    return keys, values, table_SB.to(block_table_SB.dtype)
