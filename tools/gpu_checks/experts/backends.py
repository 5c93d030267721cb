"""Experts backends against a float64 computation from the same rounded inputs and weights.

Legend: R rows, D model dim, F expert hidden dim, e experts.
"""

from __future__ import annotations

import torch

from engine.layers.precision import compute_dtype
from engine.moe.backend_choice import choose_backend
from engine.moe.experts import ExpertWeights, make_backend
from engine.ops.grouped_ffn import grouped_ffn_reference
from gpu_checks.check import Check, at_most, guarded, relative_error
from gpu_checks.experts.copies import check_copied_experts
from gpu_checks.experts.deep_gemm import check_deep_gemm
from gpu_checks.experts.scaled import check_scaled

GROUP = "experts"
HIDDEN, FFN = 256, 512
COUNTS = {
    "even": [32] * 8,
    "skewed": [64, 0, 1, 130, 17, 256, 3, 41],
    "one row": [0, 0, 0, 1, 0, 0, 0, 0],
    "no rows": [0] * 8,
}
BACKENDS = ("torch", "grouped_mm", "te")
# Relative error of the whole output. bfloat16 keeps 8 bits and rounds the hidden activation once
# more. Transformer Engine multiplies float32 in TF32 (10 bits), so it is held to less there.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
TF32_BOUND = 2e-3


def check_experts(device: torch.device) -> list[Check]:
    """Check every backend that runs here, float32 and bfloat16, even and skewed loads."""
    found: list[Check] = []
    for dtype in BOUNDS:
        for backend in BACKENDS:
            name = f"{backend} {_short(dtype)}"
            try:
                choose_backend(backend, device, dtype)
            except ValueError as error:
                note = str(error).split(";")[0]
                found.append(Check(group=GROUP, name=name, passed=None, note=note))
                continue
            for load, counts in COUNTS.items():
                label = f"{name}, {load}"
                found += guarded(
                    GROUP,
                    label,
                    lambda b=backend, d=dtype, c=counts, n=label: [_check(b, d, c, n, device)],
                )
            if dtype == torch.bfloat16:
                found += check_copied_experts(device, backend)
    found += guarded(GROUP, "scaled_mm", lambda: [*check_scaled(device)])
    return found + guarded(GROUP, "deep_gemm", lambda: [*check_deep_gemm(device)])


@torch.inference_mode()
def _check(
    backend: str, dtype: torch.dtype, counts: list[int], label: str, device: torch.device
) -> Check:
    torch.manual_seed(0)
    weights = ExpertWeights(len(counts), HIDDEN, FFN, device, dtype)
    for parameter in weights.parameters():
        parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    rows_RD = torch.randn(sum(counts), HIDDEN).to(device, compute_dtype(dtype, device))
    # As they arrive from other ranks: not grouped, and every result goes where its row lies.
    index_R = torch.randperm(len(rows_RD)).to(device)
    apart_RD = torch.empty_like(rows_RD).index_copy_(0, index_R, rows_RD)
    apart_RD = make_backend(backend, weights)(apart_RD, counts, None, index_R)
    result_RD = apart_RD.index_select(0, index_R)
    expected_RD = grouped_ffn_reference(
        rows_RD.cpu().double(),
        weights.w13_e2FD.cpu().double(),
        weights.w2_eDF.cpu().double(),
        counts,
    )
    tf32 = backend == "te" and dtype == torch.float32
    bound = TF32_BOUND if tf32 else BOUNDS[dtype]
    note = "TF32 products" if tf32 else ""
    return at_most(GROUP, label, relative_error(result_RD, expected_RD), bound, note)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
