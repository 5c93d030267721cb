"""Which attention backend runs: the setting attention.backend, what is installed, and the layers.

The same on every rank: it depends on the config, on the model and on what is installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.layers.attention_backends import flashinfer, varlen
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
    wanted = ("flashinfer", "varlen") if setting == "auto" else (setting,)
    for name in wanted:
        if name == "triton":
            break
        problem = _problem(name, kinds, device, dtype, kv_dtype, block_size)
        if problem is None:
            if name == "flashinfer":
                return flashinfer.FlashInferAttention(device, dtype, kv_dtype, block_size)
            return varlen.VarlenAttention()
        if setting != "auto":
            raise ValueError(
                f"attention.backend = {name!r}: {problem}; or take auto or triton, which serve "
                "every layer"
            )
    return PAGED_KERNELS


def _problem(
    name: str,
    kinds: Sequence[AttentionKind],
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    block_size: int,
) -> str | None:
    """Return why a backend cannot run the model here; None: it can."""
    if device.type != "cuda":
        return f"it runs on CUDA alone, and the model on {device.type}"
    if name == "flashinfer":
        if not flashinfer.is_installed():
            return "FlashInfer is not installed here (pip install flashinfer-python)"
        found = (flashinfer.refusal(kind, dtype, kv_dtype) for kind in kinds)
    else:
        if not varlen.is_installed():
            return "this torch has no varlen_attn with block tables; it came with torch 2.13"
        found = (varlen.refusal(kind, dtype, kv_dtype, block_size) for kind in kinds)
    return next((problem for problem in found if problem is not None), None)
