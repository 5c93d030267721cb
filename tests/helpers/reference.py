"""The rules of expert capacity, spelled out: slow, obvious, one process, for comparison only.

Everything is a loop over tokens and experts and plain Python numbers; nothing of `engine.moe` is
used. `decide` takes every rank's routing at once and returns what each rank must do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np


@dataclass
class Rules:
    """The settings, as in moe.capacity; factor as written. shares: of each rank, any unit."""

    policy: str = "token_drop"
    factor: str = "1"
    scope: str = "expert"
    consensus: str = "global"
    order: str = "score"
    expand: int | None = None
    tiers: str = "two"
    extras: str = "all"
    renormalize: bool = False
    seed: int = 0
    layer: int = 0
    shares: tuple[int, ...] | None = None


@dataclass
class Family:
    """How a model family turns scores into combine weights."""

    normalize: bool = False
    eps: float = 0.0
    scale: float = 1.0
    minimum: float = 0.0  # of the divisor
    expert_scale: list[float] | None = None  # multiplies what capacity has left
    zero_experts: int = 0  # choices behind the experts whose output is the token itself


@dataclass
class RankInput:
    """One rank's tokens: scores [T, E] float32, topk_ids [T, K], weights [T, K] float32, the global
    token id (request, position) and whether each competes.
    """

    scores: np.ndarray
    topk_ids: np.ndarray
    weights: np.ndarray
    request: np.ndarray
    position: np.ndarray
    competes: np.ndarray


@dataclass
class RankOutput:
    """keep [T, K], true for zero experts; extras: for each token the experts added; weights: for
    each token expert -> combine weight of what is computed; own: what the token itself counts.
    """

    keep: np.ndarray
    extras: list[list[int]]
    weights: list[dict[int, float]]
    own: list[float]


@dataclass
class Outcome:
    """All ranks' outputs, and the loads. capacity: C (of rank 0 under local consensus)."""

    ranks: list[RankOutput]
    capacity: int | None
    before: list[int]  # N_e, competing top-k assignments
    kept: list[int]  # of those
    computed: list[int]  # rows each expert works on, extras and passing tokens included
    orphans: int = 0
    zero: int = 0  # assignments to zero experts of tokens that compete
    bounds: list[int] = field(default_factory=list)

    def rank_rows(self) -> list[int]:
        """Rows each rank's experts work on."""
        return [sum(self.computed[a:b]) for a, b in zip(self.bounds, self.bounds[1:], strict=False)]


def capacity_of(factor: str, num_tokens: int, top_k: int, num_experts: int) -> int:
    """max(1, ceil(gamma * T * K / E)) on the decimal that was written."""
    return max(1, math.ceil(Fraction(factor) * num_tokens * top_k / num_experts))


def is_dropless(rules: Rules, top_k: int, num_experts: int) -> bool:
    """Whether the settings can never drop anything, whatever the load."""
    if rules.policy == "none" or rules.factor == "inf":
        return True
    return Fraction(rules.factor) * top_k >= num_experts


