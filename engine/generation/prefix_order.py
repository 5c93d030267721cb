"""Prefix order: prompts with a common beginning run one after the other, on one data rank.

The prefix cache computes a common beginning once per rank, and only while it holds its blocks. A
job that knows all its prompts helps it: `find_shared` groups them by hashes of their beginnings,
and `SharedPrefixes.deal` gives whole groups to ranks, as far as the ranks' loads allow.

A prompt has one hash per length of `lengths` that it reaches, of the segment from the length
before. Two prompts share level k where their segments 0 to k have equal hashes, so the groups of a
level divide those of the level before, and a collision costs speed alone. Sorted by the groups'
first prompts, level by level, the prompts with the longest common beginnings are neighbours, and
prompts that share nothing keep their order. Hashes decide nothing else: the order is the same for
any hash function.

Legend: N prompts, K levels, D data ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from engine.generation.request_source import partition
from engine.request import Request

MIN_SAVED = 0.05  # share of the prompts that a group's first has computed; below it, input order
# A share that one rank may have above the mean, before the smaller groups fill up the others; units
# of less than _SMALL are no piece of their own. Together under 0.1.
_SLACK = 0.05
_SMALL = 1 / 16
_TOKEN_LENGTHS = (1, 4, 16, 64, 256)  # in blocks of the KV cache
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, eq=False)
class PrefixHashes:
    """Hashes of the beginnings of N prompts."""

    lengths: tuple[int, ...]  # K, ascending; in the unit of `sizes_n`
    sizes_n: np.ndarray  # int64 [N], length of each prompt
    hashes: list[np.ndarray]  # per level int64, of the prompts that reach its length, in order

    def select(self, rows: np.ndarray) -> PrefixHashes:
        """Return those of some prompts.

        Args:
            rows: int64, indices of prompts, ascending.
        """
        if len(rows) == len(self.sizes_n):
            return self
        chosen_n = np.zeros(len(self.sizes_n), dtype=bool)
        chosen_n[rows] = True
        hashes = [
            level[chosen_n[self.sizes_n >= length]]
            for length, level in zip(self.lengths, self.hashes, strict=True)
        ]
        return PrefixHashes(self.lengths, self.sizes_n[rows], hashes)


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefixes:
    """N prompts in prefix order."""

    order_n: np.ndarray  # int64 [N], indices of the prompts
    common_n: np.ndarray  # uint8 [N], levels that each shares with the one before it, in order
    num_sharing: int  # prompts that share a level with another
    num_prefixes: int  # different longest ones among these
    saved: float  # share of the prompts' length that another prompt of the group has computed

    def deal(self, loads_n: np.ndarray, num_ranks: int) -> tuple[np.ndarray, list[int]]:
        """Divide the prompts between ranks.

        A rank has at most 1.1 times the mean load, or more by one prompt that is longer. Large
        groups go first, each to the rank with the least load; one that does not fit is cut where
        the fewest levels are shared. Small groups and prompts of their own then fill up the ranks.

        Args:
            loads_n: int64 [N], load of each prompt by its index.
            num_ranks: D.

        Returns the prompts' indices, rank by rank and in prefix order within a rank, int64 [N]; and
        where each rank's begin, D + 1 positions.
        """
        if num_ranks == 1 or not len(self.order_n):
            return self.order_n, [0] + [len(self.order_n)] * num_ranks
        ranks_n = _divide(loads_n[self.order_n], self.common_n, num_ranks)
        counts = np.bincount(ranks_n, minlength=num_ranks)
        dealt_n = self.order_n[np.argsort(ranks_n, kind="stable")]
        return dealt_n, [0, *np.cumsum(counts).tolist()]


def find_shared(prefixes: PrefixHashes) -> SharedPrefixes | None:
    """Return the prompts in prefix order, None where they share less than `MIN_SAVED`."""
    num, saved = len(prefixes.sizes_n), 0
    members_m = np.arange(num, dtype=np.int32)  # prompts in a group of the level before
    groups_m = np.zeros(num, dtype=np.int32)  # the first prompt of that group
    firsts: list[np.ndarray] = []  # per level int32 [N]: first prompt of the group, or itself
    depths_n = np.zeros(num, dtype=np.uint8)  # levels that a prompt shares with another
    for before, (length, hashes) in zip(
        (0, *prefixes.lengths), zip(prefixes.lengths, prefixes.hashes, strict=True), strict=False
    ):
        reaches_n = prefixes.sizes_n >= length
        long_m = reaches_n[members_m]
        members_m, groups_m = members_m[long_m], groups_m[long_m]
        keys_m = groups_m.astype(np.uint64)
        keys_m *= _MIX
        keys_m ^= hashes.view(np.uint64)[(np.cumsum(reaches_n, dtype=np.int32) - 1)[members_m]]
        by_key_m = np.argsort(keys_m, kind="stable")
        keys_m = keys_m[by_key_m]
        begins_m = np.ones(len(keys_m), dtype=bool)
        begins_m[1:] = keys_m[1:] != keys_m[:-1]
        num_keys = len(keys_m)
        del keys_m  # a million of everything: what is no longer needed makes room
        begins_g = np.flatnonzero(begins_m)
        counts_g = np.diff(begins_g, append=num_keys)
        saved += int((counts_g - 1).sum()) * (length - before)
        shared_m = np.repeat(counts_g > 1, counts_g)
        if not shared_m.any():
            break
        members_m = members_m[by_key_m]
        # Sorted by a stable sort: the first of a group has the lowest index.
        groups_m = np.repeat(members_m[begins_g], counts_g)[shared_m]
        members_m = members_m[shared_m]
        del by_key_m, shared_m, begins_m
        firsts_n = np.arange(num, dtype=np.int32)
        firsts_n[members_m] = groups_m
        firsts.append(firsts_n)
        depths_n[members_m] += 1
        ascending_m = np.argsort(members_m)
        members_m, groups_m = members_m[ascending_m], groups_m[ascending_m]
        del ascending_m
    saved = saved / max(1, int(prefixes.sizes_n.sum()))
    if not firsts or saved < MIN_SAVED:
        return None
    order_n = np.lexsort(firsts[::-1])
    common_n = np.zeros(num, dtype=np.uint8)
    num_prefixes = 0
    for level, firsts_n in enumerate(firsts):
        ordered_n = firsts_n[order_n]
        common_n[1:] += ordered_n[1:] == ordered_n[:-1]
        num_prefixes += len(np.unique(firsts_n[depths_n == level + 1]))
    return SharedPrefixes(
        order_n, common_n, int(np.count_nonzero(depths_n)), num_prefixes, float(saved)
    )


def deal_requests(
    requests: Sequence[Request], num_ranks: int, block_size: int
) -> list[list[Request]]:
    """Return each data rank's requests, in prefix order where they share prefixes.

    Without them, those of `partition`. A request counts its prompt and max_new_tokens.

    Args:
        requests: the same on every rank.
        num_ranks: D.
        block_size: tokens of a KV cache block.
    """
    shared = find_shared(_hash_tokens(requests, block_size)) if requests else None
    if shared is None:
        return partition(requests, num_ranks)
    loads = [len(each.prompt_token_ids) + each.params.max_new_tokens for each in requests]
    dealt_n, bounds = shared.deal(np.array(loads, dtype=np.int64), num_ranks)
    dealt = dealt_n.tolist()
    return [[requests[index] for index in dealt[begin:end]] for begin, end in pairwise(bounds)]


def _hash_tokens(requests: Sequence[Request], block_size: int) -> PrefixHashes:
    lengths = tuple(block_size * blocks for blocks in _TOKEN_LENGTHS)
    sizes = [len(each.prompt_token_ids) for each in requests]
    hashes = [
        np.array(
            [
                hash(tuple(each.prompt_token_ids[begin:end]))
                for each, size in zip(requests, sizes, strict=True)
                if size >= end
            ],
            dtype=np.int64,
        )
        for begin, end in pairwise((0, *lengths))
    ]
    return PrefixHashes(lengths, np.array(sizes, dtype=np.int64), hashes)


def _divide(loads_n: np.ndarray, common_n: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return the rank of each prompt, int32 [N].

    Args:
        loads_n: int64 [N], in prefix order, as `common_n`.
        common_n: as in `SharedPrefixes`.
        num_ranks: D.
    """
    ends_n = np.cumsum(loads_n)
    mean = int(ends_n[-1]) / num_ranks
    begins_u = np.flatnonzero(common_n == 0)  # units: groups, and prompts of their own
    counts_u = np.diff(begins_u, append=len(loads_n))
    loads_u = np.add.reduceat(loads_n, begins_u)
    is_large_u = loads_u >= _SMALL * mean
    ranks_n = np.zeros(len(loads_n), dtype=np.int32)
    loads = [0] * num_ranks
    pieces = [
        (-int(loads_u[unit]), int(begins_u[unit]), int(begins_u[unit] + counts_u[unit]))
        for unit in np.flatnonzero(is_large_u)
    ]
    heapq.heapify(pieces)
    while pieces:
        load, begin, end = heapq.heappop(pieces)
        rank, cut = loads.index(min(loads)), end
        if loads[rank] - load > (1 + _SLACK) * mean and end - begin > 1:
            room = mean - loads[rank]
            part = -load / max(1, round(-load / room))  # equal parts, or the last is a remainder
            room = part if abs(part - room) < _SLACK * mean else room
            cut = _cut(ends_n, common_n, (begin, end), room, _SLACK * mean)
            rest = int(ends_n[end - 1] - ends_n[cut - 1])
            heapq.heappush(pieces, (-rest, cut, end))
            load += rest
        ranks_n[begin:cut] = rank
        loads[rank] -= load
    small_u = ~is_large_u
    ranks_n[np.repeat(small_u, counts_u)] = np.repeat(
        _fill(loads_u[small_u], loads), counts_u[small_u]
    )
    return ranks_n


