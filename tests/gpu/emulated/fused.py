"""Triton kernels on the emulated device: each is its torch reference, and counts as one kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from engine.ops import (
    latent_rotary_store,
    paged_attention,
    permute,
    qk_rotary_store,
    rms_norm,
    select_experts,
    silu_and_mul,
    store_kv,
    triton_support,
)
from tests.gpu.emulated.device import DEVICE, DeviceError, place
from tests.gpu.emulated.tensors import CudaTensor

def _rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
) -> torch.Tensor:
    if residual_TD is None:
        return rms_norm.rms_norm_reference(x_TD, weight_D, eps)
    return rms_norm.add_rms_norm_reference(x_TD, residual_TD, weight_D, eps)


# By the module of engine/ops/gpu whose kernel it replaces.
_REFERENCES: dict[str, Callable[..., Any]] = {
    "combine_rows": permute.combine_rows_reference,
    "gate_output": silu_and_mul.gate_output_reference,
    "latent_rotary_store": latent_rotary_store.latent_rotary_store_reference,
    "paged_attention": paged_attention.paged_attention_reference,
    "qk_rotary_store": qk_rotary_store.qk_rotary_store_reference,
    "rms_norm": _rms_norm,
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
        if DEVICE.is_in_kernel:  # a reference is made of others
            return reference(*args, **options)
        for number, each in enumerate(args):
            if isinstance(each, torch.Tensor) and not isinstance(each, CudaTensor):
                raise DeviceError(f"{place()}: argument {number} of {name} is a CPU tensor")
        with DEVICE.one_kernel():
            made = reference(*args, **options)
        DEVICE.launch(f"triton {name}", int(args[0].numel() > 0))
        return made

    return launch
