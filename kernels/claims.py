"""What surrounds the selection of a capacity policy, each step one op: a rank's assignments as
claims with their keys, extra local experts as claims, and all ranks' counts.
`engine/moe/capacity/` says what claims, codes and pools are.

Legend: T tokens, K top-k, E experts, e experts on this rank, X extra columns, N claims of a rank
(T * K or T * (K + X)), B claims of a rank after padding, P pools, W ranks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.ops import triton_support
from engine.ops.claim_keys import Order, sort_keys, sortable


class ClaimRule(NamedTuple):
    """How a rank's assignments become claims."""

    order: Order
    seed: int  # of random order
    layer: int  # for random order
    with_expert: bool  # two claims of one token can be in one pool, so the expert is a key
    num_extra: int = 0  # X
    first_expert: int = 0  # the first of this rank's experts
    some_none: bool = False  # ids may be -1, no claim


class ExtraRule(NamedTuple):
    """Which extras a token may claim: at most `budget` of this rank's experts."""

    first_expert: int
    budget: int
    with_keys: bool = True  # False: their keys are not needed
    some_none: bool = False  # ids of chosen experts may be -1, none


def make_claims(
    scores_TE: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    request_T: torch.Tensor,
    position_T: torch.Tensor,
    rule: ClaimRule,
    eligible_T: torch.Tensor | None = None,
    extra_pool_Te: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return the keys (int32 [N] each), codes (int64 [N]) and `non_finite` (int64 [1]) of claims.

    Args:
        scores_TE: float32.
        topk_ids_TK: int64.
        request_T, position_T: int32, the global token id.
        rule: the order and the columns.
        eligible_T: bool, tokens subject to capacity; None: all.
        extra_pool_Te: int64, where extras claim slots: negative for no claim.
    """
    if triton_support.serves(scores_TE):
        from engine.ops.gpu.make_claims import make_claims_triton

        return make_claims_triton(
            scores_TE, topk_ids_TK, request_T, position_T, rule, eligible_T, extra_pool_Te
        )
    return make_claims_reference(
        scores_TE, topk_ids_TK, request_T, position_T, rule, eligible_T, extra_pool_Te
    )


def make_claims_reference(
    scores_TE: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    request_T: torch.Tensor,
    position_T: torch.Tensor,
    rule: ClaimRule,
    eligible_T: torch.Tensor | None = None,
    extra_pool_Te: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Plain torch form of `make_claims`."""
    num_experts = scores_TE.shape[1]
    chosen_TK = topk_ids_TK.clamp(min=0) if rule.some_none else topk_ids_TK
    code_TN, score_TN = topk_ids_TK, scores_TE.gather(1, chosen_TK)
    if eligible_T is not None:
        code_TN = code_TN + num_experts * (~eligible_T[:, None]).long()
    if rule.some_none:
        is_none_TK = topk_ids_TK < 0
        code_TN = code_TN.masked_fill(is_none_TK, 3 * num_experts)
        score_TN = score_TN.masked_fill(is_none_TK, 0.0)
    if extra_pool_Te is not None:
        extra_TX, score_TX = _extra_columns(scores_TE, extra_pool_Te, rule)
        code_TN = torch.cat((code_TN, extra_TX), dim=1)
        score_TN = torch.cat((score_TN, score_TX), dim=1)
    expert_N = code_TN.flatten() % num_experts if rule.with_expert else None
    columns = code_TN.shape[1]
    keys, _ = sort_keys(
        rule.order,
        score_N=score_TN.flatten(),
        request_N=_each(request_T, columns),
        position_N=_each(position_T, columns),
        expert_N=expert_N,
        seed=rule.seed,
        layer=rule.layer,
    )
    return keys, code_TN.flatten(), (~scores_TE.isfinite().all()).long()[None]


def _extra_columns(
    scores_TE: torch.Tensor, extra_pool_Te: torch.Tensor, rule: ClaimRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [T, X], 3E for none, and scores [T, X] of extras that claim slots."""
    num_tokens, num_experts = scores_TE.shape
    first, num_local, nothing = rule.first_expert, extra_pool_Te.shape[1], 3 * num_experts
    codes_e = torch.arange(first, first + num_local, device=scores_TE.device) + 2 * num_experts
    code_TX = torch.full((num_tokens, rule.num_extra), nothing, device=scores_TE.device)
    wanted_Te = extra_pool_Te >= 0
    code_TX[:, :num_local] = codes_e.expand(num_tokens, -1).where(wanted_Te, nothing)
    score_TX = scores_TE.new_zeros((num_tokens, rule.num_extra))
    score_TX[:, :num_local] = scores_TE[:, first : first + num_local]
    return code_TX, score_TX


def extra_claims(
    scores_TE: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    request_T: torch.Tensor,
    position_T: torch.Tensor,
    pool_e: torch.Tensor,
    rule: ExtraRule,
    eligible_T: torch.Tensor | None = None,
    free_P: torch.Tensor | None = None,
    keep_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the pools of the extras that tokens claim, int64 [T, e], -1 for none, and their four
    keys, int32 [T * e] each: best score first, then the lower token id, then the lower expert.

    A token claims the best of this rank's experts that it has not chosen, equal scores the lower
    expert first.

    Args:
        scores_TE: float32.
        topk_ids_TK: int64.
        request_T, position_T: int32, the global token id.
        pool_e: int64, the pool of each local expert.
        rule: the local experts, and how many a token may claim.
        eligible_T: bool, tokens subject to capacity; None: all.
        free_P: int64, slots left in each pool: nothing is claimed of one without; None: all have.
        keep_TK: bool, where a token may claim as many as it has lost; None: up to the budget.
    """
    if triton_support.serves(scores_TE):
        from engine.ops.gpu.extra_claims import extra_claims_triton

        return extra_claims_triton(
            scores_TE, topk_ids_TK, request_T, position_T, pool_e, rule, eligible_T, free_P, keep_TK
        )
    return extra_claims_reference(
        scores_TE, topk_ids_TK, request_T, position_T, pool_e, rule, eligible_T, free_P, keep_TK
    )


def extra_claims_reference(
    scores_TE: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    request_T: torch.Tensor,
    position_T: torch.Tensor,
    pool_e: torch.Tensor,
    rule: ExtraRule,
    eligible_T: torch.Tensor | None = None,
    free_P: torch.Tensor | None = None,
    keep_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Plain torch form of `extra_claims`."""
    num_tokens, num_local = scores_TE.shape[0], pool_e.numel()
    own = slice(rule.first_expert, rule.first_expert + num_local)
    scores_Te = scores_TE[:, own]
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    if rule.some_none:  # a column more, for none
        chosen_TE = F.pad(chosen_TE, (0, 1))
        topk_ids_TK = topk_ids_TK.where(topk_ids_TK >= 0, scores_TE.shape[1])
    allowed_Te = ~chosen_TE.scatter_(1, topk_ids_TK, True)[:, own]
    if eligible_T is not None:
        allowed_Te = allowed_Te & eligible_T[:, None]
    if free_P is not None:
        allowed_Te = allowed_Te & (free_P[pool_e] > 0)
    budget: torch.Tensor | int = rule.budget
    if keep_TK is not None:
        budget = (~keep_TK).sum(1, keepdim=True).clamp(max=budget)
    wanted_Te = candidates(scores_Te, allowed_Te, budget)
    pool_Te = pool_e.expand(num_tokens, -1).where(wanted_Te, -1)
    if not rule.with_keys:
        return pool_Te, []
    expert_N = torch.arange(num_local, dtype=torch.int32, device=scores_TE.device)
    keys = [
        sortable(scores_Te.contiguous()).flatten(),
        (~request_T)[:, None].expand(-1, num_local).flatten(),
        (~position_T)[:, None].expand(-1, num_local).flatten(),
        (~expert_N).expand(num_tokens, -1).flatten(),
    ]
    return pool_Te, keys


def candidates(
    scores_Te: torch.Tensor, allowed_Te: torch.Tensor, budget_T1: torch.Tensor | int
) -> torch.Tensor:
    """Return each token's best allowed local experts, at most `budget` of them: bool [T, e].

    Equal scores: the lower expert first.

    Args:
        scores_Te: float32, of this rank's experts.
        allowed_Te: bool.
        budget_T1: int64 [T, 1], or one number for all.
    """
    num_local = scores_Te.shape[1]
    if isinstance(budget_T1, int) and budget_T1 >= num_local:
        return allowed_Te
    ranked_Te = scores_Te.masked_fill(~allowed_Te, float("-inf"))
    order_Te = ranked_Te.argsort(dim=1, descending=True, stable=True)
    rank_Te = torch.empty_like(order_Te).scatter_(
        1, order_Te, torch.arange(num_local, device=scores_Te.device).expand_as(order_Te)
    )
    return allowed_Te & (rank_Te < budget_T1)


def count_claims(
    code_WB: torch.Tensor,
    keep_WB: torch.Tensor,
    non_finite_W1: torch.Tensor,
    pool_of_code: torch.Tensor,
    num_pools: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count all ranks' claims after a selection.

    Returns rows, int64 [W, 2E + 1]: of every rank the rows to send to each expert, its top-k
    assignments before capacity, and non_finite; and int64 [P], the top-k claims on each pool.

    Args:
        code_WB: int64 codes.
        keep_WB: bool, the claims that are kept.
        non_finite_W1: int64.
        pool_of_code: int64 [3E + 1], the pool of each code, -1 where none.
        num_pools: P.
    """
    if triton_support.serves(code_WB):
        from engine.ops.gpu.count_claims import count_claims_triton

        return count_claims_triton(code_WB, keep_WB, non_finite_W1, pool_of_code, num_pools)
    return count_claims_reference(code_WB, keep_WB, non_finite_W1, pool_of_code, num_pools)


def count_claims_reference(
    code_WB: torch.Tensor,
    keep_WB: torch.Tensor,
    non_finite_W1: torch.Tensor,
    pool_of_code: torch.Tensor,
    num_pools: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `count_claims`."""
    num_ranks, num_codes = len(code_WB), pool_of_code.numel()
    num_experts = (num_codes - 1) // 3
    # Claims and kept claims per rank and code, from one histogram over (rank, code).
    first_W1 = torch.arange(num_ranks, device=code_WB.device)[:, None] * num_codes
    index_M = (first_W1 + code_WB).flatten()
    counts = torch.zeros((2, num_ranks * num_codes), dtype=torch.int64, device=code_WB.device)
    counts[0].scatter_add_(0, index_M, torch.ones_like(index_M))
    counts[1].scatter_add_(0, index_M, keep_WB.flatten().long())
    claimed_W, kept_W = counts.view(2, num_ranks, num_codes)
    before_WE, exempt_WE = claimed_W[:, : 2 * num_experts].chunk(2, dim=1)
    keep_WE = kept_W[:, :num_experts] + kept_W[:, 2 * num_experts : -1]
    rows = torch.cat((keep_WE + exempt_WE, before_WE + exempt_WE, non_finite_W1), dim=1)
    pool_E = pool_of_code[:num_experts]
    claims_P = before_WE.new_zeros(num_pools).index_add_(-1, pool_E, before_WE.sum(0))
    return rows, claims_P


def _each(numbers_T: torch.Tensor, times: int) -> torch.Tensor:
    """Return each token's number once per claim: [T * times]."""
    return numbers_T[:, None].expand(-1, times).flatten()
