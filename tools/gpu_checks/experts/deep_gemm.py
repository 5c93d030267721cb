"""FP8 experts in blocks by DeepGEMM (`deep_gemm`): against the plain form, and their time.

Without the library, or on another GPU than an H100 or H200, both print why they did not run.

Legend: R rows, D model dim, F expert hidden dim, e experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.moe.backend_choice import choose_backend
from engine.moe.experts import ExpertWeights, make_backend
from engine.moe.low_bit_experts import ExpertLayouts
from engine.ops.block_scaled_ffn import (
    BLOCK,
    BlockWeights,
    RowLayout,
    block_scaled_ffn,
    place_and_round,
    place_and_round_reference,
)
from engine.ops.grouped_ffn import grouped_ffn_reference
from engine.ops.grouped_low_bit import low_bit_ffn
from engine.ops.low_bit_floats import quantise_fp8
from engine.ops.quantised_rows import round_to
from gpu_checks.check import Check, Settings, at_most, figure, not_here, relative_error
from gpu_checks.peaks import seconds_of
from gpu_checks.shapes import MIXTRAL, tiny

GROUP, HIDDEN, FFN = "experts", 256, 512
COUNTS = {
    "skewed": [64, 0, 1, 130, 17, 256, 3, 41],  # contiguous
    "few rows": [3, 0, 1, 20, 7, 0, 3, 4],  # masked
    "one row": [0, 0, 0, 1, 0, 0, 0, 0],
    "one expert": [0, 0, 0, 0, 0, 500, 0, 0],
}
# As for scaled_mm: a sum in another order may give the next code between the products.
BOUND, ROUNDING = 1e-2, 0.1
_LAYOUT = ExpertLayouts.of_fp8_blocks().w13


def in_blocks(weights_eOI: torch.Tensor) -> BlockWeights:
    """Return weights in FP8 in blocks of 128 x 128."""
    made = round_to(weights_eOI, _LAYOUT)
    assert isinstance(made, BlockWeights)
    return made


@torch.inference_mode()
def check_deep_gemm(device: torch.device) -> Iterator[Check]:
    """Check where rows are put, their rounding and the FFN, rows apart as they come from ranks."""
    try:
        choose_backend("deep_gemm", device, torch.bfloat16, (HIDDEN, FFN))
    except ValueError as error:
        yield not_here(GROUP, "deep_gemm bfloat16", str(error).split(";")[0])
        return
    torch.manual_seed(0)
    w13_e2FD, w2_eDF = torch.randn(8, 2 * FFN, HIDDEN) / 16, torch.randn(8, HIDDEN, FFN) / 22
    w13, w2 = in_blocks(w13_e2FD), in_blocks(w2_eDF)
    moved = [
        BlockWeights(each.codes_eOI.to(device), each.scale_eHG.to(device)) for each in (w13, w2)
    ]
    for load, counts in COUNTS.items():
        x_RD = torch.randn(sum(counts), HIDDEN).to(torch.bfloat16)
        index_R = torch.randperm(len(x_RD))
        given = x_RD.to(device), index_R.to(device)
        yield at_most(GROUP, f"rows placed, {load}: differ", _differing(given, counts), 0)
        result_RD = block_scaled_ffn(given[0], *moved, counts, None, given[1])
        expected_RD = block_scaled_ffn(x_RD, w13, w2, counts, None, index_R)
        error = relative_error(result_RD.float(), expected_RD.float())
        yield at_most(GROUP, f"deep_gemm bfloat16, {load}", error, BOUND)
        exact_RD = grouped_ffn_reference(x_RD[index_R].float(), w13_e2FD, w2_eDF, counts)
        error = relative_error(result_RD.cpu()[index_R].float(), exact_RD)
        yield at_most(GROUP, f"deep_gemm bfloat16, {load}, of unrounded", error, ROUNDING)


def _differing(given: tuple[torch.Tensor, torch.Tensor], counts: list[int]) -> int:
    """Return how many places, owners, codes and scales of rows differ from the plain form's."""
    layout = RowLayout.of(sum(counts), len(counts), BLOCK)
    counts_e = torch.tensor(counts, dtype=torch.int32)
    ends_e = counts_e.cumsum(0, dtype=torch.int32)
    device = given[0].device
    got = place_and_round(*given, counts_e.to(device), ends_e.to(device), layout)
    host = given[0].cpu(), given[1].cpu()
    plain = place_and_round_reference(*host, counts_e, ends_e, layout)
    places = plain.place_R
    pairs = [(got.owner_P.cpu(), plain.owner_P), (got.place_R.cpu(), places)]
    (codes, scale), (plain_codes, plain_scale) = (
        (
            each.codes_PI.cpu().view(torch.uint8)[places],
            each.scale_SGM.cpu().transpose(1, 2).flatten(0, 1)[places],
        )
        for each in (got, plain)
    )
    pairs += [(codes, plain_codes), (scale, plain_scale)]
    return sum(int((one != other).sum()) for one, other in pairs)


@torch.inference_mode()
def check_deep_gemm_speed(settings: Settings) -> Iterator[Check]:
    """Time one layer's experts beside grouped_mm in bfloat16 and the low-bit product of FP8."""
    device, shape = settings.device, tiny(MIXTRAL) if settings.is_tiny else MIXTRAL
    try:
        choose_backend("deep_gemm", device, torch.bfloat16, (shape.hidden, shape.ffn))
    except ValueError as error:
        yield not_here("speed", "deep_gemm", str(error).split(";")[0])
        return
    weights = ExpertWeights(shape.experts, shape.hidden, shape.ffn, device, torch.bfloat16)
    for parameter in weights.parameters():
        parameter.normal_(0, 0.02)
    pair = weights.w13_e2FD, weights.w2_eDF
    w13, w2 = (in_blocks(each) for each in pair)
    packed = [quantise_fp8(each, (BLOCK, BLOCK)) for each in pair]
    grouped = make_backend("grouped_mm", weights)
    for rows in (1, 4) if settings.is_tiny else (1, 16, 64, 1024):
        counts = [rows] * shape.experts
        x_RD = torch.randn(sum(counts), shape.hidden, device=device).to(torch.bfloat16)
        library_s, grouped_s, packed_s = (
            seconds_of(call, device)
            for call in (
                lambda x=x_RD, c=counts: block_scaled_ffn(x, w13, w2, c),
                lambda x=x_RD, c=counts: grouped(x, c),
                lambda x=x_RD, c=counts: low_bit_ffn(x, packed[0], packed[1], c),
            )
        )
        for name, seconds in (("grouped_mm", grouped_s), ("the low-bit FP8 product", packed_s)):
            yield figure(
                "speed",
                f"deep_gemm, {rows} rows each, of the time of {name}",
                library_s / seconds,
                f"{library_s * 1e3:.3f} ms; {(w13.num_bytes + w2.num_bytes) / 1e9:.2f} GB",
                1.0,
            )
