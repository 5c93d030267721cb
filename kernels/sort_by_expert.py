"""Assignments sorted by expert: the order in which rows travel.

Legend: T tokens, K top-k, N assignments (T * K), E experts.
"""

import torch

from engine.ops import native, triton_support


def sort_by_expert(
    topk_ids_TK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorts the assignments of topk_ids_TK (int64 [T, K], T may be 0) stably by expert.

    An id of -1 is no assignment: it has slot -1 and counts nowhere. Returns token_N, the token of
    the n-th assignment in sorted order; slot_TK, the place of each assignment in that order;
    load_E, assignments of each expert. All int64, no host sync: token_N has T * K entries, and
    those past sum(load_E) mean nothing.
    """
    if topk_ids_TK.is_cpu and native.available():
        return torch.ops.lockstep_cpu.sort_by_expert(topk_ids_TK, num_experts)
    if triton_support.serves(topk_ids_TK):
        from engine.ops.gpu.sort_by_expert import sort_by_expert_triton

        return sort_by_expert_triton(topk_ids_TK, num_experts)
    return sort_by_expert_reference(topk_ids_TK, num_experts)


def sort_by_expert_reference(
    topk_ids_TK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain torch form of `sort_by_expert`."""
    ids_N = topk_ids_TK.flatten()
    ids_N = ids_N.where(ids_N >= 0, num_experts)  # what is no assignment comes last
    order_N = ids_N.argsort(stable=True)
    slot_N = torch.empty_like(order_N)
    slot_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    slot_N = slot_N.where(ids_N < num_experts, -1)
    load_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_N.device)
    load_E.scatter_add_(0, ids_N, torch.ones_like(ids_N))
    token_N = order_N.div(topk_ids_TK.shape[1], rounding_mode="floor")
    return token_N, slot_N.view_as(topk_ids_TK), load_E[:-1]
