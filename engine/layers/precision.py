"""Precision: which dtype a model computes in, given that of its weights (model.dtype).

On CUDA the two are one. On a CPU weights in bfloat16 take half the memory, and half the time where
memory sets it, while arithmetic in float32 is what its kernels do best: so the matrices of the
projections, the dense MLPs, the experts, the embedding and the head are held in bfloat16, and all
else is float32: hidden states, norms, biases, gates, the KV cache and the rows that travel. So is
MLA's up-projection, which plain products read. What products round is in `engine/ops/native.py`.
"""

from __future__ import annotations

import torch


def compute_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of everything but the weight matrices.

    Args:
        weights: of the matrices, model.dtype.
        device: of the model.
    """
    return torch.float32 if device.type == "cpu" and weights == torch.bfloat16 else weights


def cache_dtype(setting: str, computed: torch.dtype) -> torch.dtype:
    """Return the dtype of keys and values in the cache.

    Args:
        setting: scheduler.kv_dtype.
        computed: what the model computes in.
    """
    return torch.float8_e4m3fn if setting == "fp8" else computed
