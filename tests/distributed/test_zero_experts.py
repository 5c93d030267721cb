"""Zero experts through the whole layer, on 1 to 3 ranks, against plain loops.

`test_capacity_layer.py` holds them against the slow reference under capacity.

Run: pytest tests/distributed/test_zero_experts.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config import CapacityConfig, Config, DispatchConfig, ModelConfig, MoEConfig
from engine.distributed import bootstrap
from engine.moe.placement.placement import LayerPlacement
from tests.helpers.layer_cases import (
    FFN,
    LONGCAT,
    Doubled,
    build,
    correction_of,
    step_of,
    tokens_of,
    weights_of,
)
from tests.helpers.ranks import run_ranks

COUNTS = {1: [48], 2: [40, 0], 3: [20, 1, 24]}


def run_dropless(rank: int, counts: list[int], dispatch: dict[str, Any]) -> dict[str, Any]:
    """The layer's output, and what it recorded."""
    moe = MoEConfig(dispatch=DispatchConfig(**dispatch))
    config = Config(model=ModelConfig(path="unused"), moe=moe)
    topology = bootstrap.start(config)
    layer = build(topology, config, LONGCAT, Doubled())
    layer.telemetry.claims.step = {}
    x = tokens_of(rank, counts[rank])
    calls = layer.num_collectives
    out = layer(x, step_of(topology, counts, 1))
    results = {
        "out": out,
        "collectives": layer.num_collectives - calls,
        "experts": layer.telemetry.loads.layers[3].experts.tolist(),
        "drops": layer.drops.read_and_reset(),
        "claims": layer.telemetry.claims.step[3][0],
    }
    bootstrap.stop(topology)
    return results


def chosen_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The choices of tokens and their weights, zero experts numbered behind the experts."""
    scores = (x.double() @ weights_of(LONGCAT.num_logits)[0].double().t()).softmax(1)
    ids = (scores + correction_of(LONGCAT.num_logits)).topk(LONGCAT.top_k, dim=1).indices
    return ids, scores.gather(1, ids) * LONGCAT.scale


@pytest.mark.parametrize("dispatch", [{"deduplicate": False}, {"partial_sums": True}], ids=str)
@pytest.mark.parametrize("ranks", COUNTS)
def test_a_zero_expert_gives_the_token_itself_and_is_nobodys_load(
    ranks: int, dispatch: dict[str, Any]
) -> None:
    counts, experts = COUNTS[ranks], LONGCAT.num_experts
    results = run_ranks(run_dropless, ranks, counts, dispatch)
    _, w13, w2 = (each.double() for each in weights_of(LONGCAT.num_logits))
    loads, zero_alone = [0] * experts, 0
    for rank, result in enumerate(results):
        x = tokens_of(rank, counts[rank])
        ids, weights = chosen_of(x)
        out = 2 * x.double()
        for t, row in enumerate(x.double()):
            for expert, weight in zip(ids[t].tolist(), weights[t], strict=True):
                if expert >= experts:
                    out[t] += weight * row
                    continue
                up = w13[expert] @ row
                hidden = torch.nn.functional.silu(up[:FFN]) * up[FFN:]
                out[t] += weight * (w2[expert] @ hidden)
                loads[expert] += 1
        torch.testing.assert_close(result["out"].double(), out, atol=1e-5, rtol=1e-5)
        zero_alone += int((ids >= experts).all(1).sum())
        claims, recorded = result["claims"], ids.masked_fill(ids >= experts, -1)
        assert claims.topk_ids_TK.tolist() == recorded.tolist()
        assert (claims.scores_TK[claims.topk_ids_TK < 0] == 0).all()
        drops = result["drops"]
        zero = int((ids >= experts).sum())
        assert (drops.zero, drops.routed) == (zero, ids.numel() - zero)
        assert (drops.dropped, drops.orphans) == (0, 0)
    assert zero_alone, "some tokens choose zero experts alone"
    assert all(result["experts"] == loads for result in results)
    assert sum(result["drops"].zero for result in results) > 0


def test_zero_experts_cost_no_collective() -> None:
    """Those of the loads, the rows and their results, as without zero experts."""
    assert [each["collectives"] for each in run_ranks(run_dropless, 2, [6, 5], {})] == [3, 3]


def run_placements(rank: int, counts: list[int], copies: bool) -> list[torch.Tensor]:
    """Outputs of one layer with contiguous homes and with others, with each policy."""
    config = Config(model=ModelConfig(path="unused"))
    topology = bootstrap.start(config)
    world, num_experts = topology.expert.size, LONGCAT.num_experts
    homes = tuple(expert % world for expert in reversed(range(num_experts)))
    copied = {0: tuple(range(world)), 6: tuple(range(1, world))} if copies else {}
    hosts = tuple(
        tuple(host for host in copied.get(expert, ()) if host != homes[expert])
        for expert in range(num_experts)
    )
    policies = [
        CapacityConfig(),
        CapacityConfig(policy="token_drop", factor="0.5", renormalize=True),
    ]
    outs = []
    for placement in (None, LayerPlacement(homes, hosts)):
        layer = build(topology, config, LONGCAT, None, placement=placement)
        for capacity in policies:
            layer.set_capacity(capacity)
            outs.append(layer(tokens_of(rank, counts[rank]), step_of(topology, counts, 1)))
    layer.set_capacity(CapacityConfig(policy="expanded_drop", factor="0.5", scope="rank"))
    layer(tokens_of(rank, counts[rank]), step_of(topology, counts, 1))
    bootstrap.stop(topology)
    return outs


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("counts", [[40, 25], [12, 0, 31]])
def test_zero_experts_stay_with_the_token_whatever_the_placement(
    counts: list[int], copies: bool
) -> None:
    for contiguous, dropped, placed, placed_dropped in run_ranks(
        run_placements, len(counts), counts, copies
    ):
        assert torch.equal(placed, contiguous)
        if len(dropped):
            assert not torch.equal(dropped, contiguous)
        assert torch.equal(placed_dropped, dropped)


def refused(rank: int) -> str:
    config = Config(model=ModelConfig(path="unused"))
    topology = bootstrap.start(config)
    layer = build(topology, config, replace(LONGCAT, normalize=True), None)
    layer.set_capacity(CapacityConfig(policy="token_drop"))
    try:
        layer.set_capacity(CapacityConfig(policy="expanded_drop"))
    except ValueError as error:
        return str(error)
    finally:
        bootstrap.stop(topology)
    return ""


def test_extras_of_normalised_weights_are_refused_in_words() -> None:
    assert "moe.capacity.policy = expanded_drop" in run_ranks(refused, 1)[0]
