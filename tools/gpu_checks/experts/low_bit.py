"""Experts in few bits: every format against its dequantised weights, and its time beside bfloat16.

Legend: R rows, D model dim, F expert hidden dim, e experts, O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from engine.moe.backend_choice import choose_backend
from engine.moe.expert_form import ExpertForm
from engine.moe.experts import ExpertWeights, make_backend
from engine.ops.grouped_low_bit import Between, grouped_ffn_low_bit_reference, low_bit_ffn
from engine.ops.low_bit_floats import pack_mxfp4, quantise_fp8
from engine.ops.quantised import quantise
from engine.ops.quantised_rows import LowBit
from gpu_checks.cache_cases import Case
from gpu_checks.check import Check, Settings, figure, not_here
from gpu_checks.peaks import seconds_of
from gpu_checks.shapes import MIXTRAL, tiny

GROUP = "speed"
COUNTS = {"few rows": [5, 0, 1, 32], "many rows": [5, 0, 1, 70]}  # of both heights of tiles


def _mxfp4(values_eOI: torch.Tensor) -> LowBit:
    """Codes as they come, of a size that products can bear."""
    experts, outputs, inputs = values_eOI.shape
    codes = torch.randint(
        256, (experts, outputs, inputs // 2), dtype=torch.uint8, device=values_eOI.device
    )
    shape = experts, outputs, inputs // 32
    return pack_mxfp4(codes, torch.full(shape, 127 - 6, dtype=torch.uint8, device=codes.device))


FORMATS: dict[str, Callable[[torch.Tensor], LowBit]] = {
    "int8": lambda values: quantise(values, 8),
    "int4": lambda values: quantise(values, 4),
    "mxfp4": _mxfp4,
    "fp8 128x128": lambda values: quantise_fp8(values, (128, 128)),
    "fp8 per row": lambda values: quantise_fp8(values, (1, values.shape[2])),
}


def low_bit_cases() -> Iterator[Case]:
    """Yield the FFN of each format with few and many rows, and one of experts like gpt-oss's."""
    plain, biases = ExpertForm(), (torch.randn(4, 512) / 8, torch.randn(4, 256) / 8)
    of_gpt_oss = ExpertForm(activation="gpt_oss", bias=True, limit=7.0)
    for name, make in FORMATS.items():
        w13, w2 = make(torch.randn(4, 512, 256) / 16), make(torch.randn(4, 256, 256) / 16)
        for rows, counts in COUNTS.items():
            yield _case(f"low-bit experts, {name}, {rows}", w13, w2, counts, Between(plain.rule))
    w13, w2 = _mxfp4(torch.randn(4, 512, 256) / 16), _mxfp4(torch.randn(4, 256, 256) / 16)
    between = Between(of_gpt_oss.rule, *biases)
    yield _case("low-bit experts, mxfp4 with biases", w13, w2, COUNTS["few rows"], between)


def _case(name: str, w13: LowBit, w2: LowBit, counts: list[int], between: Between) -> Case:
    def run(x_RD: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
        given = (_on(w13, x_RD.device), _on(w2, x_RD.device))
        rule, *biases = between
        moved = (None if bias is None else bias.to(x_RD.device, x_RD.dtype) for bias in biases)
        return low_bit_ffn(x_RD, *given, counts, None, index_R, Between(rule, *moved))

    def reference(x_RD: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
        return grouped_ffn_low_bit_reference(x_RD, w13, w2, counts, None, index_R, between)

    rows = sum(counts)
    return name, run, reference, [torch.randn(rows, w13.inputs), torch.randperm(rows)]


def _on(weights: LowBit, device: torch.device) -> LowBit:
    zero_ePGN = weights.zero_ePGN
    return dataclasses.replace(
        weights,
        packed_ePCN=weights.packed_ePCN.to(device),
        scale_ePGN=weights.scale_ePGN.to(device),
        zero_ePGN=None if zero_ePGN is None else zero_ePGN.to(device),
    )


@torch.inference_mode()
def check_low_bit_speed(settings: Settings) -> Iterator[Check]:
    """Time one layer's experts in each format beside grouped_mm on bfloat16 weights."""
    device, shape = settings.device, tiny(MIXTRAL) if settings.is_tiny else MIXTRAL
    try:
        choose_backend("grouped_mm", device, torch.bfloat16)
    except ValueError as error:
        yield not_here(GROUP, "low-bit experts", str(error).split(";")[0])
        return
    weights = ExpertWeights(shape.experts, shape.hidden, shape.ffn, device, torch.bfloat16)
    for parameter in weights.parameters():
        parameter.normal_(0, 0.02)
    w13_e2FD, w2_eDF = weights.w13_e2FD, weights.w2_eDF
    plain, wide = make_backend("grouped_mm", weights), {}
    for name, make in FORMATS.items():
        w13, w2 = make(w13_e2FD), make(w2_eDF)
        for rows in (1, 4) if settings.is_tiny else (1, 16, 64, 1024):
            counts = [rows] * shape.experts
            x_RD = torch.randn(sum(counts), shape.hidden, device=device).to(torch.bfloat16)
            if rows not in wide:
                wide[rows] = seconds_of(lambda x=x_RD, c=counts: plain(x, c), device)
            seconds = seconds_of(
                lambda x=x_RD, c=counts, up=w13, down=w2: low_bit_ffn(x, up, down, c), device
            )
            yield figure(
                GROUP,
                f"low-bit experts, {name}, {rows} rows each, of grouped_mm's time",
                seconds / wide[rows],
                f"{seconds * 1e3:.3f} ms; {(w13.num_bytes + w2.num_bytes) / 1e9:.2f} GB",
                1.0,
            )
        del w13, w2
