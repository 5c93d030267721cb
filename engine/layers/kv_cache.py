"""The paged key/value cache: one pair of tensors a layer, addressed by block and offset.

Made by the runner from `CausalLM.kv_spec`, written and read by the attention layers. Which sequence
owns which block is the scheduler's business (`block_pool.py`); here are only the tensors.

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
    """The cache's shape a layer on this rank.

    With `latent` the value is the first `value_dim` numbers of the key (MLA's latent followed by
    the rotary key, DeepSeek-V2, arXiv 2405.04434, section 2.1), so only keys are stored.
    """

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False

    def bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block of `block_size` tokens takes over all layers on this rank."""
        width = self.key_dim if self.latent else self.key_dim + self.value_dim
        return self.num_layers * self.num_kv_heads * block_size * width * dtype.itemsize


class KVCache:
    """The cache tensors of every layer on this rank.

    keys[i]: [num_blocks, G, block_size, Dk]. values[i]: [num_blocks, G, block_size, Dv], a view of
    keys[i] when the spec is latent.
    """

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

        self.keys = [new(spec.key_dim) for _ in range(spec.num_layers)]
        if spec.latent:
            self.values = [keys[..., : spec.value_dim] for keys in self.keys]
        else:
            self.values = [new(spec.value_dim) for _ in range(spec.num_layers)]


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, not garbage: a kernel may load a whole block and mask it, and 0 * NaN is NaN.

    On CPU the pages come from the kernel, zero and page-aligned, and take memory once a sequence
    writes to them; torch.zeros would touch the whole cache at start-up.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    cache = torch.frombuffer(pages, dtype=dtype).view(shape)
    prefer_huge_pages(cache)
    return cache
