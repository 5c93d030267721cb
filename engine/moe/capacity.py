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

import torch

Order = Literal["score", "first", "last", "random"]

_LOW32 = 0xFFFFFFFF


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


def sortable(score_N: torch.Tensor) -> torch.Tensor:
    """Map float32 to int32 so that integers compare as the floats do; -0.0 equals 0.0."""
    bits_N = (score_N + 0.0).view(torch.int32)
    return bits_N ^ (bits_N >> 31).bitwise_and(0x7FFFFFFF)


def random_key(
    seed: int, layer: int, request_N: torch.Tensor, position_N: torch.Tensor
) -> torch.Tensor:
    """int32 [N], the same for a token wherever it is: a hash of (seed, layer, request, position).

    With mix(x) the finaliser of SplitMix64 (x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27;
    x *= 0x94D049BB133111EB; x ^= x >> 31, all modulo 2**64):
    h = mix(mix(seed + layer * 0x9E3779B97F4A7C15) ^ (request * 2**32 + position)), the key is its
    upper 32 bits read as a signed number.
    """
    start = (seed + layer * 0x9E3779B97F4A7C15) & (2**64 - 1)
    start = _mix_int(start)
    signed = start - 2**64 if start >= 2**63 else start
    token_N = request_N.long().bitwise_left_shift(32) | position_N.long().bitwise_and(_LOW32)
    mixed_N = _mix(token_N ^ signed)
    return mixed_N.bitwise_right_shift(32).to(torch.int32)  # arithmetic shift: the sign is kept


def order_words(
    order: Order,
    *,
    score_N: torch.Tensor,
    request_N: torch.Tensor,
    position_N: torch.Tensor,
    expert_N: torch.Tensor | None,
    seed: int,
    layer: int,
) -> tuple[list[torch.Tensor], int]:
    """The words by which claims are compared, larger kept first; see `engine.ops.select_top`.

    score_N: float32. request_N, position_N: int32, the global token id. expert_N: int64, given
    where two claims of one token can be in one pool. Returns int32 words [N], most significant
    first, and how many of them tell most claims apart; the others break ties: lower token id, then
    lower expert.
    """
    if order == "last":
        words, leading = [request_N, position_N], 2
    elif order == "first":
        words, leading = [~request_N, ~position_N], 2
    else:
        lead_N = (
            sortable(score_N)
            if order == "score"
            else random_key(seed, layer, request_N, position_N)
        )
        words, leading = [lead_N, ~request_N, ~position_N], 1
    if expert_N is not None:
        words.append(~expert_N.to(torch.int32))
    return words, leading


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def _mix(x_N: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, whose products wrap like unsigned ones."""
    x_N = (x_N ^ _shift(x_N, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x_N = (x_N ^ _shift(x_N, 27)) * (0x94D049BB133111EB - 2**64)
    return x_N ^ _shift(x_N, 31)


def _shift(x_N: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64, which has only an arithmetic one."""
    return x_N.bitwise_right_shift(by).bitwise_and(2 ** (64 - by) - 1)
