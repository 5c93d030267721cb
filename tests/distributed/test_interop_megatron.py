"""Megatron-Core's router and MoE layer under Lockstep's capacity on gloo ranks.

Run: pytest tests/distributed/test_interop_megatron.py
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine.config import CapacityConfig
from engine.interop.megatron import capacity_router
from engine.interop.megatron_settings import router_scores
from tests.helpers import reference
from tests.helpers.megatron_case import (
    HIDDEN,
    make_layer,
    make_router,
    needs_megatron,
    no_cuda,
    random_logits,
    transformer_config,
)
from tests.helpers.ranks import run_ranks

pytestmark = needs_megatron

E, K = 8, 2
SIZES = [(20, 12), (31, 1), (32, 0)]  # tokens of the two ranks: ragged, and none at all
TIMEOUT_S = 240.0  # each rank imports Megatron-Core

# One rank that holds all tokens decides the same, because none of these looks at who holds them.
ANYWHERE = [
    {"policy": "token_drop"},
    {"policy": "token_drop", "selection": "radix"},
    {"policy": "token_drop", "order": "first"},
    {"policy": "token_drop", "order": "last", "factor": "1.1"},
    {"policy": "token_drop", "order": "random", "seed": 5},
    {"policy": "token_drop", "renormalize": True},
    {"policy": "token_drop", "factor": "4"},
]
BY_RANK = [
    {"policy": "token_drop", "scope": "rank"},
    {"policy": "token_drop", "consensus": "quota"},
    {"policy": "token_drop", "consensus": "local"},
    {"policy": "expanded_drop"},
    {"policy": "expanded_drop", "tiers": "one"},
    {"policy": "expanded_drop", "extras": "dropped", "expand": 2, "scope": "rank"},
    {"policy": "expanded_drop", "consensus": "quota"},
]
RULES = [{"factor": "1", **rules} for rules in ANYWHERE + BY_RANK]


def start() -> Any:
    """Megatron's process groups, all ranks in one expert-parallel group."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    return get_default_pg_collection()


def own_part(whole: torch.Tensor, rank: int, sizes: tuple[int, ...]) -> torch.Tensor:
    return whole.split(sizes)[rank]


def route_all(rank: int, collection: Any) -> list[list[tuple[torch.Tensor, torch.Tensor, Any]]]:
    """This rank's weights, mask and counts for every rule and every partition of the tokens."""
    config = transformer_config(E, K, expert_model_parallel_size=dist.get_world_size())
    results = []
    for rules in RULES:
        # `ep` is looked up in parallel_state where the collection lacks it.
        given = {} if rules["policy"] == "token_drop" else {"ep": collection.ep}
        router = make_router(config, CapacityConfig(**rules), layer=2, **given)
        found = []
        for sizes in SIZES:
            logits = own_part(random_logits(sum(sizes), E), rank, sizes)
            found.append((*router.routing(logits), router.last_drops))
        results.append(found)
    return results


def of_both(rule: int, sizes: int) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    parts = [rank["routed"][rule][sizes] for rank in on_ranks(2)]
    probs, mask = (torch.cat([part[index] for part in parts]) for index in (0, 1))
    return probs, mask, [part[2] for part in parts]


@pytest.mark.parametrize("sizes", range(len(SIZES)), ids=lambda index: str(SIZES[index]))
@pytest.mark.parametrize("rule", range(len(ANYWHERE)), ids=lambda index: str(RULES[index]))
def test_two_ranks_keep_what_one_rank_with_all_tokens_keeps(rule, sizes):
    probs, mask, _ = of_both(rule, sizes)
    config, capacity = transformer_config(E, K), CapacityConfig(**RULES[rule])
    one = make_router(config, capacity, layer=2).routing(random_logits(sum(SIZES[sizes]), E))
    assert torch.equal(mask, one[1]) and torch.equal(probs, one[0])


