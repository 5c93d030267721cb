"""Rare forms of a router through the whole layer, on 1 to 3 ranks, against plain loops.

Run: pytest tests/distributed/test_router_forms.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config import Config, ModelConfig
from engine.distributed import bootstrap
from engine.moe.router import RouterSpec
from tests.helpers.layer_cases import FFN, build, tokens_of, weights_of
from tests.helpers.ranks import run_ranks

EXPERTS, TOP_K = 6, 2
FORMS = {"logit bias": {"normalize": True, "logit_bias": True}}
COUNTS = {1: [7], 2: [6, 0], 3: [4, 1, 5]}


def logit_bias() -> torch.Tensor:
    """Brings in experts that the tokens alone would not choose."""
    return torch.linspace(-2.0, 3.0, EXPERTS)


def run_form(rank: int, form: str, counts: list[int]) -> dict[str, Any]:
    """The layer's output, and the loads that it has recorded."""
    config = Config(model=ModelConfig(path="unused"))
    topology = bootstrap.start(config)
    layer = build(
        topology, config, RouterSpec(num_experts=EXPERTS, top_k=TOP_K, **FORMS[form]), None
    )
    if layer.logit_bias_E is not None:
        layer.logit_bias_E.copy_(logit_bias())
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
            logits = logits + logit_bias().double()
        chosen = logits.topk(TOP_K).indices
        for weight, expert in zip(logits[chosen].softmax(0), chosen.tolist(), strict=True):
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
