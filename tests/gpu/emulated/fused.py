"""Triton kernels on the emulated device: each is its torch reference and counts its launches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from engine.ops import (
    block_scaled_ffn,
    causal_conv,
    claims,
    deal,
    gated_delta_rule,
    gated_rms_norm,
    grouped_low_bit,
    latent_rotary_store,
    order_claims,
    paged_attention,
    permute,
    qk_rotary_store,
    rms_norm,
    scaled_ffn,
    select_experts,
    select_top,
    silu_and_mul,
    sort_by_expert,
    store_kv,
    table_experts,
    triton_support,
    unique_rows,
    zero_experts,
)
from tests.gpu.emulated.device import DEVICE, DeviceError, place
from tests.gpu.emulated.nested import leaves, mapped
from tests.gpu.emulated.tensors import CudaTensor


def _rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
) -> torch.Tensor:
    if residual_TD is None:
        return rms_norm.rms_norm_reference(x_TD, weight_D, eps)
    return rms_norm.add_rms_norm_reference(x_TD, residual_TD, weight_D, eps)


def _paged_attention(*args: Any, query_lens: list[int], **options: Any) -> torch.Tensor:
    """Read lengths where the kernel does, on the device: in a replay those of the host are old."""
    starts, contexts = args[3].tolist(), args[4].tolist()
    lens = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    if len(lens) != len(query_lens) or sum(lens) > sum(query_lens):
        raise DeviceError(f"{place()}: a grid for the queries {query_lens}, and {lens} are there")
    options["context_lens"] = contexts
    return paged_attention.paged_attention_reference(*args, query_lens=lens, **options)


# By the kernel that it replaces; in a module of engine/ops/gpu of that name unless _MODULES has it.
_REFERENCES: dict[str, Callable[..., Any]] = {
    "add_zero_experts": zero_experts.add_zero_experts_reference,
    "apply_selection": select_experts.apply_selection_reference,
    "causal_conv_silu": causal_conv.causal_conv_silu_reference,
    "cells_of_rows": unique_rows.cells_of_rows_reference,
    "combine_rows": permute.combine_rows_reference,
    "count_claims": claims.count_claims_reference,
    "count_groups": unique_rows.count_groups_reference,
    "deal_claims": deal.deal_claims_reference,
    "deal_rows": deal.deal_rows_reference,
    "extra_claims": claims.extra_claims_reference,
    "gate_output": silu_and_mul.gate_output_reference,
    "gated_delta_rule": gated_delta_rule.gated_delta_rule_reference,
    "gated_rms_norm": gated_rms_norm.gated_rms_norm_reference,
    "gather_rows": permute.gather_rows_reference,
    "grouped_low_bit": grouped_low_bit.grouped_low_bit_reference,
    "latent_rotary_store": latent_rotary_store.latent_rotary_store_reference,
    "list_claims": deal.list_claims_reference,
    "make_claims": claims.make_claims_reference,
    "mark_groups": unique_rows.mark_groups_reference,
    "pack_headers": unique_rows.pack_headers_reference,
    "pack_rows": permute.pack_rows_reference,
    "paged_attention": _paged_attention,
    "place_and_round": block_scaled_ffn.place_and_round_reference,
    "qk_rotary_store": qk_rotary_store.qk_rotary_store_reference,
    "quotas": select_top.quotas_reference,
    "rms_norm": _rms_norm,
    "round_rows": scaled_ffn.round_rows_reference,
    "rows_by_expert": unique_rows.rows_by_expert_reference,
    "select_experts": select_experts.select_experts_reference,
    "select_grouped": select_top.select_grouped_reference,
    "select_reduced": select_top.select_top_reference,
    "select_with_zero_experts": zero_experts.select_with_zero_experts_reference,
    "silu_and_place": block_scaled_ffn.silu_and_place_reference,
    "silu_and_round": scaled_ffn.silu_and_round_reference,
    "silu_and_mul": silu_and_mul.silu_and_mul_reference,
    "sort_key": order_claims.sort_key_reference,
    "sort_by_expert": sort_by_expert.sort_by_expert_reference,
    "spread_weights": unique_rows.spread_weights_reference,
    "store_kv": store_kv.store_kv_reference,
    "table_experts": table_experts.table_experts_reference,
    "unpack_rows": permute.unpack_rows_reference,
}
_MODULES = {
    "cells_of_rows": "row_headers",
    "count_groups": "unique_rows",
    "mark_groups": "unique_rows",
    "pack_headers": "row_headers",
    "place_and_round": "round_blocks",
    "select_with_zero_experts": "select_experts",
    "silu_and_place": "round_blocks",
    "silu_and_round": "round_rows",
    "spread_weights": "row_headers",
}
# Launches of those that set memory to zero first, or that have steps; of all others it is one.
_LAUNCHES: dict[str, Callable[..., int]] = {
    "count_claims": lambda *_: 2,
    "count_groups": lambda *_: 2,
    "deal_claims": lambda *_: 2,
    "list_claims": lambda *_: 2,
    "make_claims": lambda *_: 2,
    # Of more than one block also a count.
    "rows_by_expert": lambda bits, *_: 2 if bits.shape[0] > 1024 else 1,
    "select_grouped": lambda *_: 2,
    # Per digit of each word a count, its sum over ranks and the cut; then the marks.
    "select_reduced": lambda words, *_: 2 + 3 * 4 * len(words),
    "sort_by_expert": lambda ids, *_: 2 if ids.numel() > 4096 else 1,
}


def patch_triton(patch: pytest.MonkeyPatch) -> None:
    """Let ops on the emulated device take the branch of the Triton kernels."""
    patch.setattr(triton_support, "_installed", lambda: True)
    modules: dict[str, ModuleType] = {}
    for name, reference in _REFERENCES.items():
        path = f"engine.ops.gpu.{_MODULES.get(name, name)}"
        module = modules.setdefault(path, ModuleType(path))
        setattr(module, f"{name}_triton", _one_kernel(name, reference))
        patch.setitem(sys.modules, path, module)


def _one_kernel(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*args: Any, **options: Any) -> Any:
        if DEVICE.is_in_kernel:  # a reference is made of others
            return reference(*args, **options)
        tensors = [*leaves(args)]
        for number, each in enumerate(tensors):
            if isinstance(each, torch.Tensor) and not isinstance(each, CudaTensor):
                raise DeviceError(f"{place()}: argument {number} of {name} is a CPU tensor")
        DEVICE.load(f"the kernel {name}")
        run = partial(_as_kernel, reference)
        made = run(*args, **options)
        if DEVICE.capture is not None:
            DEVICE.capture.record(name, run, args, made, options)
        first = next(each for each in tensors if isinstance(each, torch.Tensor))
        launches = _LAUNCHES[name](*args) if name in _LAUNCHES else 1
        DEVICE.launch(f"triton {name}", launches if first.numel() else 0)
        return made

    return launch


def _as_kernel(reference: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run a kernel on emulated tensors, or in a replay on their numbers."""
    with DEVICE.one_kernel():
        named = {key: mapped(_on_device, value) for key, value in options.items()}
        return reference(*mapped(_on_device, args), **named)


def _on_device(value: Any) -> Any:
    is_bare = isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor)
    return CudaTensor(value) if is_bare else value