def hash_key(seed: int, layer: int, request: int, position: int) -> int:
    """The order `random`: SplitMix64's finaliser, upper 32 bits as a signed number."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    mixed = mix(mix((seed + layer * 0x9E3779B97F4A7C15) & mask) ^ ((request << 32) + position))
    upper = mixed >> 32
    return upper - 2**32 if upper >= 2**31 else upper


@dataclass(frozen=True)
class Claim:
    """One assignment that wants a slot. slot: its column in top-k, or None for an extra."""

    rank: int
    token: int
    slot: int | None
    expert: int
    key: tuple


def decide(
    inputs: list[RankInput],
    rules: Rules,
    family: Family,
    bounds: list[int],
    num_experts: int,
    top_k: int,
) -> Outcome:
    """What every rank keeps, drops and adds. bounds: first expert of each rank, and the end."""
    num_ranks = len(inputs)
    host = [w for w in range(num_ranks) for _ in range(bounds[w], bounds[w + 1])]
    competing = [int(rank.competes.sum()) for rank in inputs]
    before, zero = [0] * num_experts, 0
    choices = num_experts + family.zero_experts
    for rank in inputs:
        for t in range(len(rank.topk_ids)):
            for expert in rank.topk_ids[t]:
                if expert >= num_experts:
                    zero += bool(rank.competes[t])
                else:
                    before[expert] += bool(rank.competes[t])
    keep = [np.ones(rank.topk_ids.shape, dtype=bool) for rank in inputs]
    extras: list[list[list[int]]] = [[[] for _ in rank.topk_ids] for rank in inputs]
    capacity = None
    if not is_dropless(rules, top_k, choices):
        capacity = capacity_of(rules.factor, sum(competing), top_k, choices)
        own = [capacity_of(rules.factor, count, top_k, choices) for count in competing]
        if rules.consensus == "local":
            capacity = own[0]
        _cut(inputs, rules, bounds, host, capacity, own, keep, extras)
    outputs = [
        _weigh(rank, keep[w], extras[w], rules, family, num_experts)
        for w, rank in enumerate(inputs)
    ]
    kept, computed, orphans = [0] * num_experts, [0] * num_experts, 0
    for w, rank in enumerate(inputs):
        for t in range(len(rank.topk_ids)):
            for k, expert in enumerate(rank.topk_ids[t]):
                if expert < num_experts:
                    kept[expert] += bool(keep[w][t, k] and rank.competes[t])
                    computed[expert] += bool(keep[w][t, k])
            for expert in extras[w][t]:
                computed[expert] += 1
            orphans += bool(rank.competes[t]) and not keep[w][t].any() and not extras[w][t]
    return Outcome(outputs, capacity, before, kept, computed, orphans, zero, bounds)


def _cut(inputs, rules, bounds, host, capacity, own, keep, extras) -> None:
    """Apply the policy in place."""
    claims = _claims(inputs, rules, bounds[-1])
    one_tier = rules.policy == "expanded_drop" and rules.tiers == "one"
    if one_tier:
        claims += _one_tier_extras(inputs, rules, bounds)
    for w, rank in enumerate(inputs):  # competing assignments must earn their place
        keep[w][rank.competes] = False
        keep[w] |= rank.topk_ids >= bounds[-1]  # but zero experts
    pools: dict[int, list[Claim]] = {}
    for claim in claims:
        pools.setdefault(_pool(claim.expert, host, rules), []).append(claim)
    for pool, members in pools.items():
        for claim in _winners(members, rules, _limits(pool, rules, bounds, capacity, own)):
            if claim.slot is None:
                extras[claim.rank][claim.token].append(claim.expert)
            else:
                keep[claim.rank][claim.token, claim.slot] = True
    if rules.policy == "expanded_drop" and not one_tier:
        for w in range(len(inputs)):
            _fill(w, inputs, rules, bounds, host, capacity, own, keep, extras)
    for rank_extras in extras:
        for token_extras in rank_extras:
            token_extras.sort()


def _pool(expert: int, host: list[int], rules: Rules) -> int:
    return expert if rules.scope == "expert" else host[expert]


def _limits(pool, rules, bounds, capacity, own) -> tuple[int, list[int]]:
    """Slots of a pool over all ranks, and what each rank may keep of it under local consensus."""
    return _slots(rules, bounds, capacity)[pool], [
        _slots(rules, bounds, each)[pool] for each in own
    ]


def _slots(rules, bounds, capacity) -> list[int]:
    """Slots of every pool: even, or the same sum by the shares of the ranks that host them, none
    above twice the even one.
    """
    sizes, owners = [], []
    for rank, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        pools = [1] * (end - first) if rules.scope == "expert" else [end - first]
        sizes += pools
        owners += [rank] * len(pools)
    if rules.shares is None:
        return [size * capacity for size in sizes]
    weights = [size * rules.shares[owner] for size, owner in zip(sizes, owners, strict=True)]
    left, bounded = sum(sizes) * capacity, {}
    while True:
        open_weight = sum(w for pool, w in enumerate(weights) if pool not in bounded)
        exact = [
            Fraction(bounded[pool] if pool in bounded else Fraction(left * w, open_weight))
            for pool, w in enumerate(weights)
        ]
        over = [pool for pool, size in enumerate(sizes) if exact[pool] > 2 * size * capacity]
        if not over:
            break
        bounded[over[0]] = 2 * sizes[over[0]] * capacity
        left -= bounded[over[0]]
    slots = [math.floor(share) for share in exact]
    by_rest = sorted(range(len(sizes)), key=lambda pool: (slots[pool] - exact[pool], pool))
    for pool in by_rest[: sum(sizes) * capacity - sum(slots)]:
        slots[pool] += 1
    return [max(1, count) for count in slots]


def _claims(inputs: list[RankInput], rules: Rules, num_experts: int) -> list[Claim]:
    claims = []
    for w, rank in enumerate(inputs):
        for t in range(len(rank.topk_ids)):
            if not rank.competes[t]:
                continue
            request, position = int(rank.request[t]), int(rank.position[t])
            for k, expert in enumerate(rank.topk_ids[t]):
                if expert >= num_experts:
                    continue
                first = {
                    "score": (-float(rank.scores[t, expert]),),
                    "first": (),
                    "last": (-request, -position),
                    "random": (-hash_key(rules.seed, rules.layer, request, position),),
                }[rules.order]
                key = (*first, request, position, int(expert))
                claims.append(Claim(w, t, k, int(expert), key))
    return claims


def _by_score(rank: RankInput, t: int, expert: int) -> tuple:
    """Sorts the better claim first."""
    request, position = int(rank.request[t]), int(rank.position[t])
    return (-float(rank.scores[t, expert]), request, position, expert)


def _local_outside(rank: RankInput, t: int, first: int, end: int) -> list[int]:
    """Experts of the token's own rank outside its top-k, best score first."""
    outside = [expert for expert in range(first, end) if expert not in rank.topk_ids[t]]
    return sorted(outside, key=lambda expert: (-float(rank.scores[t, expert]), expert))


