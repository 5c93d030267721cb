"""FP8 experts on FP8 rows (`scaled_mm`): against the plain form, and their time beside others.

Legend: R rows, D model dim, F expert hidden dim, e experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.moe.backend_choice import choose_backend
from engine.moe.experts import ExpertWeights, make_backend
from engine.moe.low_bit_experts import ExpertLayouts
from engine.ops.grouped_ffn import grouped_ffn_reference
from engine.ops.grouped_low_bit import low_bit_ffn
from engine.ops.low_bit_floats import quantise_fp8
from engine.ops.quantised_rows import round_to
from engine.ops.scaled_ffn import RowWeights, round_rows, round_rows_reference, scaled_ffn
from gpu_checks.check import Check, Settings, at_most, figure, not_here, relative_error
from gpu_checks.peaks import seconds_of
from gpu_checks.shapes import MIXTRAL, tiny

GROUP, HIDDEN, FFN = "experts", 256, 512
COUNTS = {"skewed": [64, 0, 1, 130, 17, 256, 3, 41], "one row": [0, 0, 0, 1, 0, 0, 0, 0]}
# The plain form rounds the same numbers; where sums in another order give another bfloat16 between
# the products, its code may be another. The rounding of rows and weights itself is some 6%.
BOUND, ROUNDING = 1e-2, 0.1
_LAYOUT = ExpertLayouts.of_fp8_rows().w13


def rounded(weights_eOI: torch.Tensor) -> RowWeights:
    """Return weights in FP8 row by row."""
    made = round_to(weights_eOI, _LAYOUT)
    assert isinstance(made, RowWeights)
    return made


@torch.inference_mode()
def check_scaled(device: torch.device) -> Iterator[Check]:
    """Check the rounding of rows and the FFN, rows apart as they come from other ranks."""
    try:
        choose_backend("scaled_mm", device, torch.bfloat16, (HIDDEN, FFN))
    except ValueError as error:
        yield not_here(GROUP, "scaled_mm bfloat16", str(error).split(";")[0])
        return
    torch.manual_seed(0)
    w13_e2FD, w2_eDF = torch.randn(8, 2 * FFN, HIDDEN) / 16, torch.randn(8, HIDDEN, FFN) / 22
    w13, w2 = rounded(w13_e2FD), rounded(w2_eDF)
    moved = [RowWeights(each.codes_eOI.to(device), each.scale_eO.to(device)) for each in (w13, w2)]
    for load, counts in COUNTS.items():
        x_RD = torch.randn(sum(counts), HIDDEN).to(torch.bfloat16)
        index_R = torch.randperm(len(x_RD))
        given = x_RD.to(device), index_R.to(device)
        (codes, scale), (plain, plain_scale) = (
            round_rows(*given),
            round_rows_reference(x_RD, index_R),
        )
        differing = (codes.cpu().view(torch.uint8) != plain.view(torch.uint8)).sum()
        differing = int(differing) + int((scale.cpu() != plain_scale).sum())
        yield at_most(GROUP, f"rows rounded to FP8, {load}: codes and scales differ", differing, 0)
        result_RD = scaled_ffn(given[0], *moved, counts, None, given[1])
        expected_RD = scaled_ffn(x_RD, w13, w2, counts, None, index_R)
        error = relative_error(result_RD.float(), expected_RD.float())
        yield at_most(GROUP, f"scaled_mm bfloat16, {load}", error, BOUND)
        exact_RD = grouped_ffn_reference(x_RD[index_R].float(), w13_e2FD, w2_eDF, counts)
        error = relative_error(result_RD.cpu()[index_R].float(), exact_RD)
        yield at_most(GROUP, f"scaled_mm bfloat16, {load}, of unrounded", error, ROUNDING)


@torch.inference_mode()
def check_scaled_speed(settings: Settings) -> Iterator[Check]:
    """Time one layer's experts beside grouped_mm in bfloat16 and the low-bit product of FP8."""
    device, shape = settings.device, tiny(MIXTRAL) if settings.is_tiny else MIXTRAL
    try:
        choose_backend("scaled_mm", device, torch.bfloat16, (shape.hidden, shape.ffn))
    except ValueError as error:
        yield not_here("speed", "scaled_mm", str(error).split(";")[0])
        return
    weights = ExpertWeights(shape.experts, shape.hidden, shape.ffn, device, torch.bfloat16)
    for parameter in weights.parameters():
        parameter.normal_(0, 0.02)
    pair = weights.w13_e2FD, weights.w2_eDF
    w13, w2 = (rounded(each) for each in pair)
    packed = [quantise_fp8(each, (1, each.shape[2])) for each in pair]
    grouped = make_backend("grouped_mm", weights)
    for rows in (1, 4) if settings.is_tiny else (1, 16, 64, 1024):
        counts = [rows] * shape.experts
        x_RD = torch.randn(sum(counts), shape.hidden, device=device).to(torch.bfloat16)
        scaled_s, grouped_s, packed_s = (
            seconds_of(call, device)
            for call in (
                lambda x=x_RD, c=counts: scaled_ffn(x, w13, w2, c),
                lambda x=x_RD, c=counts: grouped(x, c),
                lambda x=x_RD, c=counts: low_bit_ffn(x, packed[0], packed[1], c),
            )
        )
        for name, seconds in (("grouped_mm", grouped_s), ("the low-bit FP8 product", packed_s)):
            yield figure(
                "speed",
                f"scaled_mm, {rows} rows each, of the time of {name}",
                scaled_s / seconds,
                f"{scaled_s * 1e3:.3f} ms; {(w13.num_bytes + w2.num_bytes) / 1e9:.2f} GB",
                1.0,
            )
