"""The properties of Token Drop where experts have copies, each one a test on made-up claims.

Run: pytest tests/unit/moe/capacity/test_claim_split.py

`docs/capacity.md` states them. The cut alone is in tests/unit/ops/test_cut.py, the split alone in
test_split.py there, both through real layers in tests/distributed/test_copies.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from math import ceil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.moe.capacity.claim_split import Limits, SplitClaims, split_claims
from engine.moe.capacity.limits import expert_capacity
from engine.moe.capacity.speed_weights import rank_limits
from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement
from engine.moe.placement.row_split import RowSplit, SplitRule
from engine.ops.claim_keys import sort_keys
from engine.ops.select_top import select_top
from engine.ops.split import optimum, rank_loads

SEEDS = range(25)
FACTORS = ("0.3", "0.7", "1", "1.05", "1.3", "2")
Claim = tuple[int, int]  # token, expert


@dataclass
class Case:
    """Tokens of all ranks, their experts, and who holds the experts."""

    placement: LayerPlacement
    num_ranks: int
    ids_TK: np.ndarray  # experts
    score_TK: np.ndarray  # float32, few levels: many are equal
    request_T: np.ndarray
    position_T: np.ndarray
    competes_T: np.ndarray
    low_bit: bool = False

    @property
    def num_experts(self) -> int:
        return len(self.placement.home_E)

    @property
    def split(self) -> RowSplit:
        return RowSplit(Instances(self.placement, self.num_ranks), SplitRule(self.low_bit))

    def limits(self, factor: str) -> np.ndarray:
        """The limits L_r: equal parts of E * C, the remainder to the lower ranks."""
        eligible, top_k = int(self.competes_T.sum()), self.ids_TK.shape[1]
        slots = self.num_experts * expert_capacity(
            Decimal(factor), eligible, top_k, self.num_experts
        )
        return np.array(rank_limits(slots, self.num_ranks, None))

    def claims(self) -> list[Claim]:
        """The claims subject to capacity, best first: score, then token id, then place of home."""
        place_E = Instances(self.placement, self.num_ranks).home_order_E
        found = []
        for token in np.flatnonzero(self.competes_T).tolist():
            for expert, score in zip(self.ids_TK[token], self.score_TK[token], strict=True):
                name = (int(self.request_T[token]), int(self.position_T[token]))
                found.append((-float(score), *name, int(place_E[expert]), token, int(expert)))
        return [claim[-2:] for claim in sorted(found)]


def draw(seed: int, *, copies: int | None = None, levels: int = 6, competing: float = 0.8) -> Case:
    """A case of 2 to 4 ranks with skewed loads."""
    rng = np.random.default_rng(seed)
    num_ranks, num_experts = int(rng.integers(2, 5)), int(rng.integers(4, 10))
    homes = [*range(num_ranks), *rng.integers(num_ranks, size=num_experts - num_ranks).tolist()]
    homes = rng.permutation(homes).tolist()
    held: list[list[int]] = [[] for _ in range(num_experts)]
    wanted = int(rng.integers(1, 7)) if copies is None else copies
    for expert in rng.integers(num_experts, size=wanted).tolist():
        free = sorted(set(range(num_ranks)) - {homes[expert], *held[expert]})
        if free:
            held[expert].append(int(rng.choice(free)))
    num_tokens, top_k = int(rng.integers(8, 40)), int(rng.integers(1, 4))
    popular_E = rng.dirichlet(np.full(num_experts, 0.6)) + 1e-3
    popular_E /= popular_E.sum()
    ids = [rng.choice(num_experts, top_k, replace=False, p=popular_E) for _ in range(num_tokens)]
    # The order of the tokens says nothing about their ids.
    name_T = rng.permutation(num_tokens)
    competes_T = rng.random(num_tokens) < competing
    competes_T[0] = True
    return Case(
        LayerPlacement(tuple(homes), tuple(tuple(sorted(ranks)) for ranks in held)),
        num_ranks,
        np.array(ids),
        (rng.integers(0, levels, (num_tokens, top_k)) / 8).astype(np.float32),
        name_T // 5,
        name_T % 5,
        competes_T,
    )


def run(
    case: Case, limits: Limits | None, owner_T: np.ndarray | None = None
) -> tuple[dict[Claim, int], dict[Claim, int], SplitClaims, SimpleNamespace]:
    """The instance of every kept claim and of every exempt one, what was decided, and the claims.

    owner_T: the rank of every token; None: in turn.
    """
    split, num_experts = case.split, case.num_experts
    if owner_T is None:
        owner_T = np.arange(len(case.ids_TK)) % case.num_ranks
    top_k = case.ids_TK.shape[1]
    tokens_W = [np.flatnonzero(owner_T == rank) for rank in range(case.num_ranks)]
    size = max(map(len, tokens_W)) * top_k
    place_E = torch.from_numpy(split.instances.home_order_E)
    keys: list[list[torch.Tensor]] = []
    code_WB = torch.full((case.num_ranks, size), 3 * num_experts)
    for rank, tokens in enumerate(tokens_W):
        place_N = place_E[torch.from_numpy(case.ids_TK[tokens]).flatten()]
        names = [torch.from_numpy(x[tokens]).int() for x in (case.request_T, case.position_T)]
        words, _ = sort_keys(
            "score",
            score_N=torch.from_numpy(case.score_TK[tokens]).flatten(),
            request_N=names[0].repeat_interleave(top_k),
            position_N=names[1].repeat_interleave(top_k),
            expert_N=place_N,
            seed=0,
            layer=0,
        )
        keys.append([torch.nn.functional.pad(word, (0, size - len(word))) for word in words])
        exempt = torch.from_numpy(~case.competes_T[tokens]).repeat_interleave(top_k)
        code_WB[rank, : len(place_N)] = place_N + num_experts * exempt
    gathered = SimpleNamespace(
        keys=[torch.cat(words) for words in zip(*keys, strict=True)],
        code_WB=code_WB,
        claims=SimpleNamespace(num_experts=num_experts),
        non_finite_W1=torch.zeros((case.num_ranks, 1), dtype=torch.int64),
    )
    made = split_claims(gathered, split, limits)  # pyright: ignore[reportArgumentType]
    kept: dict[Claim, int] = {}
    exempt_at: dict[Claim, int] = {}
    for rank, tokens in enumerate(tokens_W):
        pairs = [(int(token), int(e)) for token in tokens for e in case.ids_TK[token]]
        for slot, pair in enumerate(pairs):
            instance = int(made.instance_WB[rank, slot])
            if not case.competes_T[pair[0]]:
                exempt_at[pair] = instance
            elif instance >= 0:
                kept[pair] = instance
        assert (made.instance_WB[rank, len(pairs) :] == -1).all()
    return kept, exempt_at, made, gathered


def inside(case: Case, ranks: tuple[int, ...]) -> set[int]:
    """The experts whose hosts are all among some ranks."""
    return {e for e in range(case.num_experts) if set(case.placement.hosts(e)) <= set(ranks)}


def rank_sets(case: Case) -> list[tuple[int, ...]]:
    ranks = range(case.num_ranks)
    return [each for size in ranks for each in combinations(ranks, size + 1)]


def feasible(case: Case, load_E: np.ndarray, limit_W: np.ndarray) -> bool:
    """Hall's condition: in no set of ranks more rows must be computed than these may."""
    return all(
        sum(int(load_E[e]) for e in inside(case, ranks)) <= limit_W[list(ranks)].sum()
        for ranks in rank_sets(case)
    )


