"""Placements on real ranks: homes anywhere, copies, the split and the cut over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import CapacityConfig, Config, CopiesConfig, ModelConfig
from engine.config.validation import ConfigError
from engine.distributed import bootstrap
from engine.moe.capacity.limits import expert_capacity
from engine.moe.placement.placement import LayerPlacement
from engine.moe.router import RouterSpec
from engine.ops.claim_keys import sort_keys
from tests.helpers.layer_cases import build, step_of, tokens_of
from tests.helpers.ranks import run_ranks

SPEC = RouterSpec(num_experts=8, top_k=2, normalize=True)
# Homes on ranks in no order; expert 0 is hot.
SCATTERED = {
    2: (1, 0, 1, 0, 0, 1, 1, 0),
    3: (2, 0, 1, 0, 2, 1, 2, 0),
    4: (3, 0, 1, 2, 2, 1, 3, 0),
}


def placement_of(world: int, copies: dict[int, tuple[int, ...]], scattered: bool) -> LayerPlacement:
    homes = SCATTERED[world] if scattered else LayerPlacement.contiguous(8, world).home_E
    return LayerPlacement(homes, tuple(copies.get(expert, ()) for expert in range(8)))


def run_cases(rank: int, counts: list[int], cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run one layer per case; return outputs and what was decided."""
    config = Config(model=ModelConfig(path="unused"))
    topology = bootstrap.start(config)
    found = []
    for case in cases:
        moe = replace(
            config.moe,
            capacity=CapacityConfig(**case.get("capacity", {})),
            copies=CopiesConfig(**case.get("copies", {})),
            dispatch=replace(config.moe.dispatch, **case.get("dispatch", {})),
            overlap=replace(config.moe.overlap, **case.get("overlap", {})),
        )
        layer = build(
            topology,
            replace(config, moe=moe),
            SPEC,
            None,
            placement=case.get("placement"),
            precision=case.get("precision", "model"),
            speeds_W=case.get("speeds_W"),
        )
        layer.telemetry.decisions.start()
        step = step_of(topology, counts, 1) if case.get("with_step", True) else None
        if step is not None and not case.get("capacity"):
            step = replace(step, limited=False)
        x_TD = tokens_of(topology.data_rank, counts[topology.data_rank])
        before = layer.num_collectives
        out = layer(x_TD, step)
        entries = layer.telemetry.decisions.entries
        load = layer.telemetry.loads.layers[3]
        found.append(
            {
                "out": out,
                "decision": entries[0] if entries else None,
                "experts": load.experts.tolist(),
                "own": load.own_after.tolist(),
                "own_experts": load.own_experts,
                "collectives": layer.num_collectives - before,
                "routing": layer.route(x_TD),
                "homes": layer.instances.num_homes(topology.expert.rank),
            }
        )
    bootstrap.stop(topology)
    return found


