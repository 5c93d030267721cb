"""KV cache: a pair of tensors per layer. Keys and values in pages, or recurrent states.

Attention layers have keys and values, addressed by block and offset: slot s is block
s // block_size, offset s % block_size. Gated DeltaNet layers (`gated_delta.py`) have a conv state
and a delta state, one row per sequence that runs, whatever its length.

Tensors only: which blocks are free is kept in `generation/block_pool.py`, which sequence owns which
block in its block table, and its row in `Sequence.state_row`.

Legend: G key/value heads on this rank, Dk and Dv key and value width of a head, N rows of states.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch

from engine.ops.huge_pages import prefer_huge_pages


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """Recurrent states of one layer on this rank, per sequence."""

    conv_shape: tuple[int, ...]
    delta_shape: tuple[int, ...]
    conv_dtype: torch.dtype
    delta_dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        """Bytes of both states of one sequence."""
        conv = math.prod(self.conv_shape) * self.conv_dtype.itemsize
        return conv + math.prod(self.delta_shape) * self.delta_dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """Shape of the cache on this rank.

    With `latent` the value is the first `value_dim` numbers of the key (MLA's latent followed by
    the rotary key, DeepSeek-V2, arXiv 2405.04434, section 2.1), so only keys are stored.
    """

    num_layers: int  # with keys
    num_kv_heads: int  # G, per layer
    key_dim: int  # Dk
    value_dim: int  # Dv
    latent: bool = False
    # Of every layer of the model in order, None where it has keys; (): all of them have.
    states: tuple[StateSpec | None, ...] = ()

    @property
    def has_states(self) -> bool:
        """Whether any layer has recurrent states."""
        return any(state is not None for state in self.states)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of one sequence, over all layers of this rank; 0 without any."""
        return sum(state.num_bytes for state in self.states if state is not None)

    def bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of a block of `block_size` tokens, over this rank's layers with keys."""
        width = self.key_dim if self.latent else self.key_dim + self.value_dim
        return self.num_layers * self.num_kv_heads * block_size * width * dtype.itemsize


class KVCache:
    """The cache tensors of every layer on this rank, zeroed.

    Args:
        num_sequences: rows of the recurrent states, one per sequence that may run at once; of no
            effect where no layer has any.
        has_scratch: allocate one more block, and one more row of states, that no sequence gets:
            idle rows of a step of fixed shape write there.
    """

    def __init__(
        self,
        spec: KVSpec,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        num_sequences: int = 0,
        *,
        has_scratch: bool = False,
    ) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = block_size
        assert num_sequences or not spec.has_states, "states without rows"
        states = spec.states or (None,) * spec.num_layers
        assert states.count(None) == spec.num_layers, f"{states} of {spec.num_layers} layers"
        self.scratch_slot = num_blocks * block_size if has_scratch else None
        self.scratch_state = num_sequences if has_scratch and spec.has_states else None
        shape = (num_blocks + has_scratch, spec.num_kv_heads, block_size)
        num_sequences += has_scratch

        def new(width: int) -> torch.Tensor:
            return _zeros((*shape, width), device, dtype)

        # Per layer [num_blocks, G, block_size, Dk or Dv], values being views of the keys if latent;
        # or where it has states [N, ...] these two, the conv state under `keys`.
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for state in states:
            if state is not None:
                conv, delta = state.conv_shape, state.delta_shape
                self.keys.append(_zeros((num_sequences, *conv), device, state.conv_dtype))
                self.values.append(_zeros((num_sequences, *delta), device, state.delta_dtype))
                continue
            keys = new(spec.key_dim)
            self.keys.append(keys)
            self.values.append(keys[..., : spec.value_dim] if spec.latent else new(spec.value_dim))


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a zeroed tensor. Zeros because a kernel may load a whole block and mask it: 0 * NaN is
    NaN.

    On CPU its pages come zeroed from the operating system and take memory only once a sequence
    writes to them; torch.zeros would touch the whole cache at start-up.
    """
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, device=device, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    cache = torch.frombuffer(pages, dtype=dtype).view(shape)
    prefer_huge_pages(cache)
    return cache