def loads(case: Case, claims) -> np.ndarray:
    return np.bincount([expert for _, expert in claims], minlength=case.num_experts)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kept_set_is_the_greedy_one_in_the_order_of_claims(seed):
    case = draw(seed)
    limit_W = case.limits(FACTORS[seed % len(FACTORS)])
    expected: set[Claim] = set()
    for claim in case.claims():
        if feasible(case, loads(case, expected | {claim}), limit_W):
            expected.add(claim)
    for low_bit in (False, True):
        case.low_bit = low_bit
        assert run(case, Limits(rank_W=limit_W))[0].keys() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_kept_and_where_it_runs_does_not_depend_on_who_holds_a_token(seed):
    case = draw(seed)
    rng = np.random.default_rng(seed + 1000)
    limits = Limits(rank_W=case.limits(FACTORS[seed % len(FACTORS)]))
    case.low_bit = seed % 2 == 1
    num_tokens = len(case.ids_TK)
    deals = [np.zeros(num_tokens, int), np.full(num_tokens, case.num_ranks - 1)]
    deals += [rng.integers(case.num_ranks, size=num_tokens) for _ in range(3)]
    found = [run(case, limits, owner_T)[:2] for owner_T in deals]
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_larger_gamma_keeps_all_that_a_smaller_one_keeps(seed):
    case = draw(seed)
    kept = [set(run(case, Limits(rank_W=case.limits(factor)))[0]) for factor in FACTORS]
    assert all(few <= more for few, more in zip(kept, kept[1:], strict=False))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_rank_is_above_its_limit_and_every_set_of_ranks_is_feasible(seed):
    case = draw(seed)
    limit_W = case.limits(FACTORS[seed % len(FACTORS)])
    kept, _, made, _ = run(case, Limits(rank_W=limit_W))
    rank_I = case.split.instances.rank_I
    load_W = np.bincount([rank_I[instance] for instance in kept.values()], minlength=case.num_ranks)
    assert load_W.tolist() == made.load_W.tolist()
    assert (load_W <= limit_W).all()
    assert feasible(case, loads(case, kept), limit_W)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_dropped_assignment_could_have_been_kept(seed):
    case = draw(seed)
    limit_W = case.limits(FACTORS[seed % len(FACTORS)])
    kept, _, _, _ = run(case, Limits(rank_W=limit_W))
    for claim in set(case.claims()) - kept.keys():
        assert not feasible(case, loads(case, kept.keys() | {claim}), limit_W)