@pytest.mark.parametrize("sizes", range(len(SIZES)), ids=lambda index: str(SIZES[index]))
@pytest.mark.parametrize("rule", range(len(RULES)), ids=lambda index: str(RULES[index]))
def test_every_decision_and_count_is_the_references(rule, sizes):
    rules = RULES[rule]
    total = sum(SIZES[sizes])
    config, logits = transformer_config(E, K), random_logits(total, E)
    own_probs, chosen = make_router(config, None).routing(logits)
    ids = chosen.nonzero()[:, 1].view(-1, K)
    scores, weights = router_scores(logits[:, 0], "softmax"), own_probs.gather(1, ids)
    inputs, number = [], np.arange(total)
    for owned in np.split(number, [SIZES[sizes][0]]):
        inputs.append(
            reference.RankInput(
                scores=scores.numpy()[owned],
                topk_ids=ids.numpy()[owned],
                weights=weights.numpy()[owned],
                request=np.zeros_like(owned),
                position=owned,
                competes=np.ones(len(owned), dtype=bool),
            )
        )
    known = {name: value for name, value in rules.items() if name != "selection"}
    outcome = reference.decide(
        inputs,
        reference.Rules(**known, layer=2),
        reference.Family(normalize=True),
        [0, E // 2, E],
        E,
        K,
    )
    probs, mask, drops = of_both(rule, sizes)
    wanted = [weights for rank in outcome.ranks for weights in rank.weights]
    assert [row.nonzero().flatten().tolist() for row in mask] == [sorted(each) for each in wanted]
    for t, each in enumerate(wanted):
        assert {e: probs[t, e].item() for e in each} == pytest.approx(each, rel=1e-5)
    for rank, counted in zip(outcome.ranks, drops, strict=True):
        assert counted.routed == rank.keep.size
        assert counted.dropped == (~rank.keep).sum()
        assert counted.added == sum(map(len, rank.extras))
    assert mask.sum(0).tolist() == outcome.computed


@pytest.mark.parametrize("sizes", range(len(SIZES)), ids=lambda index: str(SIZES[index]))
@pytest.mark.parametrize("consensus", ["global", "quota"])
def test_an_overloaded_expert_keeps_exactly_its_capacity(consensus, sizes):
    rules = {"factor": "1", "policy": "token_drop"}
    rules |= {"consensus": "quota"} if consensus == "quota" else {}
    _, mask, _ = of_both(RULES.index(rules), sizes)
    total = sum(SIZES[sizes])
    _, chosen = make_router(transformer_config(E, K), None).routing(random_logits(total, E))
    capacity = total * K // E
    assert mask.sum(0).tolist() == chosen.sum(0).clamp(max=capacity).tolist()
    assert mask.sum(0).max() == capacity


def poison_one(rank: int) -> str:
    config = transformer_config(E, K, expert_model_parallel_size=2)
    router = make_router(config, CapacityConfig(policy="token_drop", factor="1"), layer=4)
    logits = random_logits(12, E, seed=rank)
    if rank == 1:
        logits[3] = float("nan")
    with pytest.raises(ValueError) as raised:
        router.routing(logits)
    return str(raised.value)


def test_a_score_that_is_no_number_stops_all_ranks_and_names_its_own():
    first, second = (rank["poisoned"] for rank in on_ranks(2))
    assert first == second
    assert first.startswith("layer 4: router scores are NaN or infinite on rank 1")


FFN = 12
LAYERS = [  # tokens of the ranks, capacity, Megatron's dispatcher
    ((24,), {"policy": "token_drop", "factor": "0.5"}, "alltoall"),
    ((14, 10), {"policy": "token_drop", "factor": "0.5"}, "alltoall"),
    ((24, 0), {"policy": "expanded_drop", "factor": "1"}, "alltoall"),
    ((12, 12), {"policy": "expanded_drop", "factor": "0.5"}, "allgather"),
]


def weights_of() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate [E, D], first and second matrices of every expert, [E, F, D] and [E, D, F]."""
    generator = torch.Generator().manual_seed(1)
    gate = torch.randn(E, HIDDEN, generator=generator)
    gate[0] += 0.6  # with tokens of positive mean, expert 0 is hot
    fc1 = torch.randn(E, FFN, HIDDEN, generator=generator) * 0.4
    return gate, fc1, torch.randn(E, HIDDEN, FFN, generator=generator) * 0.4


def tokens_of(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 1, HIDDEN, generator=generator) + 0.4


def fill(layer: Any, rank: int, world: int) -> None:
    gate, fc1, fc2 = weights_of()
    layer.router.weight.copy_(gate)
    for index, expert in enumerate(layer.experts.local_experts):
        expert.linear_fc1.weight.copy_(fc1[rank * E // world + index])
        expert.linear_fc2.weight.copy_(fc2[rank * E // world + index])


def run_layer(
    rank: int, collection: Any, sizes: tuple[int, ...], rules: dict, dispatcher: str
) -> dict[str, Any]:
    """Outputs of Megatron's layer with the capacity router, of one with Megatron's own router and
    the same map put in, and what the experts were given.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    world = len(sizes)
    config = transformer_config(
        E,
        K,
        moe_ffn_hidden_size=FFN,
        expert_model_parallel_size=world,
        moe_token_dispatcher_type=dispatcher,
        moe_expert_capacity_factor=float(E) if dispatcher == "alltoall" else None,
        use_cpu_initialization=True,
    )
    x = own_part(tokens_of(sum(sizes)), rank, sizes)
    rows, kept = [], []
    with no_cuda(), torch.no_grad():
        layer = make_layer(config, capacity_router(CapacityConfig(**rules)), collection)
        fill(layer, rank, world)
        layer.experts.register_forward_pre_hook(lambda _, given: rows.append(given[1].tolist()))
        layer.router.register_forward_hook(lambda *given: kept.append(given[2]))
        out, _ = layer(x)
        plain = make_layer(config, TopKRouter, collection)
        fill(plain, rank, world)
        plain.router.routing = lambda *_, **__: kept[0]
        again, _ = plain(x)
    return {"out": out, "again": again, "rows": rows[0], "kept": kept[0]}


def run_all(rank: int) -> dict[str, Any]:
    collection, world = start(), dist.get_world_size()
    layers = {
        number: run_layer(rank, collection, *case)
        for number, case in enumerate(LAYERS)
        if len(case[0]) == world
    }
    if world == 1:
        return {"layers": layers}
    routed, poisoned = route_all(rank, collection), poison_one(rank)
    return {"routed": routed, "poisoned": poisoned, "layers": layers}


@functools.cache
def on_ranks(world: int) -> list[dict[str, Any]]:
    """Every rank's results; each starts once for all tests, because Megatron-Core is slow to."""
    return run_ranks(run_all, world, timeout=TIMEOUT_S)


@pytest.mark.parametrize("number", range(len(LAYERS)), ids=lambda index: str(LAYERS[index]))
def test_megatrons_layer_computes_what_was_kept_and_nothing_else(number):
    sizes, rules, _ = LAYERS[number]
    ranks = [rank["layers"][number] for rank in on_ranks(len(sizes))]
    probs, mask = (torch.cat([rank["kept"][index] for rank in ranks]) for index in (0, 1))
    out = torch.cat([rank["out"] for rank in ranks])
    assert torch.equal(out, torch.cat([rank["again"] for rank in ranks]))

    _, fc1, fc2 = (weight.double() for weight in weights_of())
    x = tokens_of(sum(sizes))[:, 0].double()
    hidden = F.gelu(torch.einsum("td,efd->tef", x, fc1))
    each = torch.einsum("tef,edf->ted", hidden, fc2)
    wanted = (each * probs.double().where(mask, 0.0)[:, :, None]).sum(1)
    torch.testing.assert_close(out[:, 0].double(), wanted, rtol=1e-5, atol=1e-5)

    orphans = ~mask.any(1)
    assert not out[orphans].any()
    assert sum((rank["rows"] for rank in ranks), []) == mask.sum(0).tolist()
    capacity = reference.capacity_of(rules["factor"], sum(sizes), K, E)
    assert mask.sum(0).max() == capacity
    # At half the mean load there are fewer slots than tokens have experts.
    assert orphans.any() == (rules["factor"] == "0.5")
