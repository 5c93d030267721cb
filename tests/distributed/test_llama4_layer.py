"""Llama 4's MoE layer under capacity, on 1 to 3 ranks, against the slow reference.

Run: pytest tests/distributed/test_llama4_layer.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config import CapacityConfig, Config, ModelConfig
from engine.distributed import bootstrap
from engine.distributed.groups import expert_range
from engine.layers.mlp import DenseMLP
from engine.models.registry import read_spec
from engine.models.spec import SparseSpec
from engine.moe.layer import MoELayer
from engine.moe.router import gate_logits, route
from tests.helpers import reference
from tests.helpers.layer_cases import step_of
from tests.helpers.model_cases import CASES
from tests.helpers.ranks import run_ranks

SETTINGS = [
    {"policy": "none"},
    {"policy": "token_drop", "factor": "1"},
    {"policy": "token_drop", "factor": "0.5", "scope": "rank", "renormalize": True},
]


def spec_of() -> SparseSpec:
    mlp = read_spec(CASES["llama4"].config()).layers[1].mlp
    assert isinstance(mlp, SparseSpec) and mlp.shared is not None
    return mlp


def weights_of(spec: SparseSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    experts, hidden, ffn = spec.moe.router.num_experts, spec.moe.hidden, spec.moe.ffn
    shapes = {
        "gate": (experts, hidden),
        "w13": (experts, 2 * ffn, hidden),
        "w2": (experts, hidden, ffn),
        "shared13": (2 * ffn, hidden),
        "shared2": (hidden, ffn),
    }
    drawn = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["gate"][0] += 0.2  # with tokens of positive mean, expert 0 is hot
    return drawn


def tokens_of(spec: SparseSpec, rank: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9 + rank)
    return torch.randn(count, spec.moe.hidden, generator=generator) + 0.3


def run_layer(rank: int, counts: list[int]) -> list[torch.Tensor]:
    """Outputs of one layer under one policy after the other."""
    config, spec = Config(model=ModelConfig(path="unused")), spec_of()
    topology, weights = bootstrap.start(config), weights_of(spec)
    shared = DenseMLP(spec.moe.hidden, spec.moe.ffn, topology.device, torch.float32)
    shared.gate_up_2FD.copy_(weights["shared13"])
    shared.down_DF.copy_(weights["shared2"])
    layer = MoELayer(
        spec.moe,
        layer=3,
        topology=topology,
        config=config.moe,
        device=topology.device,
        dtype=torch.float32,
        shared=shared,
    )
    layer.gate.weight_ED.copy_(weights["gate"])
    for local, expert in enumerate(layer.local_experts):
        layer.experts.set_weights(local, weights["w13"][expert], weights["w2"][expert])
    layer.finalize_weights()
    x, outs = tokens_of(spec, rank, counts[rank]), []
    for settings in SETTINGS:
        layer.set_capacity(CapacityConfig(**settings))
        outs.append(layer(x, step_of(topology, counts, 1)))
    bootstrap.stop(topology)
    return outs


def swiglu(row: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    gate, up = (w13.double() @ row).chunk(2)
    return w2.double() @ (torch.nn.functional.silu(gate) * up)


def expected(counts: list[int], settings: dict) -> tuple[list[torch.Tensor], int]:
    """Every rank's output in float64, and how many tokens no routed expert has."""
    spec, inputs, xs = spec_of(), [], []
    router, weights = spec.moe.router, weights_of(spec)
    for rank, count in enumerate(counts):
        xs.append(tokens_of(spec, rank, count))
        routing = route(gate_logits(xs[-1], weights["gate"], router), router)
        inputs.append(
            reference.RankInput(
                scores=routing.scores_TE.numpy(),
                topk_ids=routing.topk_ids_TK.numpy(),
                weights=routing.topk_weights_TK.numpy(),
                request=np.full(count, rank),
                position=np.arange(count),
                competes=np.ones(count, bool),
            )
        )
    if settings["policy"] == "none":
        decided = [
            [{int(ids[0]): float(of[0])} for ids, of in zip(x.topk_ids, x.weights, strict=True)]
            for x in inputs
        ]
    else:
        bounds = [expert_range(router.num_experts, len(counts), r)[0] for r in range(len(counts))]
        outcome = reference.decide(
            inputs,
            reference.Rules(**settings, layer=3),
            reference.Family(normalize=router.normalize),
            [*bounds, router.num_experts],
            router.num_experts,
            router.top_k,
        )
        decided = [rank.weights for rank in outcome.ranks]
    outs, orphans = [], 0
    for x, of in zip(xs, decided, strict=True):
        out = torch.zeros_like(x, dtype=torch.float64)
        for t, chosen in enumerate(of):
            row = x[t].double()
            out[t] = swiglu(row, weights["shared13"], weights["shared2"])
            orphans += not chosen
            for index, weight in chosen.items():
                out[t] += swiglu(weight * row, weights["w13"][index], weights["w2"][index])
        outs.append(out)
    return outs, orphans


@pytest.mark.parametrize("counts", [[20], [13, 9], [7, 0, 12]], ids=["1 rank", "2", "3"])
def test_a_dropped_token_has_the_shared_expert_alone_and_all_else_is_the_references(counts):
    results = run_ranks(run_layer, len(counts), counts)
    for index, settings in enumerate(SETTINGS):
        outs, orphans = expected(counts, settings)
        assert (orphans > 0) == (settings["policy"] == "token_drop"), "the case drops"
        for out, result in zip(outs, results, strict=True):
            torch.testing.assert_close(result[index].double(), out, atol=1e-5, rtol=1e-4)