def _one_tier_extras(inputs: list[RankInput], rules: Rules, bounds: list[int]) -> list[Claim]:
    claims = []
    for w, rank in enumerate(inputs):
        for t in range(len(rank.topk_ids)):
            if rank.competes[t]:
                for expert in _local_outside(rank, t, bounds[w], bounds[w + 1])[: rules.expand]:
                    claims.append(Claim(w, t, None, expert, _by_score(rank, t, expert)))
    return claims


def _winners(members: list[Claim], rules: Rules, limits: tuple[int, list[int]]) -> list[Claim]:
    limit, own_limits = limits
    if rules.consensus == "global":
        return sorted(members, key=lambda claim: claim.key)[:limit]
    num_ranks = len(own_limits)
    by_rank = [[claim for claim in members if claim.rank == w] for w in range(num_ranks)]
    if rules.consensus == "quota":
        shares = deal([len(part) for part in by_rank], limit)
    else:
        shares = own_limits
    return [
        claim
        for part, share in zip(by_rank, shares, strict=True)
        for claim in sorted(part, key=lambda claim: claim.key)[:share]
    ]


def deal(counts: list[int], limit: int) -> list[int]:
    """Slots in proportion to counts, largest remainder, ties to the lower rank."""
    total = sum(counts)
    slots = min(total, limit)
    if not total:
        return [0] * len(counts)
    shares = [slots * count // total for count in counts]
    order = sorted(range(len(counts)), key=lambda w: (-(slots * counts[w] % total), w))
    for w in order[: slots - sum(shares)]:
        shares[w] += 1
    return shares


def _fill(w, inputs, rules, bounds, host, capacity, own, keep, extras) -> None:
    """Two tiers: rank w's free slots go to its own tokens."""
    rank, first, end = inputs[w], bounds[w], bounds[w + 1]
    deciding = [w] if rules.consensus == "local" else range(len(inputs))
    free: dict[int, int] = {}
    for expert in range(first, end):
        pool = _pool(expert, host, rules)
        limit, own_limits = _limits(pool, rules, bounds, capacity, own)
        slots = own_limits[w] if rules.consensus == "local" else limit
        used = sum(
            bool(keep[v][t, k])
            for v in deciding
            for t in range(len(inputs[v].topk_ids))
            if inputs[v].competes[t]
            for k, chosen in enumerate(inputs[v].topk_ids[t])
            if chosen < bounds[-1] and _pool(int(chosen), host, rules) == pool
        )
        free[pool] = slots - used
    wishes: dict[int, list[tuple]] = {}
    for t in range(len(rank.topk_ids)):
        if not rank.competes[t]:
            continue
        budget = end - first if rules.expand is None else rules.expand
        if rules.extras == "dropped":
            budget = min(budget, int((~keep[w][t]).sum()))
        open_experts = [
            expert
            for expert in _local_outside(rank, t, first, end)
            if free[_pool(expert, host, rules)] > 0
        ]
        for expert in open_experts[:budget]:
            wish = (_by_score(rank, t, expert), t, expert)
            wishes.setdefault(_pool(expert, host, rules), []).append(wish)
    for pool, wanted in wishes.items():
        for _, t, expert in sorted(wanted)[: free[pool]]:
            extras[w][t].append(expert)


def _weigh(rank, keep, extras, rules: Rules, family: Family, num_experts: int) -> RankOutput:
    weights: list[dict[int, float]] = []
    for t in range(len(rank.topk_ids)):
        chosen = rank.topk_ids[t]
        own = {
            int(expert): float(rank.weights[t, k])
            for k, expert in enumerate(chosen)
            if keep[t, k] and expert < num_experts
        }
        divisor = 1.0
        if family.normalize:
            divisor = max(float(rank.scores[t, chosen].sum()) + family.eps, family.minimum)
        for expert in extras[t]:
            own[expert] = float(rank.scores[t, expert]) / divisor * family.scale
        total, changed = sum(own.values()), not keep[t].all() or bool(extras[t])
        if rules.renormalize and changed and total > 0:
            wanted = float(rank.weights[t][chosen < num_experts].sum())
            own = {expert: weight * wanted / total for expert, weight in own.items()}
        if family.expert_scale is not None:
            own = {expert: weight * family.expert_scale[expert] for expert, weight in own.items()}
        weights.append(own)
    itself = [
        float(of[ids >= num_experts].sum())
        for of, ids in zip(rank.weights, rank.topk_ids, strict=True)
    ]
    return RankOutput(keep, extras, weights, itself)
