"""quotas on CUDA: one Triton program per pool, the ranks in registers.

`quotas` imports this file only where Triton and a CUDA tensor are at hand.

Legend: W ranks, P pools.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta


@triton.jit
def _quotas_kernel(claims, limit_P, out, num_ranks, num_pools, PAD_W: tl.constexpr):
    pool = tl.program_id(0)
    rank_W = tl.arange(0, PAD_W)
    at_W = rank_W * num_pools + pool
    claims_W = tl.load(claims + at_W, mask=rank_W < num_ranks, other=0)
    total = tl.sum(claims_W, axis=0)
    slots = tl.minimum(total, tl.load(limit_P + pool))
    scaled_W = claims_W * slots
    divisor = tl.maximum(total, 1)
    quota_W = scaled_W // divisor
    rest_W = scaled_W - quota_W * divisor
    # One more slot each for the ranks with the largest remainders, the lower one of equals.
    rest_1W, rest_W1 = rest_W[None, :], rest_W[:, None]
    is_lower_WW = rank_W[None, :] < rank_W[:, None]
    before_WW = (rest_1W > rest_W1) | ((rest_1W == rest_W1) & is_lower_WW)
    before_WW = before_WW & (rank_W[None, :] < num_ranks)
    order_W = tl.sum(before_WW.to(tl.int32), axis=1)
    left = slots - tl.sum(quota_W, axis=0)
    quota_W += (order_W < left).to(tl.int64)
    tl.store(out + at_W, quota_W, mask=rank_W < num_ranks)


def quotas_triton(claims_WP: torch.Tensor, limit_P: torch.Tensor) -> torch.Tensor:
    """Triton form of `quotas`: same arguments and result."""
    num_ranks, num_pools = claims_WP.shape
    claims_WP = claims_WP.contiguous()
    quota_WP = torch.empty_like(claims_WP)
    _quotas_kernel[(num_pools,)](
        claims_WP,
        limit_P,
        quota_WP,
        num_ranks,
        num_pools,
        PAD_W=triton.next_power_of_2(num_ranks),
    )
    return quota_WP


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: 8 and 64 ranks; nothing depends on the tokens."""

    def variant(num_ranks: int, num_pools: int) -> Variant:
        def call(_tokens: int) -> None:
            claims_WP = meta(num_ranks, num_pools, dtype=torch.int64)
            quotas_triton(claims_WP, meta(num_pools, dtype=torch.int64))

        return Variant(f"{num_ranks} ranks, {num_pools} pools", call)

    yield variant(8, 8)
    yield variant(64, 128)
