"""count_claims on CUDA: one Triton program per run of one rank's claims, counts added atomically.

The counts are integers, so the order in which programs add them does not matter.

`count_claims` imports this file only where Triton and a CUDA tensor are at hand.

Legend: E experts, B claims of a rank after padding, P pools, W ranks.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta


# Strides and addresses of claims depend on how many there are.
@triton.jit(
    do_not_specialize=["size", "codes_stride", "keep_stride", "non_finite_stride"],
    do_not_specialize_on_alignment=["codes", "keep", "non_finite"],
)
def _count_claims_kernel(
    codes,
    keep,
    non_finite,
    pool_of_code,
    rows,
    claims_P,
    size,
    num_experts,
    num_pools,
    codes_stride,
    keep_stride,
    non_finite_stride,
    BLOCK: tl.constexpr,
    PAD_E: tl.constexpr,
    PAD_P: tl.constexpr,
):
    rank = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = n < size
    code = tl.load(codes + rank * codes_stride + n, mask=exists, other=3 * num_experts)
    kept = tl.load(keep + rank * keep_stride + n, mask=exists, other=0) != 0
    is_chosen = code < num_experts
    is_exempt = (code >= num_experts) & (code < 2 * num_experts)
    is_sent = is_exempt | (kept & (code < 3 * num_experts))
    # What is not counted goes behind the last expert or pool.
    expert = (code % num_experts).to(tl.int32)
    sent_E = tl.histogram(tl.where(is_sent, expert, num_experts), PAD_E)
    before_E = tl.histogram(tl.where(is_chosen | is_exempt, expert, num_experts), PAD_E)
    pool = tl.load(pool_of_code + code, mask=exists & is_chosen, other=0).to(tl.int32)
    claims = tl.histogram(tl.where(is_chosen, pool, num_pools), PAD_P)
    each_E, each_P = tl.arange(0, PAD_E), tl.arange(0, PAD_P)
    rows += rank * (2 * num_experts + 1)
    in_E = each_E < num_experts
    tl.atomic_add(rows + each_E, sent_E.to(tl.int64), mask=in_E & (sent_E > 0))
    tl.atomic_add(rows + num_experts + each_E, before_E.to(tl.int64), mask=in_E & (before_E > 0))
    in_P = (each_P < num_pools) & (claims > 0)
    tl.atomic_add(claims_P + each_P, claims.to(tl.int64), mask=in_P)
    if tl.program_id(1) == 0:
        flag = tl.load(non_finite + rank * non_finite_stride)
        tl.store(rows + 2 * num_experts, flag.to(tl.int64))


def count_claims_triton(
    code_WB: torch.Tensor,
    keep_WB: torch.Tensor,
    non_finite_W1: torch.Tensor,
    pool_of_code: torch.Tensor,
    num_pools: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of `count_claims`: same arguments and results."""
    num_ranks, size = code_WB.shape
    num_experts = (pool_of_code.numel() - 1) // 3
    length = num_ranks * (2 * num_experts + 1)
    counts = code_WB.new_zeros(length + num_pools)
    rows, claims_P = counts[:length].view(num_ranks, -1), counts[length:]
    code_WB = code_WB if code_WB.stride(1) == 1 else code_WB.contiguous()
    keep_WB = keep_WB if keep_WB.stride(1) == 1 else keep_WB.contiguous()
    block = 1024
    # A rank without claims still has a flag.
    _count_claims_kernel[(num_ranks, max(1, triton.cdiv(size, block)))](
        code_WB,
        keep_WB,
        non_finite_W1,
        pool_of_code,
        rows,
        claims_P,
        size,
        num_experts,
        num_pools,
        code_WB.stride(0),
        keep_WB.stride(0),
        non_finite_W1.stride(0),
        BLOCK=block,
        PAD_E=triton.next_power_of_2(num_experts + 1),
        PAD_P=triton.next_power_of_2(num_pools + 1),
    )
    return rows, claims_P


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: 8 experts on 2 ranks, 128 on 8; claims lie between other data."""

    def variant(num_ranks: int, num_experts: int) -> Variant:
        def call(claims: int) -> None:
            code_WB = meta(num_ranks, claims + 3, dtype=torch.int64)[:, 1 : 1 + claims]
            keep_WB = meta(num_ranks, claims, dtype=torch.bool)
            non_finite_W1 = meta(num_ranks, claims + 3, dtype=torch.int64)[:, claims : claims + 1]
            pool_of_code = meta(3 * num_experts + 1, dtype=torch.int64)
            count_claims_triton(code_WB, keep_WB, non_finite_W1, pool_of_code, num_experts)

        return Variant(f"{num_experts} experts, {num_ranks} ranks", call)

    yield variant(2, 8)
    yield variant(8, 128)
