"""gpt-oss's MoE layer under capacity, on 1 to 3 ranks, against plain loops and the slow reference.

Run: pytest tests/distributed/test_gpt_oss_layer.py
"""

from __future__ import annotations

import pytest
import torch

from engine.config import CapacityConfig, Config, ModelConfig
from engine.distributed import bootstrap
from engine.models.registry import read_spec
from engine.models.spec import SparseSpec
from engine.moe.layer import MoELayer
from engine.moe.router import gate_logits
from engine.moe.spec import MoESpec
from tests.helpers.layer_cases import step_of
from tests.helpers.layer_reference import decided_weights
from tests.helpers.model_cases import CASES
from tests.helpers.ranks import run_ranks

SETTINGS = [
    {"policy": "none"},
    {"policy": "token_drop", "factor": "1"},
    {"policy": "token_drop", "factor": "0.5", "scope": "rank", "renormalize": True},
    {"policy": "expanded_drop", "factor": "1"},
]


def spec_of() -> MoESpec:
    mlp = read_spec(CASES["gpt-oss"].config()).layers[0].mlp
    assert isinstance(mlp, SparseSpec)
    return mlp.moe


def weights_of(spec: MoESpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    experts, hidden, ffn = spec.router.num_experts, spec.hidden, spec.ffn
    shapes = {
        "gate": (experts, hidden),
        "logit_bias": (experts,),
        "w13": (experts, 2 * ffn, hidden),
        "w2": (experts, hidden, ffn),
        "b13": (experts, 2 * ffn),
        "b2": (experts, hidden),
    }
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["w13"] *= 0.5  # some values are past the bound of 7
    drawn["w2"] *= 0.3
    drawn["logit_bias"][0] += 2.0  # expert 0 is hot
    return drawn


def tokens_of(spec: MoESpec, rank: int, count: int) -> torch.Tensor:
    return torch.randn(count, spec.hidden, generator=torch.Generator().manual_seed(9 + rank))


def run_layer(rank: int, counts: list[int]) -> list[torch.Tensor]:
    """Outputs of one layer under one policy after the other."""
    config, spec = Config(model=ModelConfig(path="unused")), spec_of()
    topology = bootstrap.start(config)
    layer = MoELayer(
        spec,
        layer=3,
        topology=topology,
        config=config.moe,
        device=topology.device,
        dtype=torch.float32,
    )
    weights, mine = weights_of(spec), layer.local_experts
    stacked = layer.experts.stacked
    assert layer.gate.logit_bias_E is not None and stacked.b13_e2F is not None
    assert stacked.b2_eD is not None
    layer.gate.weight_ED.copy_(weights["gate"])
    layer.gate.logit_bias_E.copy_(weights["logit_bias"])
    stacked.w13_e2FD.copy_(weights["w13"][mine])
    stacked.w2_eDF.copy_(weights["w2"][mine])
    stacked.b13_e2F.copy_(weights["b13"][mine])
    stacked.b2_eD.copy_(weights["b2"][mine])
    layer.finalize_weights()
    x, outs = tokens_of(spec, rank, counts[rank]), []
    for settings in SETTINGS:
        layer.set_capacity(CapacityConfig(**settings))
        outs.append(layer(x, step_of(topology, counts, 1)))
    bootstrap.stop(topology)
    return outs


def expert(weights: dict[str, torch.Tensor], index: int, row: torch.Tensor) -> torch.Tensor:
    """One expert on one token, in float64."""
    w13, w2, b13, b2 = (weights[name][index].double() for name in ("w13", "w2", "b13", "b2"))
    gate, up = (w13 @ row + b13).chunk(2)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return w2 @ ((up + 1) * gate * torch.sigmoid(1.702 * gate)) + b2


def expected(
    counts: list[int], settings: dict
) -> tuple[list[torch.Tensor], list[list[dict[int, float]]]]:
    """Every rank's output, and the weights by which its tokens' experts count."""
    spec = spec_of()
    router, weights = spec.router, weights_of(spec)
    xs = [tokens_of(spec, rank, count) for rank, count in enumerate(counts)]
    logits = [gate_logits(x, weights["gate"], router, weights["logit_bias"]) for x in xs]
    decided = decided_weights(router, logits, settings, layer=3)
    outs = []
    for x, of in zip(xs, decided, strict=True):
        out = torch.zeros_like(x, dtype=torch.float64)
        for t, chosen in enumerate(of):
            for index, weight in chosen.items():
                out[t] += weight * expert(weights, index, x[t].double())
        outs.append(out)
    return outs, decided


@pytest.mark.parametrize("counts", [[20], [13, 9], [7, 0, 12]], ids=["1 rank", "2", "3"])
def test_a_dropped_assignment_takes_its_bias_along_and_all_else_is_the_references(counts):
    results = run_ranks(run_layer, len(counts), counts)
    for index, settings in enumerate(SETTINGS):
        outs, decided = expected(counts, settings)
        used = sum(len(chosen) for rank in decided for chosen in rank)
        if settings["policy"] == "token_drop":
            assert used < 3 * sum(counts), "the case drops"
        for out, result in zip(outs, results, strict=True):
            torch.testing.assert_close(result[index].double(), out, atol=1e-5, rtol=1e-4)
