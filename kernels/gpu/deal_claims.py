"""deal_claims on CUDA: one Triton program per run of the ordered claims, counts added atomically.

The counts are integers, so the order in which programs add them does not matter.

`deal_claims` imports this file only where Triton and a CUDA tensor are at hand.

Legend: E experts in home order, H most hosts of an expert, B claims of a rank after padding,
M = W * B, I instances, W ranks.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.deal_rows import host_of
from engine.ops.gpu.variants import Variant, meta


# Sizes, strides and addresses depend on how many claims there are, hosts on where copies are.
@triton.jit(
    do_not_specialize=["num_claims", "size", "codes_stride", "num_hosts", "num_instances"],
    do_not_specialize_on_alignment=["codes", "order", "slots"],
)
def _deal_claims_kernel(
    codes,
    order,
    slots,
    ends,
    hosts,
    instances,
    counts,
    num_claims,
    size,
    codes_stride,
    num_experts,
    num_hosts,
    num_instances,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = m < num_claims
    claim = tl.load(order + m, mask=exists, other=0)
    slot = tl.load(slots + m, mask=exists, other=0)
    rank = claim // size
    code = tl.load(codes + rank * codes_stride + claim % size, mask=exists, other=2 * num_experts)
    competes = code < num_experts
    is_exempt = (code >= num_experts) & (code < 2 * num_experts)
    dealt = host_of(code, slot, ends, hosts, num_hosts, competes)
    home = (code - num_experts) * (num_hosts + 1)
    instance = tl.where(is_exempt, tl.load(hosts + home, mask=is_exempt, other=-1), dealt)
    tl.store(instances + claim, instance, mask=exists)
    is_sent = exists & (instance >= 0)
    tl.atomic_add(counts + rank * num_instances + instance, is_sent.to(tl.int64), mask=is_sent)


def deal_claims_triton(
    code_WB: torch.Tensor,
    order_M: torch.Tensor,
    slot_M: torch.Tensor,
    ends_EH: torch.Tensor,
    hosts_EH1: torch.Tensor,
    num_instances: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of `deal_claims`: same arguments and results."""
    (num_ranks, size), (num_experts, num_hosts) = code_WB.shape, ends_EH.shape
    code_WB = code_WB if code_WB.stride(1) == 1 else code_WB.contiguous()
    instance_WB = torch.empty_like(code_WB, memory_format=torch.contiguous_format)
    counts_WI = code_WB.new_zeros(num_ranks, num_instances)
    num_claims = order_M.numel()
    if num_claims:
        block = 256
        _deal_claims_kernel[(triton.cdiv(num_claims, block),)](
            code_WB,
            order_M,
            slot_M,
            ends_EH.contiguous(),
            hosts_EH1,
            instance_WB,
            counts_WI,
            num_claims,
            size,
            code_WB.stride(0),
            num_experts,
            num_hosts,
            num_instances,
            BLOCK=block,
            num_warps=4,
        )
    return instance_WB, counts_WI


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: 8 experts on 2 ranks, 128 on 8."""

    def variant(num_ranks: int, num_experts: int) -> Variant:
        def call(claims: int) -> None:
            code_WB = meta(num_ranks, claims, dtype=torch.int64)
            order_M, slot_M = (meta(num_ranks * claims, dtype=torch.int64) for _ in range(2))
            ends_EH, hosts_EH1 = (meta(num_experts, hosts, dtype=torch.int64) for hosts in (3, 4))
            instances = num_experts + 3
            deal_claims_triton(code_WB, order_M, slot_M, ends_EH, hosts_EH1, instances)

        return Variant(f"{num_experts} experts, {num_ranks} ranks", call)

    yield variant(2, 8)
    yield variant(8, 128)
