"""Paged key/value cache: one pair of tensors per layer, addressed by block and offset.

Tensors only: which blocks are free is kept in `generation/block_pool.py`, which sequence owns which
block in its block table.

Slot s of the cache is block s // block_size, offset s % block_size.

Legend: G key/value heads on this rank, Dk and Dv key and value width of a head.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch

from engine.ops.huge_pages import prefer_huge_pages


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """Shape of the cache on this rank.

    With `latent` the value is the first `value_dim` numbers of the key (MLA's latent followed by
    the rotary key, DeepSeek-V2, arXiv 2405.04434, section 2.1), so only keys are stored.
    """

    num_layers: int
    num_kv_heads: int  # G, per layer
    key_dim: int  # Dk
    value_dim: int  # Dv
    latent: bool = False

    def bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block of `block_size` tokens, over all layers of this rank."""
        width = self.key_dim if self.latent else self.key_dim + self.value_dim
        return self.num_layers * self.num_kv_heads * block_size * width * dtype.itemsize


class KVCache:
    """The cache tensors of every layer on this rank."""

    def __init__(
        self,
        spec: KVSpec,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, spec.num_kv_heads, block_size)

        def new(width: int) -> torch.Tensor:
            return _zeros((*shape, width), device, dtype)

        # Per layer [num_blocks, G, block_size, Dk or Dv]; values are views of the keys if latent.
        self.keys = [new(spec.key_dim) for _ in range(spec.num_layers)]
        if spec.latent:
            self.values = [keys[..., : spec.value_dim] for keys in self.keys]
        else:
            self.values = [new(spec.value_dim) for _ in range(spec.num_layers)]


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a zeroed tensor. Zeros because a kernel may load a whole block and mask it: 0 * NaN is
    NaN.

    On CPU its pages come zeroed from the operating system and take memory only once a sequence
    writes to them; torch.zeros would touch the whole cache at start-up.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    cache = torch.frombuffer(pages, dtype=dtype).view(shape)
    prefer_huge_pages(cache)
    return cache
