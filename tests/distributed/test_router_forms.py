"""Rare forms of a router through the whole layer, on 1 to 3 ranks, against plain loops.

Run: pytest tests/distributed/test_router_forms.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config import CapacityConfig, Config, ModelConfig
from engine.distributed import bootstrap
from engine.moe.placement.placement import LayerPlacement
from engine.moe.router import RouterSpec
from tests.helpers.layer_cases import (
    CAPPED,
    FFN,
    TABLE,
    build,
    expert_scale_of,
    logit_bias_of,
    step_of,
    token_ids_of,
    tokens_of,
    weights_of,
)
from tests.helpers.ranks import run_ranks

EXPERTS, TOP_K = 6, 2
FORMS: dict[str, dict[str, Any]] = {
    "logit bias": {"logit_bias": True},
    "logit cap": {"logit_cap": 1.5},
    "scale of experts": {"expert_scale": True},
    "all": {"logit_bias": True, "logit_cap": 2.5, "expert_scale": True},
}
COUNTS = {1: [7], 2: [6, 0], 3: [4, 1, 5]}


def run_form(rank: int, form: str, counts: list[int]) -> dict[str, Any]:
    """The layer's output, and the loads that it has recorded."""
    config = Config(model=ModelConfig(path="unused"))
    topology = bootstrap.start(config)
    spec = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, normalize=True, **FORMS[form])
    layer = build(topology, config, spec, None)
    out = layer(tokens_of(topology.data_rank, counts[topology.data_rank]))
    experts = layer.telemetry.loads.layers[3].experts.tolist()
    bootstrap.stop(topology)
    return {"out": out, "experts": experts}


def expected(form: str, rank: int, count: int) -> tuple[torch.Tensor, list[int]]:
    """Outputs of a rank's tokens in float64, one at a time, and their loads."""
    fields, loads = FORMS[form], [0] * EXPERTS
    gate, w13, w2 = (weights.double() for weights in weights_of(EXPERTS))
    x = tokens_of(rank, count).double()
    out = torch.zeros_like(x)
    for t, row in enumerate(x):
        logits = gate @ row
        if "logit_bias" in fields:
            logits = logits + logit_bias_of(EXPERTS).double()
        if "logit_cap" in fields:
            logits = fields["logit_cap"] * torch.tanh(logits / fields["logit_cap"])
        chosen = logits.topk(TOP_K).indices
        for weight, expert in zip(logits[chosen].softmax(0), chosen.tolist(), strict=True):
            if "expert_scale" in fields:
                weight = weight * expert_scale_of(EXPERTS)[expert].double()
            up = w13[expert] @ row
            out[t] += weight * (w2[expert] @ (torch.nn.functional.silu(up[:FFN]) * up[FFN:]))
            loads[expert] += 1
    return out, loads


@pytest.mark.parametrize("ranks", COUNTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_rank_gets_what_plain_loops_compute(form: str, ranks: int) -> None:
    counts = COUNTS[ranks]
    results = run_ranks(run_form, ranks, form, counts)
    wanted = [expected(form, rank, count) for rank, count in enumerate(counts)]
    loads = [sum(each) for each in zip(*(loads for _, loads in wanted), strict=True)]
    for result, (out, _) in zip(results, wanted, strict=True):
        torch.testing.assert_close(result["out"].double(), out, atol=1e-5, rtol=1e-5)
        assert result["experts"] == loads


def run_placements(
    rank: int, counts: list[int], copies: bool, spec: RouterSpec
) -> list[torch.Tensor]:
    """Outputs of one layer with contiguous homes and with others, with each policy."""
    config = Config(model=ModelConfig(path="unused"))
    topology = bootstrap.start(config)
    world, num_experts = topology.expert.size, spec.num_experts
    homes = tuple(expert % world for expert in reversed(range(num_experts)))
    copied = {9: (0,), 8: tuple(range(1, world))} if copies else {}
    hosts = tuple(
        tuple(host for host in copied.get(expert, ()) if host != homes[expert])
        for expert in range(num_experts)
    )
    outs, ids = [], None
    if spec.token_table is not None:
        ids = token_ids_of(rank, counts[rank], spec.token_table)
    for placement in (None, LayerPlacement(homes, hosts)):
        layer = build(topology, config, spec, None, placement=placement)
        for capacity in (
            CapacityConfig(),
            CapacityConfig(policy="token_drop", factor="1", renormalize=True),
        ):
            layer.set_capacity(capacity)
            step = step_of(topology, counts, 1)
            outs.append(layer(tokens_of(rank, counts[rank]), step, token_ids_T=ids))
    bootstrap.stop(topology)
    return outs


@pytest.mark.parametrize(
    ("counts", "copies", "spec"),
    [
        ([40, 25], False, CAPPED),
        ([12, 0, 31], False, CAPPED),
        ([40, 25], True, CAPPED),
        ([12, 0, 31], True, CAPPED),
        ([40, 25], False, replace(TABLE, num_experts=10)),
        ([12, 0, 31], True, replace(TABLE, num_experts=10)),
    ],
)
def test_scales_and_tables_follow_experts_to_their_homes_and_copies(
    counts: list[int], copies: bool, spec: RouterSpec
) -> None:
    for contiguous, dropped, placed, placed_dropped in run_ranks(
        run_placements, len(counts), counts, copies, spec
    ):
        assert torch.equal(placed, contiguous)
        if len(dropped):
            assert not torch.equal(dropped, contiguous)
        assert torch.equal(placed_dropped, dropped)
