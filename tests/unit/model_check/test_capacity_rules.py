"""What capacity can do for a router: the engine's own answers, on models that no family has.

Run: pytest tests/unit/model_check/test_capacity_rules.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.model_check.capacity_rules import capacity_of
from engine.models.registry import read_spec
from engine.models.spec import ModelSpec, SparseSpec
from engine.moe.expert_form import ExpertForm
from tests.helpers.model_cases import CASES


def spec_of(case: str, form: ExpertForm | None = None, **router: Any) -> ModelSpec:
    """The model of a case with another router or other experts."""
    spec, layers = read_spec(CASES[case].config()), []
    for layer in spec.layers:
        if isinstance(mlp := layer.mlp, SparseSpec):
            moe = replace(mlp.moe, router=replace(mlp.moe.router, **router))
            moe = moe if form is None else replace(moe, experts=form)
            layer = replace(layer, mlp=replace(mlp, moe=moe))
        layers.append(layer)
    return replace(spec, layers=tuple(layers))


def test_what_the_engine_refuses_for_weights_on_the_input_is_told():
    found = capacity_of(spec_of("qwen2-moe", top_k=1, weights_on_input=True), 2)
    assert found is not None and found["token_drop"] == "yes"
    assert found["expanded_drop"].startswith("no: moe.capacity.policy = expanded_drop: this model")
    assert found["shared_expert"].startswith("no: moe.shared_expert = balanced: this model's")
    plain = capacity_of(spec_of("qwen2-moe"), 2)
    assert plain is not None
    assert plain["expanded_drop"].startswith("yes") and plain["shared_expert"].startswith("yes")


def test_a_router_that_gives_combine_weights_alone_is_told():
    found = capacity_of(spec_of("mixtral", external="model_type 'x'", scores_known=False), 2)
    assert found is not None and found["token_drop"] == "yes"
    assert found["priority"].startswith("the combine weight")
    assert "the router of model_type 'x' gives the combine weights" in found["expanded_drop"]
    known = capacity_of(spec_of("mixtral", external="model_type 'x'"), 2)
    assert known is not None
    assert known["priority"].startswith("softmax over") and known["expanded_drop"].startswith("yes")


def test_with_one_expert_per_token_renormalize_is_said_to_have_no_effect():
    one, two = (capacity_of(spec_of("qwen2-moe", top_k=top_k), 2) for top_k in (1, 2))
    assert one is not None and one["renormalize"].startswith("no effect: ")
    assert two is not None and two["renormalize"] == "yes"


def test_a_shared_expert_beside_latent_ones_is_not_balanced():
    found = capacity_of(spec_of("qwen2-moe", form=ExpertForm(latent=16)), 2)
    assert found is not None and found["shared_expert"].startswith("no: ")


def test_one_layer_that_chooses_all_experts_rules_out_extras():
    spec = spec_of("mixtral")
    every = spec_of("mixtral", top_k=spec.layers[0].mlp.moe.router.num_experts)  # type: ignore[union-attr]
    mixed = replace(spec, layers=(spec.layers[0], every.layers[1]))
    found = capacity_of(mixed, 2)
    assert found is not None and "already chooses all" in found["expanded_drop"]


def test_the_router_score_is_told_with_what_it_includes_and_leaves_out():
    found = capacity_of(spec_of("gpt-oss"), 1)
    assert found is not None and "the gate's bias included" in found["priority"]
    assert found["copies"] == "no: one rank has all experts"
    router = {"logit_cap": 30.0, "expert_scale": True, "correction_bias": True, "scale": 2.5}
    found = capacity_of(spec_of("mixtral", **router), 2)
    assert found is not None
    assert found["priority"].endswith(
        "logits capped at 30; without correction bias, normalisation over the top-k, scale of 2.5, "
        "scales of single experts"
    )
    assert found["copies"].startswith("yes, in the model's precision, int8 or int4; ")
