"""Triton kernels on the emulated device: each is its torch reference and counts its launches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from engine.ops import (
    claims,
    latent_rotary_store,
    paged_attention,
    permute,
    qk_rotary_store,
    rms_norm,
    select_experts,
    select_top,
    silu_and_mul,
    sort_by_expert,
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
    "apply_selection": select_experts.apply_selection_reference,
    "combine_rows": permute.combine_rows_reference,
    "count_claims": claims.count_claims_reference,
    "extra_claims": claims.extra_claims_reference,
    "gate_output": silu_and_mul.gate_output_reference,
    "gather_rows": permute.gather_rows_reference,
    "latent_rotary_store": latent_rotary_store.latent_rotary_store_reference,
    "make_claims": claims.make_claims_reference,
    "pack_rows": permute.pack_rows_reference,
    "paged_attention": paged_attention.paged_attention_reference,
    "qk_rotary_store": qk_rotary_store.qk_rotary_store_reference,
    "quotas": select_top.quotas_reference,
    "rms_norm": _rms_norm,
    "select_experts": select_experts.select_experts_reference,
    "select_grouped": select_top.select_grouped_reference,
    "select_reduced": select_top.select_top_reference,
    "silu_and_mul": silu_and_mul.silu_and_mul_reference,
    "sort_by_expert": sort_by_expert.sort_by_expert_reference,
    "store_kv": store_kv.store_kv_reference,
    "unpack_rows": permute.unpack_rows_reference,
}
# Launches of those that set memory to zero first, or that have steps; of all others it is one.
_LAUNCHES: dict[str, Callable[..., int]] = {
    "count_claims": lambda *_: 2,
    "make_claims": lambda *_: 2,
    "select_grouped": lambda *_: 2,
    # Per digit of each word a count, its sum over ranks and the cut; then the marks.
    "select_reduced": lambda words, *_: 2 + 3 * 4 * len(words),
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
        first = next(each for each in args if isinstance(each, torch.Tensor))
        launches = _LAUNCHES[name](*args) if name in _LAUNCHES else 1
        DEVICE.launch(f"triton {name}", launches if first.numel() else 0)
        return made

    return launch
