"""Which attention backend runs: the setting attention.backend, what is installed, and the layers.

The same on every rank: it depends on the config, on the model and on what is installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.layers.attention_backends.backend import AttentionBackend, AttentionKind
from engine.layers.attention_backends.paged_kernels import PAGED_KERNELS


def choose_backend(
    setting: str,
    kinds: Sequence[AttentionKind],
    *,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    block_size: int,
) -> AttentionBackend:
    """Return the backend of a model.

    Args:
        setting: attention.backend.
        kinds: of the model's layers with keys.
        dtype, kv_dtype: of the queries, and of the cache.

    Raises:
        ValueError: a backend is asked for that does not serve the model here.
    """
    if setting in ("flashinfer", "varlen"):
        raise ValueError(f"attention.backend = {setting!r}: is not there yet; use triton or auto")
    return PAGED_KERNELS
