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

from engine.moe.router import Routing
from engine.moe.step import MoEStep
from engine.ops.claims import ExtraRule, extra_claims
from engine.ops.select_top import select_top


def choose_extras(
    routing: Routing,
    step: MoEStep,
    pool_e: torch.Tensor,
    free_P: torch.Tensor,
    rule: ExtraRule,
    keep_TK: torch.Tensor | None,
) -> torch.Tensor:
    """Return which local experts get a token in a free slot, best score first: bool [T, e].

    Ties go to the lower global token id, then the lower expert.

    Args:
        routing: of this rank's tokens.
        step: their ids, and which of them are subject to capacity.
        pool_e: int64, the pool of each local expert.
        free_P: int64, slots left in each pool.
        rule: which extras a token may claim.
        keep_TK: bool, where it may claim as many as it has lost; None: up to the budget.
    """
    pool_Te, keys = extra_claims(
        routing.scores_TE,
        routing.topk_ids_TK,
        step.request_T,
        step.position_T,
        pool_e,
        rule,
        step.eligible_T,
        free_P,
        keep_TK,
    )
    return select_top(keys, pool_Te.flatten(), free_P)[0].view_as(pool_Te)