@pytest.mark.parametrize("copies", [0, None])
@pytest.mark.parametrize("seed", SEEDS)
def test_dropped_are_the_rows_that_exceed_the_limits_of_the_worst_set_of_ranks(seed, copies):
    case = draw(seed, copies=copies)
    limit_W = case.limits(FACTORS[seed % len(FACTORS)])
    kept, _, _, _ = run(case, Limits(rank_W=limit_W))
    load_E = loads(case, case.claims())
    worst = max(
        sum(int(load_E[e]) for e in inside(case, ranks)) - int(limit_W[list(ranks)].sum())
        for ranks in rank_sets(case)
    )
    assert len(case.claims()) - len(kept) == max(0, worst)
    if copies == 0:  # then it is what each rank's own experts have above its limit
        load_W = np.bincount(case.placement.home_E, weights=load_E, minlength=case.num_ranks)
        assert len(case.claims()) - len(kept) == (load_W - limit_W).clip(min=0).sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_without_copies_the_selection_by_rank_pools_keeps_the_same_bit_for_bit(seed):
    case = draw(seed, copies=0)
    limit_W = case.limits(FACTORS[seed % len(FACTORS)])
    _, _, made, gathered = run(case, Limits(rank_W=limit_W))
    instances = case.split.instances
    pool_E = torch.from_numpy(instances.rank_I[instances.home_instance_E])
    pool_of_code = torch.cat((pool_E, torch.full((2 * case.num_experts + 1,), -1)))
    pool_M = pool_of_code[gathered.code_WB.flatten()]
    keep_M, tied = select_top(gathered.keys, pool_M, torch.from_numpy(limit_W))
    assert not tied
    competes_M = gathered.code_WB.flatten() < case.num_experts
    assert torch.equal((made.instance_WB.flatten() >= 0) & competes_M, keep_M)


