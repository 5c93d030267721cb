"""DeepEP's library: importing it, and why `deep_ep.py` cannot use it here."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from engine.config import MoEConfig
from engine.moe.dispatch.transports.transport import Setup

# Ranks that NVLink connects, for which its kernels are built. Between hosts the throughput kernels
# read how many rows come on the host, which a transport may not.
RANKS = (2, 4, 8)
_MOST_TOP_K = 32
_MOST_LOCAL = 1024
_ROW_ALIGNMENT = 16  # bytes
_CAPABILITY = (9, 0)
_NEEDS = "DeepEP 1.2.1 or newer (https://github.com/deepseek-ai/DeepEP), built with NVSHMEM"


def obstacle(setup: Setup, config: MoEConfig) -> str | None:
    """Return why DeepEP cannot move a layer's rows, in words; None: it can."""
    if setup.group.size not in RANKS:
        return (
            f"it is used within one host, on 2, 4 or 8 ranks, and parallel.expert is "
            f"{setup.group.size}"
        )
    if setup.dtype != torch.bfloat16:
        name = str(setup.dtype).removeprefix("torch.")
        return f"DeepEP moves rows in bfloat16 alone, and these are {name} (model.dtype)"
    if config.dispatch.dtype == "fp8":
        return "moe.dispatch.dtype = 'fp8' is not built for it"
    if setup.width * setup.dtype.itemsize % _ROW_ALIGNMENT:
        return f"a row has to be a multiple of 16 bytes, and the model's are {setup.width} numbers"
    if setup.top_k > _MOST_TOP_K or setup.most_local > _MOST_LOCAL:
        return (
            f"it takes at most {_MOST_TOP_K} experts per token and {_MOST_LOCAL} per rank, and the "
            f"model has {setup.top_k} and {setup.most_local}"
        )
    capability = torch.cuda.get_device_capability(setup.device)
    if capability < _CAPABILITY:
        found = ".".join(map(str, capability))
        return f"it needs a GPU of compute capability 9.0 or more, and this one's is {found}"
    try:
        library = load()
    except ImportError as error:
        return str(error)
    if getattr(library, "topk_idx_t", torch.int64) != torch.int64:
        return "this DeepEP was built for ids of 32 bits; build it without TOPK_IDX_BITS"
    return None


def load() -> Any:
    """Return the library.

    Raises:
        ImportError: it is not there, or not what is needed; the text says so in one line.
    """
    try:
        library = importlib.import_module("deep_ep")
    except ModuleNotFoundError as error:
        if error.name == "deep_ep":
            raise ImportError(f"it needs {_NEEDS}, which is not installed") from error
        raise ImportError(f"it needs {_NEEDS}, whose import fails: {error}") from error
    except Exception as error:  # a build for another torch or CUDA fails in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ImportError(f"it needs {_NEEDS}, whose import fails: {reason}") from error
    if not hasattr(library, "Buffer"):
        raise ImportError(f"it needs {_NEEDS}, and the installed one has no Buffer")
    return library