def _cut(
    ends_n: np.ndarray, common_n: np.ndarray, piece: tuple[int, int], room: float, slack: float
) -> int:
    """Return where to cut a piece so that its first part takes about `room`.

    Of the places within `slack` of it, one that the fewest levels are shared across, the nearest of
    equals.
    """
    begin, end = piece
    target = int(ends_n[begin - 1]) * (begin > 0) + room
    # ends_n[p - 1] is the load up to a cut at p.
    low = int(np.searchsorted(ends_n, target - slack, side="left")) + 1
    high = int(np.searchsorted(ends_n, target + slack, side="right")) + 1
    low, high = max(low, begin + 1), min(high, end)
    if low >= high:
        return min(max(int(np.searchsorted(ends_n, target)) + 1, begin + 1), end - 1)
    common_c = common_n[low:high]
    fewest_c = np.flatnonzero(common_c == common_c.min())
    distance_c = np.abs(ends_n[low - 1 : high - 1][fewest_c] - target)
    return low + int(fewest_c[np.argmin(distance_c)])


def _fill(loads_u: np.ndarray, loads: list[int]) -> np.ndarray:
    """Return the rank of each small unit, int64 [U]: neighbours together, all ranks equally full.

    Args:
        loads_u: int64 [U], of the small units.
        loads: of each rank, before them.
    """
    total = int(loads_u.sum())
    level, filled = float("inf"), 0
    for number, load in enumerate(sorted(loads), start=1):
        if load >= level:
            break
        filled += load
        level = (filled + total) / number
    room = np.cumsum([max(0.0, level - load) for load in loads])
    middles_u = np.cumsum(loads_u) - loads_u / 2
    return np.minimum(np.searchsorted(room, middles_u), len(loads) - 1)
