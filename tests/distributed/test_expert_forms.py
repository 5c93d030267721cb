"""Experts that are not plain SwiGLU, on any number of ranks, dropless and under capacity.

Run: pytest tests/distributed/test_expert_forms.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from engine.config import CapacityConfig, Config, DispatchConfig, ModelConfig, MoEConfig
from engine.distributed import bootstrap
from engine.distributed.groups import Topology, expert_range
from engine.moe.expert_form import ExpertForm
from engine.moe.layer import MoELayer
from engine.moe.router import RouterSpec, gate_logits, route
from engine.moe.spec import MoESpec
from engine.profiling.loads import LayerDrops
from tests.helpers import reference
from tests.helpers.layer_cases import (
    FFN,
    HIDDEN,
    activated,
    expert_scale_of,
    step_of,
    tokens_of,
)
from tests.helpers.ranks import run_ranks

ROUTER = RouterSpec(num_experts=8, top_k=3, normalize=True)
CASES = {
    "gpt-oss": (ROUTER, ExpertForm(activation="gpt_oss", bias=True, limit=1.0)),
    "relu2 of latent rows": (ROUTER, ExpertForm(activation="relu2", gated=False, latent=8)),
    "latent rows and biases": (ROUTER, ExpertForm(activation="gelu_tanh", bias=True, latent=12)),
    "weights on the input": (
        RouterSpec(num_experts=6, top_k=1, score="sigmoid", weights_on_input=True),
        ExpertForm(bias=True),
    ),
    "scaled weights on the input": (
        RouterSpec(
            num_experts=6, top_k=1, score="sigmoid", weights_on_input=True, expert_scale=True
        ),
        ExpertForm(bias=True),
    ),
}
POLICIES = [
    {"policy": "none"},
    {"policy": "token_drop", "factor": "0.6"},
    {"policy": "token_drop", "factor": "0.6", "renormalize": True},
    {"policy": "expanded_drop", "factor": "0.6"},
]


def weights_of(spec: MoESpec) -> dict[str, torch.Tensor]:
    """Every weight of the layer, of all experts."""
    form, router = spec.experts, spec.router
    inner, width, experts = form.parts * FFN, spec.width, router.num_experts
    shapes = {
        "gate": (experts, HIDDEN),
        "w13": (experts, inner, width),
        "w2": (experts, width, FFN),
        "b13": (experts, inner),
        "b2": (experts, width),
        "down": (width, HIDDEN),
        "up": (HIDDEN, width),
    }
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("w13", "w2", "down", "up"):
        made[name] *= 0.4
    made["gate"][0] += 0.6  # with tokens of positive mean, expert 0 is hot
    return made


@dataclass(frozen=True)
class Result:
    """One call of a layer."""

    out: torch.Tensor
    drops: LayerDrops
    may_share: bool  # whether a step of very many tokens sends one row for several experts


def policies_of(router: RouterSpec) -> list[dict]:
    return POLICIES[:3] if router.weights_on_input else POLICIES


def run_cases(rank: int, counts: list[int]) -> dict[tuple[str, bool], list[Result]]:
    """What every case's layer does under each policy, with and without partial sums."""
    topology, outs = bootstrap.start(Config(model=ModelConfig(path="unused"))), {}
    for name, (router, form) in CASES.items():
        for sums in (False, True):
            moe = MoEConfig(dispatch=DispatchConfig(partial_sums=sums))
            config = Config(model=ModelConfig(path="unused"), moe=moe)
            outs[name, sums] = run_layer(
                topology, config, counts, router, form, policies_of(router)
            )
    bootstrap.stop(topology)
    return outs


def refuse_expansion(rank: int) -> str:
    config = Config(model=ModelConfig(path="unused"))
    topology = bootstrap.start(config)
    with pytest.raises(ValueError) as error:
        run_layer(topology, config, [3], *CASES["weights on the input"], POLICIES[3:])
    bootstrap.stop(topology)
    return str(error.value)