@pytest.mark.parametrize("seed", SEEDS)
def test_exempt_claims_stay_at_home_and_are_never_dropped(seed):
    case = draw(seed, competing=0.4)
    for limits in (None, Limits(rank_W=case.limits("0.3")), Limits(capacity=1)):
        _, exempt_at, made, _ = run(case, limits)
        instances = case.split.instances
        exempt = np.flatnonzero(~case.competes_T).tolist()
        assert len(exempt_at) == len(exempt) * case.ids_TK.shape[1]
        for (_, expert), instance in exempt_at.items():
            assert instances.is_home_I[instance] and instances.expert_I[instance] == expert
        rows = int((made.instance_WB >= 0).sum())
        assert made.counts_WI.sum() == rows


@pytest.mark.parametrize("seed", range(20))
def test_equal_scores_are_kept_by_the_lower_token_id(seed):
    case = draw(seed, levels=1, competing=1)
    kept, _, _, _ = run(case, Limits(rank_W=case.limits("0.7")))
    names = {
        (int(request), int(position)): token
        for token, (request, position) in enumerate(
            zip(case.request_T, case.position_T, strict=True)
        )
    }
    for expert in range(case.num_experts):
        by_id = [(names[n], expert) for n in sorted(names) if expert in case.ids_TK[names[n]]]
        own = [claim in kept for claim in by_id]
        assert own == sorted(own, reverse=True)


@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_experts_best_claims_go_home_and_the_next_to_its_copies_by_rank(seed, low_bit):
    case = draw(seed)
    case.low_bit = low_bit
    instances = case.split.instances
    for limits in (None, Limits(rank_W=case.limits("1"))):
        kept, _, _, _ = run(case, limits)
        for expert in range(case.num_experts):
            ranks = [
                int(instances.rank_I[kept[claim]])
                for claim in case.claims()
                if claim[1] == expert and claim in kept
            ]
            order = [case.placement.hosts(expert).index(rank) for rank in ranks]
            assert order == sorted(order)
        assert all(instances.expert_I[kept[claim]] == claim[1] for claim in kept)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_limits_nothing_is_dropped_and_the_most_loaded_rank_has_the_optimum(seed):
    case = draw(seed, competing=1)
    kept, _, made, _ = run(case, None)
    assert kept.keys() == set(case.claims())
    place_E = case.split.instances.home_order_E
    load_E = np.zeros(case.num_experts, np.int64)
    load_E[place_E] = loads(case, kept)
    assert made.load_W.max() == optimum(load_E, case.split.hosts)


@pytest.mark.parametrize("seed", SEEDS)
def test_low_bit_copies_take_no_row_that_need_not_move(seed):
    case = draw(seed, competing=1)
    case.low_bit = True
    rule, instances = case.split.rule, case.split.instances
    kept, _, made, _ = run(case, None)
    limit = ceil(len(kept) / Fraction(str(rule.target)) / case.num_ranks)
    home_W = np.bincount(case.placement.home_E, weights=loads(case, kept), minlength=case.num_ranks)
    moved = sum(not instances.is_home_I[instance] for instance in kept.values())
    if (home_W <= limit).all():
        assert moved == 0
    elif (made.load_W <= limit).all():
        # Each row that leaves a rank above the limit is one; a chain over other ranks takes more.
        assert moved >= (home_W - limit).clip(min=0).sum()
        rows_I = np.bincount(list(kept.values()), minlength=instances.num_instances)
        assert rank_loads(rows_I, case.split.hosts).tolist() == made.load_W.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_scope_expert_keeps_the_best_of_an_expert_over_its_home_and_copies(seed):
    case = draw(seed)
    capacity = 1 + seed % 4
    kept, _, _, _ = run(case, Limits(capacity=capacity))
    for expert in range(case.num_experts):
        own = [claim for claim in case.claims() if claim[1] == expert]
        assert {claim for claim in kept if claim[1] == expert} == set(own[:capacity])
