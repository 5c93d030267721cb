"""Expansion: extra local experts for tokens, in slots that capacity leaves free. Pure functions.

The second half of Expanded Drop (arXiv 2503.05066, section 3.3): an expert of the token's own rank
costs no communication, so a free slot is given to a token that ranked the expert outside its top-k.
A rank's free slots are for its own tokens alone, so nothing here depends on another rank.

Worked example: this rank hosts experts 0 and 1, expert 0 has 1 free slot and expert 1 none. Tokens
t0 (top-k 1, 5), t1 (top-k 2, 3) and t2 (top-k 0, 4) score expert 0 with .2, .3 and .4. t2 has it
already; t1 beats t0: t1 gains expert 0. With extras = dropped it would only if it had lost one.

Legend: T tokens on this rank, K top-k, e experts on this rank, P pools.
"""

from __future__ import annotations

import torch

from engine.moe.capacity.priority import sortable
from engine.ops.select_top import select_top


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


def choose_extras(
    scores_Te: torch.Tensor,
    candidate_Te: torch.Tensor,
    pool_e: torch.Tensor,
    free_P: torch.Tensor,
    request_T: torch.Tensor,
    position_T: torch.Tensor,
) -> torch.Tensor:
    """Return which candidates get a free slot, best score first: bool [T, e].

    Ties go to the lower global token id, then the lower expert.

    Args:
        scores_Te: float32.
        candidate_Te: bool.
        pool_e: int64, the pool of each local expert.
        free_P: int64, slots left in each pool.
        request_T, position_T: int32, the global token id.
    """
    num_tokens, num_local = scores_Te.shape
    pool_N = pool_e.expand(num_tokens, -1).where(candidate_Te, -1).flatten()
    expert_N = torch.arange(num_local, dtype=torch.int32, device=scores_Te.device)
    keys = [
        sortable(scores_Te.contiguous()).flatten(),
        (~request_T)[:, None].expand(-1, num_local).flatten(),
        (~position_T)[:, None].expand(-1, num_local).flatten(),
        (~expert_N).expand(num_tokens, -1).flatten(),
    ]
    return select_top(keys, pool_N, free_P)[0].view(num_tokens, num_local)
