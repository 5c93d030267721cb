"""Capacity rules: what the capacity policies, copies of experts and a balanced shared expert can do
for one model on so many ranks.

The rules are those of `config/world_rules.py` and `config/schema.py`; docs/capacity.md explains
them.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from engine.config import CapacityConfig
from engine.config.validation import ConfigError
from engine.config.world_rules import validate_capacity
from engine.models.spec import SparseSpec
from engine.moe.layer import MoESpec
from engine.moe.router import RouterSpec


def dropless_factors(router: RouterSpec, ranks: int, most_local: int) -> tuple[Fraction, Fraction]:
    """Return the capacity factors from which nothing is dropped, in scope expert and scope rank.

    An expert gets at most all T tokens, and C = gamma T K / E of them stay: gamma = E / K. A rank
    of e experts gets at most T min(K, e) assignments, and e C of them stay. With Z zero experts E +
    Z takes the place of E.

    Args:
        ranks: of the expert-parallel group.
        most_local: e, the experts of the rank that has most.
    """
    logits, top_k = router.num_logits, router.top_k
    by_expert = Fraction(logits, top_k)
    # The rank with the fewest experts has the least room.
    least = router.num_experts // ranks
    by_rank = max(
        Fraction(logits * min(top_k, local), local * top_k) for local in {least, most_local}
    )
    return by_expert, by_rank


def capacity_of(sparse: SparseSpec, ranks: int) -> dict[str, Any]:
    """Return what capacity can do, by setting; a text begins with "no" where it cannot."""
    router = sparse.moe.router
    most_local = -(-router.num_experts // ranks)
    by_expert, by_rank = dropless_factors(router, ranks, most_local)
    return {
        "ranks": ranks,
        "dropless_factor": {"expert": float(by_expert), "rank": float(by_rank)},
        "token_drop": "yes",
        "expanded_drop": _expanded_drop(router, ranks, most_local),
        "copies": _copies(sparse.moe, ranks),
        "shared_expert": _shared(sparse),
    }


def _expanded_drop(router: RouterSpec, ranks: int, most_local: int) -> str:
    try:
        validate_capacity(
            CapacityConfig(policy="expanded_drop"),
            num_experts=router.num_experts,
            top_k=router.top_k,
            expert_ranks=ranks,
            most_local=most_local,
            num_zero_experts=router.num_zero_experts,
        )
    except ConfigError as error:
        return f"no: {error}"
    text = f"yes, expand at most {most_local}, the experts of a rank"
    if router.num_groups > 1:
        text += (
            f"; extras may be of any group, the top-{router.top_k} are of {router.top_groups} of "
            f"{router.num_groups}"
        )
    return text


def _copies(moe: MoESpec, ranks: int) -> str:
    router = moe.router
    if ranks == 1:
        return "no: one rank has all experts"
    try:
        validate_capacity(
            CapacityConfig(policy="token_drop"),
            num_experts=router.num_experts,
            top_k=router.top_k,
            expert_ranks=ranks,
            has_copies=True,
        )
    except ConfigError as error:
        return f"no: {error}"
    low_bit = ", int8 or int4" if moe.experts.is_plain else ""
    return f"yes, in the model's precision{low_bit}; with a policy: consensus global"


def _shared(sparse: SparseSpec) -> str:
    if sparse.shared is None:
        return "no: the model has no shared expert"
    return "yes, it needs moe.dispatch.partial_sums and no expanded_drop"