def run_layer(
    topology: Topology,
    config: Config,
    counts: list[int],
    router: RouterSpec,
    form: ExpertForm,
    policies: list[dict],
) -> list[Result]:
    spec = MoESpec(router=router, hidden=HIDDEN, ffn=FFN, experts=form)
    layer = MoELayer(
        spec, layer=3, topology=topology, config=config.moe, device=topology.device,
        dtype=torch.float32,
    )  # fmt: skip
    made = weights_of(spec)
    layer.gate.weight_ED.copy_(made["gate"])
    if layer.gate.expert_scale_E is not None:
        layer.gate.expert_scale_E.copy_(expert_scale_of(router.num_experts))
    for local, expert in enumerate(layer.local_experts):
        own = [*layer.experts.weights_of(local), *(layer.experts.biases_of(local) or ())]
        for name, weight in zip(("w13", "w2", "b13", "b2"), own, strict=False):
            weight.copy_(made[name][expert])
    for name, weight in zip(("down", "up"), layer.rows.parameters(), strict=False):
        weight.copy_(made[name])
    layer.finalize_weights()
    outs = []
    for policy in policies:
        layer.set_capacity(CapacityConfig(**policy))
        x = tokens_of(topology.data_rank, counts[topology.data_rank])
        out = layer(x, step_of(topology, counts, 1))
        may_share = layer.layout_policy.choose(10**9).deduplicates
        outs.append(Result(out, layer.drops.read_and_reset(), may_share))
    return outs


def expected(
    counts: list[int], router: RouterSpec, form: ExpertForm, policy: dict
) -> list[tuple[torch.Tensor, float, float]]:
    """Every rank's output in float64: what the reference keeps, token by token; and the sums of the
    router's weights before and after capacity.
    """
    spec = MoESpec(router=router, hidden=HIDDEN, ffn=FFN, experts=form)
    made, inputs, tokens, world = weights_of(spec), [], [], len(counts)
    for rank, count in enumerate(counts):
        x = tokens_of(rank, count)
        tokens.append(x.double())
        routing = route(gate_logits(x, made["gate"], router), router)
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
    scales = expert_scale_of(router.num_experts).tolist() if router.expert_scale else None
    bounds = [expert_range(router.num_experts, world, rank)[0] for rank in range(world)]
    outcome = reference.decide(
        inputs,
        reference.Rules(**policy, layer=3),
        reference.Family(normalize=router.normalize, expert_scale=scales),
        [*bounds, router.num_experts],
        router.num_experts,
        router.top_k,
    )
    double = {name: weight.double() for name, weight in made.items()}
    outs = []
    for x, given, decided in zip(tokens, inputs, outcome.ranks, strict=True):
        out = torch.zeros_like(x)
        for t, weights in enumerate(decided.weights):
            row = x[t] if form.latent is None else double["down"] @ x[t]
            total = torch.zeros_like(row)
            for expert, weight in weights.items():
                sent = weight * row if router.weights_on_input else row
                hidden = double["w13"][expert] @ sent + form.bias * double["b13"][expert]
                made_row = double["w2"][expert] @ activated(hidden, form)
                made_row += form.bias * double["b2"][expert]
                total += made_row if router.weights_on_input else weight * made_row
            out[t] = total if form.latent is None else double["up"] @ total
        kept = given.weights[decided.keep].sum()
        outs.append((out, float(given.weights.sum()), float(kept)))
    return outs


@pytest.mark.parametrize("counts", [[17], [9, 8], [7, 0, 10]])
def test_ranks_compute_what_the_definition_says_of_what_is_kept(counts):
    results = run_ranks(run_cases, len(counts), counts)
    for name, (router, form) in CASES.items():
        for index, policy in enumerate(policies_of(router)):
            outs = expected(counts, router, form, policy)
            for rank, result in enumerate(results):
                out, mass, mass_kept = outs[rank]
                for sums in (False, True):
                    found = result[name, sums][index]
                    torch.testing.assert_close(found.out.double(), out, atol=2e-5, rtol=1e-4)
                    assert found.drops.mass == pytest.approx(mass, rel=1e-5)
                    assert found.drops.mass_kept == pytest.approx(mass_kept, rel=1e-5)


def test_a_row_that_bears_a_weight_is_never_sent_for_two_experts():
    for result in run_ranks(run_cases, 2, [9, 8]):
        for (name, _), of_policies in result.items():
            may_share = "weights on the input" not in name
            assert all(each.may_share == may_share for each in of_policies), name


def test_expansion_is_refused_where_weights_multiply_the_input():
    (text,) = run_ranks(refuse_expansion, 1)
    assert "multiply the experts' input" in text


def test_weights_on_the_input_are_refused_for_more_than_one_expert_per_token():
    with pytest.raises(ValueError, match="num_experts_per_tok: 2 is not supported, only 1"):
        RouterSpec(num_experts=4, top_k=2, weights_on_input=True)
