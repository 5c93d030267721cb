"""Rows dealt to the instances of their experts, each step one op: an expert's rows have an order,
and its hosts take them in turn. `engine/moe/placement/` says what instances, homes and hosts are.

Legend: T tokens, K top-k, E experts in home order, H most hosts of an expert, B claims of a rank
after padding, M = W * B claims of all ranks, C = 2 * E + 1 counts of a rank, I instances, W ranks.
"""

import torch

from engine.ops import triton_support


def deal_rows(
    ids_TK: torch.Tensor, place_TK: torch.Tensor, ends_EH: torch.Tensor, hosts_EH1: torch.Tensor
) -> torch.Tensor:
    """Return the instance that computes each row, int64 [T, K]: the first host whose end is behind
    the row's place, -1 for a row behind all ends, and for one with a negative id.

    Args:
        ids_TK: int64, rows of the tables.
        place_TK: int64, the place of each row, counted as the ends are.
        ends_EH: int64, where each host's rows end, ascending.
        hosts_EH1: int64, the instances of the hosts, and -1 behind the last.
    """
    if triton_support.serves(ids_TK):
        from engine.ops.gpu.deal_rows import deal_rows_triton

        return deal_rows_triton(ids_TK, place_TK, ends_EH, hosts_EH1)
    return deal_rows_reference(ids_TK, place_TK, ends_EH, hosts_EH1)


def deal_rows_reference(
    ids_TK: torch.Tensor, place_TK: torch.Tensor, ends_EH: torch.Tensor, hosts_EH1: torch.Tensor
) -> torch.Tensor:
    """Plain torch form of `deal_rows`."""
    safe_TK = ids_TK.clamp(min=0)
    host_TK = (place_TK[..., None] >= ends_EH[safe_TK]).sum(-1)
    return hosts_EH1[safe_TK, host_TK].where(ids_TK >= 0, -1)


def list_claims(
    code_WB: torch.Tensor, order_M: torch.Tensor, non_finite_W1: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Return the claims of all ranks in order, and how many each rank has: int64, one after the
    other, so that one copy to the host moves both. `parts_of_list` has the parts.

    Args:
        code_WB: int64 codes: expert e as e, exempt as E + e, anything from 2E on is no claim.
        order_M: int64, the claims' indices, the best first.
        non_finite_W1: int64.
        num_experts: E.
    """
    if triton_support.serves(code_WB):
        from engine.ops.gpu.list_claims import list_claims_triton

        return list_claims_triton(code_WB, order_M, non_finite_W1, num_experts)
    return list_claims_reference(code_WB, order_M, non_finite_W1, num_experts)


def list_claims_reference(
    code_WB: torch.Tensor, order_M: torch.Tensor, non_finite_W1: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Plain torch form of `list_claims`."""
    num_ranks = len(code_WB)
    listed = empty_list(code_WB, num_experts)
    counts_WC, place_M1 = parts_of_list(listed, num_ranks, num_experts)
    index_WB = code_WB.clamp(max=2 * num_experts)
    counts_WC.zero_().scatter_add_(1, index_WB, torch.ones_like(index_WB))
    counts_WC[:, -1:] = non_finite_W1
    code_M = code_WB.flatten()
    place_M1[:, 0] = code_M.where(code_M < num_experts, -1)[order_M]
    return listed


def empty_list(code_WB: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the tensor of `list_claims`, not initialised."""
    return code_WB.new_empty(list_start(len(code_WB), num_experts) + code_WB.numel())


def list_start(num_ranks: int, num_experts: int) -> int:
    """Return how many numbers of the tensor of `list_claims` come before the claims: an even
    number, as kernels are compiled for addresses that are multiples of 16 bytes.
    """
    num_counts = num_ranks * (2 * num_experts + 1)
    return num_counts + num_counts % 2


def parts_of_list(
    listed: torch.Tensor, num_ranks: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parts of what `list_claims` returns, as views.

    counts_WC (int64 [W, C]): of each rank the claims subject to capacity by expert, the exempt ones
    by expert, and non_finite; place_M1 (int64 [M, 1]): the expert of each claim subject to
    capacity, -1 for others, the best first.
    """
    num_counts = num_ranks * (2 * num_experts + 1)
    place_M1 = listed[list_start(num_ranks, num_experts) :, None]
    return listed[:num_counts].view(num_ranks, -1), place_M1


def deal_claims(
    code_WB: torch.Tensor,
    order_M: torch.Tensor,
    slot_M: torch.Tensor,
    ends_EH: torch.Tensor,
    hosts_EH1: torch.Tensor,
    num_instances: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the instance that computes each claim, int64 [W, B], -1 for one that is dropped; and
    how many rows each rank has for each instance, int64 [W, I].

    A claim subject to capacity goes to the first host whose end is behind its slot, an exempt one
    to its home.

    Args:
        code_WB: int64 codes, as in `list_claims`.
        order_M: int64, the claims' indices, the best first.
        slot_M: int64, the slot of each claim in that order.
        ends_EH: int64, where the slots of each host end, ascending.
        hosts_EH1: int64, the instances of the hosts, the home first, and -1 behind the last.
        num_instances: I.
    """
    if triton_support.serves(code_WB):
        from engine.ops.gpu.deal_claims import deal_claims_triton

        return deal_claims_triton(code_WB, order_M, slot_M, ends_EH, hosts_EH1, num_instances)
    return deal_claims_reference(code_WB, order_M, slot_M, ends_EH, hosts_EH1, num_instances)


def deal_claims_reference(
    code_WB: torch.Tensor,
    order_M: torch.Tensor,
    slot_M: torch.Tensor,
    ends_EH: torch.Tensor,
    hosts_EH1: torch.Tensor,
    num_instances: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `deal_claims`."""
    num_experts = len(ends_EH)
    code_M = code_WB.flatten()
    slot_of_M = torch.empty_like(code_M).scatter_(0, order_M, slot_M.flatten())
    expert_M = code_M.where(code_M < num_experts, -1)
    found_M = deal_rows_reference(expert_M, slot_of_M, ends_EH, hosts_EH1)
    exempt_M = code_M - num_experts
    home_M = hosts_EH1[:, 0][exempt_M.clamp(0, num_experts - 1)]
    is_exempt_M = (exempt_M >= 0) & (exempt_M < num_experts)
    instance_WB = home_M.where(is_exempt_M, found_M).view_as(code_WB)
    counts = instance_WB.new_zeros((len(code_WB), num_instances + 1))
    index_WB = instance_WB.where(instance_WB >= 0, num_instances)
    counts.scatter_add_(1, index_WB, torch.ones_like(index_WB))
    return instance_WB, counts[:, :-1]
