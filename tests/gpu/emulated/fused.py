"""Triton kernels on the emulated device: each is its torch reference, and counts as one kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from engine.ops import (
    paged_attention,
    permute,
    select_experts,
    silu_and_mul,
    store_kv,
    triton_support,
)
from tests.gpu.emulated.device import DEVICE, DeviceError, place
from tests.gpu.emulated.tensors import CudaTensor

# By the module of engine/ops/gpu whose kernel it replaces.
_REFERENCES: dict[str, Callable[..., Any]] = {
    "combine_rows": permute.combine_rows_reference,
    "paged_attention": paged_attention.paged_attention_reference,
    "select_experts": select_experts.select_experts_reference,
    "silu_and_mul": silu_and_mul.silu_and_mul_reference,
    "store_kv": store_kv.store_kv_reference,
}


def patch_triton(patch: pytest.MonkeyPatch) -> None:
    """Let ops on the emulated device take the branch of the Triton kernels."""
    patch.setattr(triton_support, "_installed", lambda: True)
    for name, reference in _REFERENCES.items():
        module = ModuleType(f"engine.ops.gpu.{name}")
        setattr(module, f"{name}_triton", _one_kernel(name, reference))
        patch.setitem(sys.modules, module.__name__, module)


def _one_kernel(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*args: Any, **options: Any) -> Any:
        for number, each in enumerate(args):
            if isinstance(each, torch.Tensor) and not isinstance(each, CudaTensor):
                raise DeviceError(f"{place()}: argument {number} of {name} is a CPU tensor")
        with DEVICE.one_kernel():
            made = reference(*args, **options)
        DEVICE.launch(f"triton {name}", int(args[0].numel() > 0))
        return made

    return launch
