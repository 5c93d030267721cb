"""Weight dtype: model.dtype resolved on this rank, agreed on by all, and in words."""

from __future__ import annotations

from typing import Any

import torch

from engine.config import Config
from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Topology
from engine.layers.precision import compute_dtype
from engine.ops import native

_CHECKPOINT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # taken over on CUDA


def model_dtype(name: str, hf_config: Any, device: torch.device) -> torch.dtype:
    """Resolve model.dtype on this rank: `auto` is the checkpoint's own on CUDA; on a CPU bfloat16
    where that is the checkpoint's and the compiled kernels multiply with it, else float32.
    """
    if name != "auto":
        return getattr(torch, name)
    own = getattr(hf_config, "dtype", None)
    if device.type == "cuda":
        return own if own in _CHECKPOINT_DTYPES else torch.float32
    narrow = own == torch.bfloat16 and native.has_bfloat16_products()
    return torch.bfloat16 if narrow else torch.float32


def agree_dtype(dtype: torch.dtype, config: Config, topology: Topology) -> torch.dtype:
    """Return the dtype of the weights on every rank, given each rank's `model_dtype`.

    With model.dtype = auto the CPUs of several hosts may differ: float32 then, which all of them
    multiply, since weights and copies of experts move between ranks.

    Collective over all ranks on the CPU with model.dtype = auto: every rank must call.
    """
    if config.model.dtype != "auto" or topology.device.type == "cuda":
        return dtype
    found = set(gather_objects(dtype, topology.host_world))
    return dtype if len(found) == 1 else torch.float32


def dtype_in_words(dtype: torch.dtype, device: torch.device) -> str:
    """Return the dtype of the weights, and where it is another one that of what is computed."""
    wide = compute_dtype(dtype, device)
    more = "" if wide == dtype else f" (weights), computes in {_name(wide)}"
    return f"{_name(dtype)}{more}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
