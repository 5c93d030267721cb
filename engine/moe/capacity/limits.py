"""Limits: how many assignments each expert, or each rank's experts, may keep. Pure functions.

The rules of "Capacity-Aware Inference" (He et al., ICLR 2026, arXiv 2503.05066), section 3, made
exact: the limit is a ceiling in exact arithmetic, the order is total (`claim_keys.py`), and padding
tokens do not exist. `agreement.py` applies them, `consensus.py` across ranks; extra local experts
are in `expansion.py`.

Worked example, Token Drop by score, 5 tokens, K = 2, E = 4, gamma = 1: C = ceil(1 * 5 * 2 / 4) = 3.
    topk_ids_TK = [[0, 1], [0, 2], [0, 1], [0, 3], [1, 0]]     N_e = 5, 3, 1, 1
    scores of expert 0: t0 .9, t1 .6, t2 .5, t3 .9, t4 .4      it keeps 3 of 5: t0, t3, t1
    keep_TK     = [[1, 1], [1, 1], [0, 1], [1, 1], [1, 0]]     dropped (5 - 3) / 10 = 20%
t0 and t3 tie at .9, which does not matter here; at the cut the lower global token id is kept.

Legend: K top-k, E experts, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal


def cannot_bind(factor: Decimal, top_k: int, num_experts: int) -> bool:
    """Return whether gamma >= E / K, exactly: no expert can get more tokens than its capacity."""
    return not factor.is_finite() or Fraction(factor) * top_k >= num_experts


def expert_capacity(factor: Decimal, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Return C = max(1, ceil(gamma * T_g * K / E)), exactly, for a finite gamma.

    Args:
        factor: gamma as the decimal that was written: 1.1 on a mean load of 10 gives 11, never 12.
        num_tokens: T_g, the tokens of all ranks that are subject to capacity.
        top_k: K.
        num_experts: E.
    """
    exact = Fraction(factor) * num_tokens * top_k / num_experts
    return max(1, -(-exact.numerator // exact.denominator))


@dataclass(frozen=True, slots=True)
class Pools:
    """What capacity limits: single experts, or all experts of a rank together."""

    pool_of_expert: tuple[int, ...]  # pool number of every expert
    sizes: tuple[int, ...]  # experts in each pool; its limit is that many times C
    owners: tuple[int, ...]  # the rank that hosts each pool

    @classmethod
    def make(cls, scope: Literal["expert", "rank"], first_experts: list[int]) -> Pools:
        """Return the pools of a scope. first_experts: W + 1 boundaries between the ranks."""
        spans = list(zip(first_experts, first_experts[1:], strict=False))
        if scope == "rank":
            pools = [rank for rank, (start, end) in enumerate(spans) for _ in range(start, end)]
            sizes = [end - start for start, end in spans]
            return cls(tuple(pools), tuple(sizes), tuple(range(len(spans))))
        owners = [rank for rank, (start, end) in enumerate(spans) for _ in range(start, end)]
        return cls(tuple(range(len(owners))), (1,) * len(owners), tuple(owners))
