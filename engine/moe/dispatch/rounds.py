"""Rounds: a call whose rows would exceed the buffers of a rank, in parts one after the other.

A dropless layer may route all tokens of the group to one rank. Memory for that worst case would be
taken from the KV cache for ever, and it is hardly ever needed. So a rank has room for a number of
rows, the *limit*, and where the exchanged counts show that some rank would receive more, all ranks
cut the call alike: round j of n takes the j-th part of the rows between every two ranks. A rank
receives the n-th part of its rows in each round, rounded up once per source.

Rows keep their order, so the results are those of one call. Rows are sent once per assignment.

Worked example, 2 ranks, limit 4, rank 0 receives 3 + 4 rows: n = ceil(7 / (4 - 2)) = 4 rounds of
0 + 1, 1 + 1, 1 + 1 and 1 + 1 rows.

Legend: W ranks, P positions of a chunk (its experts in send order), S rows sent, n rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.plan import DispatchPlan, ExpertOrder
from engine.ops.to_device import to_device


@dataclass(frozen=True, slots=True)
class Round:
    """One part of a call."""

    plan: DispatchPlan
    places_S: torch.Tensor  # int64, the place of each of its rows among those of the call


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one part, as every rank computes them from the counts of all."""

    counts_WP: np.ndarray  # int64, the rows of each rank for each position
    places_S: np.ndarray  # int64, the place of each of this rank's rows among those it sends


def plan_rounds(
    layout: ExpertLayout, order: ExpertOrder, exchanged_Wn: np.ndarray, rank: int, limit: int
) -> list[Round]:
    """Return the rounds of a call, [] where no rank receives more rows than its limit; pure.

    Every rank finds the same number of rounds.

    Args:
        layout: of the call; its chunks become rounds.
        order: this rank's assignments.
        exchanged_Wn: every rank's counts, the same on every rank.
        rank: this rank's position in the group.
        limit: rows that a rank may receive at once; more than twice the number of ranks.
    """
    counts_WP = layout.by_position(exchanged_Wn)
    if (
        sum(most_received(counts_WP[:, each.columns], each.bounds) for each in layout.chunks)
        <= limit
    ):
        return []
    rounds: list[Round] = []
    sent = 0
    for chunk in layout.chunks:
        chunk_WP = counts_WP[:, chunk.columns]
        count = num_rounds(most_received(chunk_WP, chunk.bounds), limit, len(counts_WP))
        for part in split_rows(chunk_WP, chunk.bounds, rank, count):
            places_S = to_device(torch.from_numpy(part.places_S + sent), order.token_N.device)
            part_WP = np.zeros_like(counts_WP)
            part_WP[:, chunk.columns] = part.counts_WP
            token_S = order.token_N.index_select(0, places_S)
            plan = layout.chunk_plan(order, token_S, part_WP, chunk, rank)
            rounds.append(Round(plan, places_S))
        sent += int(chunk_WP[rank].sum())
    return rounds


def most_received(counts_WP: np.ndarray, bounds: list[int]) -> int:
    """Return the most rows that a rank receives.

    Args:
        counts_WP: int64, rows of each rank for each position.
        bounds: W + 1 boundaries between the ranks of the positions.
    """
    return int(_between(counts_WP, bounds).sum(0).max(initial=0))


def num_rounds(received: int, limit: int, num_ranks: int) -> int:
    """Return n, for a rank that receives so many rows, where `limit` fit.

    limit: more than W.
    """
    return 1 if received <= limit else -(-received // (limit - num_ranks))


def split_rows(counts_WP: np.ndarray, bounds: list[int], rank: int, count: int) -> list[Part]:
    """Cut the rows between every two ranks into `count` parts.

    Args:
        counts_WP: int64, rows of each rank for each position.
        bounds: W + 1 boundaries between the ranks of the positions.
        rank: this rank, whose rows are named.
        count: n.
    """
    edges = np.asarray(bounds)
    length_WW = _between(counts_WP, bounds)
    # Where the rows of each position begin and end among those for the same rank.
    end_WP = counts_WP.cumsum(1)
    before_WW = np.concatenate((np.zeros_like(end_WP[:, :1]), end_WP), axis=1)[:, edges[:-1]]
    rank_of_P = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    end_WP = end_WP - before_WW[:, rank_of_P]
    start_WP = end_WP - counts_WP
    parts: list[Part] = []
    for index in range(count):
        low_WW, high_WW = length_WW * index // count, length_WW * (index + 1) // count
        low_WP, high_WP = low_WW[:, rank_of_P], high_WW[:, rank_of_P]
        part_WP = end_WP.clip(low_WP, high_WP) - start_WP.clip(low_WP, high_WP)
        places = [
            np.arange(low, high) + first
            for low, high, first in zip(low_WW[rank], high_WW[rank], before_WW[rank], strict=True)
        ]
        parts.append(Part(part_WP, np.concatenate(places)))
    return parts


def _between(counts_WP: np.ndarray, bounds: list[int]) -> np.ndarray:
    """Return the rows between every two ranks, int64 [W sources, W destinations]."""
    # Prefix sums, because reduceat gives a rank without positions its neighbour's count.
    upto_WP = np.concatenate((np.zeros_like(counts_WP[:, :1]), counts_WP.cumsum(1)), axis=1)
    edges = np.asarray(bounds)
    return upto_WP[:, edges[1:]] - upto_WP[:, edges[:-1]]
