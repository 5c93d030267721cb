"""Qwen3.5's MoE layer under capacity, on 1 to 3 ranks, against plain loops and the slow reference.

Run: pytest tests/distributed/test_qwen3_5_layer.py
"""

from __future__ import annotations

import pytest
import torch

from engine.config import CapacityConfig, Config, ModelConfig
from engine.distributed import bootstrap
from engine.layers.mlp import DenseMLP
from engine.models.registry import read_spec
from engine.models.spec import SparseSpec
from engine.moe.layer import MoELayer
from engine.moe.router import gate_logits
from tests.helpers.layer_cases import step_of
from tests.helpers.layer_reference import decided_weights
from tests.helpers.model_cases import CASES
from tests.helpers.ranks import run_ranks

SETTINGS = [
    {"policy": "none"},
    {"policy": "token_drop", "factor": "1"},
    {"policy": "token_drop", "factor": "0.25", "scope": "rank", "renormalize": True},
    {"policy": "expanded_drop", "factor": "1"},
]
LAYER = 3


def spec_of() -> SparseSpec:
    mlp = read_spec(CASES["qwen3-5-moe"].config()).layers[0].mlp
    assert isinstance(mlp, SparseSpec) and mlp.shared is not None and mlp.shared_gate
    assert mlp.moe.router.normalize
    return mlp


def weights_of(spec: SparseSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    assert spec.shared is not None
    experts, hidden, ffn = spec.moe.router.num_experts, spec.moe.hidden, spec.moe.ffn
    shapes = {
        "gate": (experts, hidden),
        "w13": (experts, 2 * ffn, hidden),
        "w2": (experts, hidden, ffn),
        "shared w13": (2 * spec.shared.ffn, hidden),
        "shared w2": (hidden, spec.shared.ffn),
        "shared gate": (1, hidden),
    }
    drawn = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["gate"][0] += 0.3  # with tokens of positive mean, expert 0 is hot
    return drawn


def tokens_of(spec: SparseSpec, rank: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9 + rank)
    return torch.randn(count, spec.moe.hidden, generator=generator) + 0.3


def run_layer(rank: int, counts: list[int]) -> list[torch.Tensor]:
    """Outputs of one layer under one policy after the other."""
    config, spec = Config(model=ModelConfig(path="unused")), spec_of()
    topology = bootstrap.start(config)
    assert spec.shared is not None
    cpu, f32 = topology.device, torch.float32
    shared = DenseMLP(spec.moe.hidden, spec.shared.ffn, cpu, f32, output_gate=True)
    layer = MoELayer(
        spec.moe,
        layer=LAYER,
        topology=topology,
        config=config.moe,
        device=cpu,
        dtype=f32,
        shared=shared,
    )
    weights, stacked = weights_of(spec), layer.experts.stacked
    assert shared.output_gate_1D is not None
    layer.gate.weight_ED.copy_(weights["gate"])
    stacked.w13_e2FD.copy_(weights["w13"][layer.local_experts])
    stacked.w2_eDF.copy_(weights["w2"][layer.local_experts])
    shared.gate_up_2FD.copy_(weights["shared w13"])
    shared.down_DF.copy_(weights["shared w2"])
    shared.output_gate_1D.copy_(weights["shared gate"])
    layer.finalize_weights()
    x, outs = tokens_of(spec, rank, counts[rank]), []
    for settings in SETTINGS:
        layer.set_capacity(CapacityConfig(**settings))
        outs.append(layer(x, step_of(topology, counts, 1)))
    bootstrap.stop(topology)
    return outs


def ffn(w13: torch.Tensor, w2: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    gate, up = (w13.double() @ row).chunk(2)
    return w2.double() @ (gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("counts", [[20], [13, 9], [7, 0, 12]], ids=["1 rank", "2", "3"])
def test_what_is_kept_is_the_references_and_the_shared_expert_is_untouched(counts: list[int]):
    results, spec = run_ranks(run_layer, len(counts), counts), spec_of()
    weights, router = weights_of(spec), spec.moe.router
    xs = [tokens_of(spec, rank, count) for rank, count in enumerate(counts)]
    logits = [gate_logits(x, weights["gate"], router) for x in xs]
    for index, settings in enumerate(SETTINGS):
        decided = decided_weights(router, logits, settings, LAYER)
        used = [len(chosen) for rank in decided for chosen in rank]
        if settings["policy"] == "token_drop":
            assert sum(used) < router.top_k * sum(counts), "the case drops"
        if settings.get("factor") == "0.25":
            assert 0 in used, "the case has orphans"
        for x, of, result in zip(xs, decided, results, strict=True):
            out = torch.zeros_like(x, dtype=torch.float64)
            for t, chosen in enumerate(of):
                row = x[t].double()
                for expert, weight in chosen.items():
                    out[t] += weight * ffn(weights["w13"][expert], weights["w2"][expert], row)
                gate = torch.sigmoid(weights["shared gate"].double() @ row)
                out[t] += gate * ffn(weights["shared w13"], weights["shared w2"], row)
            torch.testing.assert_close(result[index].double(), out, atol=1e-5, rtol=1e-4)