@pytest.mark.parametrize("counts", [[40, 25], [30, 0, 41], [10, 33, 2, 60]])
def test_results_do_not_depend_on_the_placement_bit_for_bit(counts):
    world = len(counts)
    copies = {0: (0,) if world == 2 else (0, 1), 3: (1,), 5: (0,)}
    scattered = placement_of(world, copies, scattered=True)
    cases: list[dict[str, Any]] = [
        {},
        {"placement": placement_of(world, {}, scattered=True)},
        {"placement": scattered},
        {"placement": scattered, "with_step": False},
        {"placement": scattered, "dispatch": {"deduplicate": False}},
        {"placement": scattered, "overlap": {"chunks": 2, "by": "tokens"}},
        {"placement": scattered, "overlap": {"chunks": 2, "by": "experts"}},
        {"placement": placement_of(world, {0: (1,)}, scattered=False)},
    ]
    results = run_ranks(run_cases, world, counts, cases)
    for rank in range(world):
        for case, result in zip(cases, results[rank], strict=True):
            assert torch.equal(result["out"], results[rank][0]["out"]), case
            assert result["experts"] == results[rank][0]["experts"], case
    # The split is the best that these hosts allow, and costs no collective.
    plain, moved = ([each[index] for each in results] for index in (0, 4))
    most = [max(sum(each["own"]) for each in part) for part in (plain, moved)]
    assert most[1] < most[0]
    assert most[1] <= -(-2 * sum(counts) // world) + 1
    assert [each["collectives"] for each in moved] == [each["collectives"] for each in plain]


def test_low_bit_copies_take_the_least_claims_and_only_as_many_as_needed():
    counts, target = [48, 40, 30, 34], 0.9
    copies = {0: (0, 1), 3: (0, 1)}
    placement = placement_of(4, copies, scattered=True)
    case = {"placement": placement, "precision": "int4", "copies": {"target": target}}
    results = run_ranks(run_cases, 4, counts, [{}, case])
    limit = int(np.ceil(2 * sum(counts) / 4 / target))
    home_W = np.bincount(SCATTERED[4], weights=results[0][0]["experts"], minlength=4)
    loads = [sum(result[1]["own"]) for result in results]
    assert max(loads) == limit < home_W.max()
    copied = sum(sum(result[1]["own"][result[1]["homes"] :]) for result in results)
    assert copied == (home_W - limit).clip(min=0).sum(), "more rows moved than needed"
    scores: dict[int, list[float]] = {0: [], 3: []}
    low: dict[int, list[float]] = {0: [], 3: []}
    for result in results:
        routing = result[1]["routing"]
        differs_T = (result[1]["out"] != result[0]["out"]).any(1)
        for token, (ids, differs) in enumerate(zip(routing.topk_ids_TK, differs_T, strict=True)):
            held = [expert for expert in ids.tolist() if expert in copies]
            assert held or not differs, "a token without a copied expert changed"
            for expert in held:
                scores[expert].append(float(routing.scores_TE[token, expert]))
                if differs and len(held) == 1:
                    low[expert].append(scores[expert][-1])
    # A token with both experts may differ by either; the others differ by the least claims alone.
    for expert, found in low.items():
        assert found and max(found) <= sorted(scores[expert])[copied - 1]


def test_a_rank_at_half_speed_computes_half_the_rows():
    counts = [41, 35]
    placement = placement_of(2, {0: (0,), 3: (1,), 4: (1,)}, scattered=True)
    cases = [{}, {"placement": placement, "speeds_W": (512, 1024), "with_step": False}]
    results = run_ranks(run_cases, 2, counts, cases)
    slow, fast = (sum(result[1]["own"]) for result in results)
    assert slow + fast == 2 * sum(counts)
    assert abs(2 * slow - fast) <= 2
    for result in results:
        assert torch.equal(result[0]["out"], result[1]["out"])


def greedy(
    results: list[dict[str, Any]], counts: list[int], placement: LayerPlacement, limits: list[int]
) -> list[set[tuple[int, int]]]:
    """The kept (token, column) of every rank: claims in order, each kept if all fit somehow."""
    claims = []
    for rank, result in enumerate(results):
        routing = result["routing"]
        ids = routing.topk_ids_TK
        for token in range(counts[rank]):
            for column, expert in enumerate(ids[token].tolist()):
                score = float(routing.scores_TE[token, expert])
                claims.append((-score, rank, token, expert, column))
    claims.sort()
    hosts = [placement.hosts(expert) for expert in range(8)]
    used = [0] * len(limits)
    at: dict[tuple[int, int], int] = {}  # (expert, rank) -> rows
    kept: list[set[tuple[int, int]]] = [set() for _ in results]

    def place(expert: int, seen: set[int]) -> bool:
        for rank in hosts[expert]:
            if rank in seen:
                continue
            seen.add(rank)
            if used[rank] < limits[rank]:
                used[rank] += 1
                at[expert, rank] = at.get((expert, rank), 0) + 1
                return True
            for other in range(8):
                if at.get((other, rank), 0) and place(other, seen):
                    at[other, rank] -= 1
                    at[expert, rank] = at.get((expert, rank), 0) + 1
                    return True
        return False

    for _, rank, token, expert, column in claims:
        if place(expert, set()):
            kept[rank].add((token, column))
    return kept


@pytest.mark.parametrize(("world", "factor"), [(2, "1.05"), (3, "0.8"), (4, "1.0")])
def test_the_kept_set_is_the_greedy_one_and_no_rank_exceeds_its_limit(world, factor):
    counts = [31, 17, 40, 8][:world]
    placement = placement_of(world, {0: (0,), 4: (1,)}, scattered=True)
    capacity = {"policy": "token_drop", "scope": "rank", "factor": factor}
    cases = [
        {"placement": placement, "capacity": capacity, "precision": precision}
        for precision in ("model", "int4")
    ]
    results = run_ranks(run_cases, world, counts, cases)
    slots = 8 * expert_capacity(CapacityConfig(**capacity).exact_factor, sum(counts), 2, 8)
    limits = [slots // world + (rank < slots % world) for rank in range(world)]
    for index in range(2):
        part = [each[index] for each in results]
        kept = greedy(part, counts, placement, limits)
        for rank, result in enumerate(part):
            mask = result["decision"].keep_TK
            found = {(int(t), int(k)) for t, k in zip(*mask.nonzero(), strict=True)}
            assert found == kept[rank]
            assert sum(result["own"]) <= limits[rank]


def test_a_capacity_that_cannot_bind_drops_nothing_whatever_the_placement():
    placement = placement_of(2, {0: (0,)}, scattered=True)
    capacity = {"policy": "token_drop", "scope": "rank", "factor": "4"}
    cases = [{}, {"placement": placement, "capacity": capacity}]
    for result in run_ranks(run_cases, 2, [30, 22], cases):
        assert torch.equal(result[0]["out"], result[1]["out"])


@pytest.mark.parametrize("precision", ["model", "int8"])
def test_expanded_drop_keeps_what_token_drop_keeps_and_fills_free_slots_of_the_rank(precision):
    counts = [33, 20, 18]
    placement = placement_of(3, {0: (0, 1), 3: (2,)}, scattered=True)
    base = {"scope": "rank", "factor": "1.0"}
    cases = [
        {"placement": placement, "precision": precision, "capacity": {"policy": policy, **base}}
        for policy in ("token_drop", "expanded_drop")
    ]
    results = run_ranks(run_cases, 3, counts, cases)
    slots = 8 * expert_capacity(CapacityConfig(**base).exact_factor, sum(counts), 2, 8)
    for rank, (dropped, expanded) in enumerate(results):
        assert (dropped["decision"].keep_TK == expanded["decision"].keep_TK).all()
        extra_Te = expanded["decision"].extra_Te
        limit = slots // 3 + (rank < slots % 3)
        chosen = expanded["routing"].topk_ids_TK
        for token, local in zip(*extra_Te.nonzero(), strict=True):
            assert expanded["own_experts"][local] not in chosen[token].tolist()
        assert sum(expanded["own"]) == sum(dropped["own"]) + extra_Te.sum()
        assert sum(expanded["own"]) <= limit


def test_ties_are_broken_by_token_wherever_a_token_is():
    """Equal scores everywhere: the kept set is that of the global token ids alone."""
    keys, _ = sort_keys(
        "score",
        score_N=torch.zeros(3),
        request_N=torch.tensor([1, 0, 0], dtype=torch.int32),
        position_N=torch.tensor([0, 1, 0], dtype=torch.int32),
        expert_N=torch.zeros(3, dtype=torch.int64),
        seed=0,
        layer=0,
    )
    from engine.ops.order_claims import order_claims

    assert order_claims(keys).tolist() == [2, 1, 0]


def refused(rank: int, capacity: dict[str, Any]) -> str:
    config = Config(model=ModelConfig(path="unused"))
    topology = bootstrap.start(config)
    layer = build(topology, config, SPEC, None, placement=placement_of(2, {0: (0,)}, True))
    try:
        layer.set_capacity(CapacityConfig(**capacity))
    except ConfigError as error:
        return str(error)
    finally:
        bootstrap.stop(topology)
    return ""


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"consensus": "quota"}, "moe.capacity.consensus = 'quota'"),
        ({"selection": "radix"}, "moe.capacity.selection = 'radix'"),
        ({"policy": "expanded_drop", "tiers": "one"}, "moe.capacity.tiers = 'one'"),
        ({"policy": "expanded_drop"}, "moe.capacity.scope = 'expert'"),
    ],
)
def test_what_copies_cannot_do_is_refused_in_words(settings, named):
    for text in run_ranks(refused, 2, {"policy": "token_drop", **settings}):
        assert named in text and "moe.placement has copies" in text
