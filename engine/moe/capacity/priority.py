"""Sort keys of claims."""

from __future__ import annotations

from typing import Literal

import torch

Order = Literal["score", "first", "last", "random"]


_LOW32 = 0xFFFFFFFF


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
