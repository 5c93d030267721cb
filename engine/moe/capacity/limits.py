"""Capacity: how much each expert may get and which assignments it keeps first; pure functions.

The rules of "Capacity-Aware Inference" (He et al., ICLR 2026, arXiv 2503.05066), section 3, made
exact: the limit is a ceiling in exact arithmetic, the order is total, and a padded token does not
exist. `agreement.py` puts them together; who decides across ranks is `consensus.py`, extra local
experts are `expansion.py`.

Worked example, Token Drop by score, 5 tokens, K = 2, E = 4, gamma = 1: C = ceil(1 * 5 * 2 / 4) = 3.
    topk_ids_TK = [[0, 1], [0, 2], [0, 1], [0, 3], [1, 0]]     N_e = 5, 3, 1, 1
    scores of expert 0: t0 .9, t1 .6, t2 .5, t3 .9, t4 .4      it keeps 3 of 5: t0, t3, t1
    keep_TK     = [[1, 1], [1, 1], [0, 1], [1, 1], [1, 0]]     dropped (5 - 3) / 10 = 20%
t0 and t3 tie at .9, which does not matter here; at the cut the lower global token id would stay.

Legend: N assignments (T * K), T tokens on this rank, K top-k, E experts, P pools, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal


def cannot_bind(factor: Decimal, top_k: int, num_experts: int) -> bool:
    """Whether gamma >= E / K, exactly: no expert can be chosen by more tokens than its capacity."""
    return not factor.is_finite() or Fraction(factor) * top_k >= num_experts


def expert_capacity(factor: Decimal, num_tokens: int, top_k: int, num_experts: int) -> int:
    """C = max(1, ceil(gamma * T_g * K / E)), exactly, for a finite gamma.

    factor: gamma as the decimal that was written: 1.1 on a mean load of 10 gives 11, never 12.
    num_tokens: T_g, the competing tokens of all ranks.
    """
    share = Fraction(factor) * num_tokens * top_k / num_experts
    return max(1, -(-share.numerator // share.denominator))


@dataclass(frozen=True, slots=True)
class Pools:
    """What capacity limits: single experts, or all experts of a rank together.

    pool_of_expert: pool number of every expert. sizes: experts in each pool; its limit is that many
    times C. owners: the rank that hosts each pool.
    """

    pool_of_expert: tuple[int, ...]
    sizes: tuple[int, ...]
    owners: tuple[int, ...]

    @classmethod
    def make(cls, scope: Literal["expert", "rank"], first_experts: list[int]) -> Pools:
        """first_experts: W + 1 boundaries; a rank's experts end where the next one's begin."""
        spans = list(zip(first_experts, first_experts[1:], strict=False))
        if scope == "rank":
            pools = [rank for rank, (start, end) in enumerate(spans) for _ in range(start, end)]
            sizes = [end - start for start, end in spans]
            return cls(tuple(pools), tuple(sizes), tuple(range(len(spans))))
        owners = [rank for rank, (start, end) in enumerate(spans) for _ in range(start, end)]
        return cls(tuple(range(len(owners))), (1,) * len(owners), tuple(owners))
