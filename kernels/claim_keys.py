"""Claim keys: the words by which claims are compared, so which ones a pool keeps first.

A claim has int32 keys, most significant first; of two claims the one with the larger keys is kept.
The order is total: after the policy's key come the global token id and the expert.

Legend: N claims.
"""

from __future__ import annotations

from typing import Literal

import torch

Order = Literal["score", "first", "last", "random"]

_LOW32 = 0xFFFFFFFF


def sortable(score_N: torch.Tensor) -> torch.Tensor:
    """Return int32 that compare as the float32 scores do; -0.0 equals 0.0."""
    bits_N = (score_N + 0.0).view(torch.int32)
    return bits_N ^ (bits_N >> 31).bitwise_and(0x7FFFFFFF)


def random_key(
    seed: int, layer: int, request_N: torch.Tensor, position_N: torch.Tensor
) -> torch.Tensor:
    """Return a hash of (seed, layer, request, position), int32 [N], the same on every rank.

    With mix(x) the finaliser of SplitMix64 (x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27;
    x *= 0x94D049BB133111EB; x ^= x >> 31, all modulo 2**64):
    h = mix(mix(seed + layer * 0x9E3779B97F4A7C15) ^ (request * 2**32 + position)), the key is its
    upper 32 bits read as a signed number.
    """
    token_N = request_N.long().bitwise_left_shift(32) | position_N.long().bitwise_and(_LOW32)
    mixed_N = _mix(token_N ^ random_start(seed, layer))
    return mixed_N.bitwise_right_shift(32).to(torch.int32)  # arithmetic shift: the sign is kept


def random_start(seed: int, layer: int) -> int:
    """Return mix(seed + layer * 0x9E3779B97F4A7C15) as a signed number of 64 bits."""
    start = _mix_int((seed + layer * 0x9E3779B97F4A7C15) & (2**64 - 1))
    return start - 2**64 if start >= 2**63 else start


def sort_keys(
    order: Order,
    *,
    score_N: torch.Tensor,
    request_N: torch.Tensor,
    position_N: torch.Tensor,
    expert_N: torch.Tensor | None,
    seed: int,
    layer: int,
) -> tuple[list[torch.Tensor], int]:
    """Return the keys by which claims are compared, and how many of them are primary.

    Keys are int32 [N], most significant first, larger kept first (`select_top.py`). The
    primary ones distinguish most claims; the others break ties: lower token id, then lower expert.

    Args:
        order: moe.capacity.order.
        score_N: float32.
        request_N, position_N: int32, the global token id.
        expert_N: int64, where two claims of one token can be in one pool; else None.
        seed, layer: for random order.
    """
    if order == "last":
        keys = [request_N, position_N]
    elif order == "first":
        keys = [~request_N, ~position_N]
    else:
        first_N = (
            sortable(score_N)
            if order == "score"
            else random_key(seed, layer, request_N, position_N)
        )
        keys = [first_N, ~request_N, ~position_N]
    if expert_N is not None:
        keys.append(~expert_N.to(torch.int32))
    return keys, num_primary_keys(order)


def num_primary_keys(order: Order) -> int:
    """Return how many of the keys are primary."""
    return 2 if order in ("first", "last") else 1


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def _mix(x_N: torch.Tensor) -> torch.Tensor:
    """Return SplitMix64's finaliser of int64, whose products wrap as unsigned ones do."""
    x_N = (x_N ^ _shift(x_N, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x_N = (x_N ^ _shift(x_N, 27)) * (0x94D049BB133111EB - 2**64)
    return x_N ^ _shift(x_N, 31)


def _shift(x_N: torch.Tensor, by: int) -> torch.Tensor:
    """Return the logical right shift of int64, for which torch has the arithmetic one alone."""
    return x_N.bitwise_right_shift(by).bitwise_and(2 ** (64 - by) - 1)
