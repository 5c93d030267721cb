"""list_claims on CUDA: one Triton program per run of one rank's claims, counts added atomically.

The counts are integers, so the order in which programs add them does not matter.

`list_claims` imports this file only where Triton and a CUDA tensor are at hand.

Legend: E experts in home order, B claims of a rank after padding, M = W * B, C = 2 * E + 1, W
ranks.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.deal import empty_list, parts_of_list
from engine.ops.gpu.variants import Variant, meta


# Sizes, strides and addresses depend on how many claims there are.
@triton.jit(
    do_not_specialize=["size", "codes_stride", "non_finite_stride"],
    do_not_specialize_on_alignment=["codes", "order", "non_finite", "place"],
)
def _list_claims_kernel(
    codes,
    order,
    non_finite,
    counts,
    place,
    size,
    num_experts,
    codes_stride,
    non_finite_stride,
    BLOCK: tl.constexpr,
    PAD_C: tl.constexpr,
):
    rank = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = n < size
    code = tl.load(codes + rank * codes_stride + n, mask=exists, other=2 * num_experts)
    # What is not counted goes behind the last exempt expert.
    num_C = tl.histogram(tl.minimum(code, 2 * num_experts).to(tl.int32), PAD_C)
    each_C = tl.arange(0, PAD_C)
    counts += rank * (2 * num_experts + 1)
    is_counted = (each_C < 2 * num_experts) & (num_C > 0)
    tl.atomic_add(counts + each_C, num_C.to(tl.int64), mask=is_counted)
    if tl.program_id(1) == 0:
        flag = tl.load(non_finite + rank * non_finite_stride)
        tl.store(counts + 2 * num_experts, flag.to(tl.int64))
    # The same program puts as many places into order, of whatever ranks.
    m = rank * size + n
    claim = tl.load(order + m, mask=exists, other=0)
    length = tl.maximum(size, 1)  # where there are no claims
    listed = tl.load(codes + claim // length * codes_stride + claim % length, mask=exists, other=0)
    tl.store(place + m, tl.where(listed < num_experts, listed, -1), mask=exists)


def list_claims_triton(
    code_WB: torch.Tensor, order_M: torch.Tensor, non_finite_W1: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Triton form of `list_claims`: same arguments and results."""
    num_ranks, size = code_WB.shape
    listed = empty_list(code_WB, num_experts)
    counts_WC, place_M1 = parts_of_list(listed, num_ranks, num_experts)
    counts_WC.zero_()
    code_WB = code_WB if code_WB.stride(1) == 1 else code_WB.contiguous()
    block = 1024
    # A rank without claims still has a flag.
    _list_claims_kernel[(num_ranks, max(1, triton.cdiv(size, block)))](
        code_WB,
        order_M,
        non_finite_W1,
        counts_WC,
        place_M1,
        size,
        num_experts,
        code_WB.stride(0),
        non_finite_W1.stride(0),
        BLOCK=block,
        PAD_C=triton.next_power_of_2(2 * num_experts + 1),
    )
    return listed


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: 8 experts on 2 ranks, 128 on 8."""

    def variant(num_ranks: int, num_experts: int) -> Variant:
        def call(claims: int) -> None:
            code_WB = meta(num_ranks, claims, dtype=torch.int64)
            order_M = meta(num_ranks * claims, dtype=torch.int64)
            non_finite_W1 = meta(num_ranks, claims + 3, dtype=torch.int64)[:, claims : claims + 1]
            list_claims_triton(code_WB, order_M, non_finite_W1, num_experts)

        return Variant(f"{num_experts} experts, {num_ranks} ranks", call)

    yield variant(2, 8)
    yield variant(8, 128)
