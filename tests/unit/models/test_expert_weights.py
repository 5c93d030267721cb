"""Which checkpoint tensors fill the experts of a rank, in every layout.

Run: python -m pytest tests/unit/models/test_expert_weights.py
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from engine.models.expert_weights import moe_slots
from engine.models.spec import MoENames
from engine.moe.expert_form import ExpertForm
from engine.moe.expert_rows import ExpertRows
from engine.moe.gate import Gate
from engine.moe.local_experts import LocalExperts
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec
from engine.weights.loader import CheckpointError, load_weights
from tests.helpers import packers
from tests.helpers.packers import CONFIGS, Tensors, slow_mxfp4

EXPERTS, HIDDEN, FFN = 5, 64, 32  # 2F = D: a transposed matrix has the shape of the other
LOCAL = [1, 2, 4]  # two runs
GPT_OSS = ExpertForm(activation="gpt_oss", bias=True, limit=7.0)
PREFIX = "model.layers.0.mlp.experts"


def layer_of(form: ExpertForm) -> Any:
    """What `moe_slots` reads of a layer that has three of five experts."""
    device, dtype = torch.device("cpu"), torch.float32
    router = RouterSpec(num_experts=EXPERTS, top_k=2)
    spec = MoESpec(router=router, hidden=HIDDEN, ffn=FFN, experts=form)
    experts = LocalExperts(
        3, 0, "model", hidden=spec.width, ffn=FFN, backend="torch", device=device, dtype=dtype,
        form=form,
    )  # fmt: skip
    rows = ExpertRows(HIDDEN, form.latent, False, device, dtype)
    for weight in (*experts.stacked.tensors, *rows.parameters()):
        weight.fill_(torch.nan)
    return SimpleNamespace(
        spec=spec,
        experts=experts,
        rows=rows,
        local_experts=LOCAL,
        gate=Gate(router, HIDDEN, device, dtype),
        shared=None,
    )


def load(folder, form: ExpertForm, tensors: Tensors, names=None, config=None):
    layer = layer_of(form)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors"
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    every = list(moe_slots(cast(Any, layer), "model.layers.0", names or MoENames(), tensors))
    slots = [slot for slot in every if ".experts." in slot.name]
    slots += [slot for slot in every if "_latent_" in slot.name]
    load_weights(folder, slots, ignored=[r"experts\.[03]\."])
    return layer


def drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, generator=generator)


def biases() -> Tensors:
    return {
        f"{PREFIX}.gate_up_proj_bias": drawn(EXPERTS, 2 * FFN),
        f"{PREFIX}.down_proj_bias": drawn(EXPERTS, HIDDEN),
    }


def apart(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """Gate before up, of rows that alternate."""
    gate, up = rows.unflatten(dim, (FFN, 2)).unbind(dim + 1)
    return torch.cat((gate, up), dim)


def assert_biases_are_apart(weights, tensors: Tensors) -> None:
    assert torch.equal(weights.b13_e2F, apart(tensors[f"{PREFIX}.gate_up_proj_bias"], 1)[LOCAL])
    assert torch.equal(weights.b2_eD, tensors[f"{PREFIX}.down_proj_bias"][LOCAL])


def test_gpt_oss_unquantised_is_turned_and_its_rows_parted(tmp_path):
    tensors = biases() | {
        f"{PREFIX}.gate_up_proj": drawn(EXPERTS, HIDDEN, 2 * FFN),
        f"{PREFIX}.down_proj": drawn(EXPERTS, FFN, HIDDEN),
    }
    weights = load(tmp_path, GPT_OSS, tensors, MoENames(alternating=True)).experts.stacked
    expected = apart(tensors[f"{PREFIX}.gate_up_proj"].mT, 1)[LOCAL]
    assert torch.equal(weights.w13_e2FD, expected)
    assert torch.equal(weights.w2_eDF, tensors[f"{PREFIX}.down_proj"].mT[LOCAL])
    assert_biases_are_apart(weights, tensors)


def test_gpt_oss_in_mxfp4_has_its_rows_parted(tmp_path):
    generator = torch.Generator().manual_seed(0)
    stored = {
        "gate_up_proj": packers.mxfp4(drawn(EXPERTS, 2 * FFN, HIDDEN), generator),
        "down_proj": packers.mxfp4(drawn(EXPERTS, HIDDEN, FFN), generator),
    }
    tensors = biases() | {
        f"{PREFIX}.{name}{suffix}": value
        for name, parts in stored.items()
        for suffix, value in parts.items()
    }
    names = MoENames(alternating=True)
    weights = load(tmp_path, GPT_OSS, tensors, names, CONFIGS["mxfp4"]).experts.stacked
    expected = apart(slow_mxfp4(stored["gate_up_proj"]), 1)[LOCAL]
    assert torch.equal(weights.w13_e2FD, expected)
    assert torch.equal(weights.w2_eDF, slow_mxfp4(stored["down_proj"])[LOCAL])
    assert_biases_are_apart(weights, tensors)


def test_llama4s_stacked_experts_are_turned(tmp_path):
    tensors = {
        f"{PREFIX}.gate_up_proj": drawn(EXPERTS, HIDDEN, 2 * FFN),
        f"{PREFIX}.down_proj": drawn(EXPERTS, FFN, HIDDEN),
    }
    weights = load(tmp_path, ExpertForm(), tensors, MoENames(transposed=True)).experts.stacked
    assert torch.equal(weights.w13_e2FD, tensors[f"{PREFIX}.gate_up_proj"].mT[LOCAL])
    assert torch.equal(weights.w2_eDF, tensors[f"{PREFIX}.down_proj"].mT[LOCAL])


def test_turned_experts_have_biases_that_are_as_they_were(tmp_path):
    tensors = biases() | {
        f"{PREFIX}.gate_up_proj": drawn(EXPERTS, HIDDEN, 2 * FFN),
        f"{PREFIX}.down_proj": drawn(EXPERTS, FFN, HIDDEN),
    }
    form, names = ExpertForm(bias=True), MoENames(transposed=True)
    weights = load(tmp_path, form, tensors, names).experts.stacked
    assert torch.equal(weights.w13_e2FD, tensors[f"{PREFIX}.gate_up_proj"].mT[LOCAL])
    assert torch.equal(weights.b13_e2F, tensors[f"{PREFIX}.gate_up_proj_bias"][LOCAL])
    assert torch.equal(weights.b2_eD, tensors[f"{PREFIX}.down_proj_bias"][LOCAL])


def test_llama4s_experts_one_by_one_are_as_any_others(tmp_path):
    parts = {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}
    tensors = {
        f"{PREFIX}.{e}.{name}.weight": drawn(*shape) + e
        for e in range(EXPERTS)
        for name, shape in parts.items()
    }
    weights = load(tmp_path, ExpertForm(), tensors, MoENames(transposed=True)).experts.stacked
    for local, e in enumerate(LOCAL):
        gate, up, down = (tensors[f"{PREFIX}.{e}.{name}.weight"] for name in parts)
        assert torch.equal(weights.w13_e2FD[local], torch.cat((gate, up)))
        assert torch.equal(weights.w2_eDF[local], down)


def test_gpt_oss_of_another_width_is_refused_with_the_shape_of_its_layout(tmp_path):
    tensors = biases() | {
        f"{PREFIX}.gate_up_proj": drawn(EXPERTS, HIDDEN, 2 * FFN),
        f"{PREFIX}.down_proj": drawn(EXPERTS, HIDDEN, FFN),
    }
    with pytest.raises(
        CheckpointError, match=rf"down_proj .* must be \[{EXPERTS}, {FFN}, {HIDDEN}"
    ):
        load(tmp_path, GPT_OSS, tensors, MoENames(alternating=True))


def test_stacked_experts_have_stacked_biases(tmp_path):
    tensors = biases() | {
        f"{PREFIX}.gate_up_proj": drawn(EXPERTS, 2 * FFN, HIDDEN),
        f"{PREFIX}.down_proj": drawn(EXPERTS, HIDDEN, FFN),
    }
    weights = load(tmp_path, ExpertForm(bias=True), tensors).experts.stacked
    for weight, (_, stored) in zip(weights.tensors[2:], biases().items(), strict=True):
        assert torch.equal(weight, stored[LOCAL])
    assert torch.equal(weights.w13_e2FD, tensors[f"{PREFIX}.gate_up_proj"][LOCAL])


@pytest.mark.parametrize("gated", [True, False])
def test_single_experts_have_a_bias_per_projection(tmp_path, gated):
    shapes = {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}
    if not gated:
        del shapes["gate_proj"]
    tensors = {}
    for expert in range(EXPERTS):
        for name, shape in shapes.items():
            shift = len(tensors)
            tensors[f"{PREFIX}.{expert}.{name}.weight"] = drawn(*shape) + shift
            tensors[f"{PREFIX}.{expert}.{name}.bias"] = drawn(shape[0]) + shift
    weights = load(tmp_path, ExpertForm(gated=gated, bias=True), tensors).experts.stacked
    for local, expert in enumerate(LOCAL):
        for kind, (w13, w2) in {
            "weight": (weights.w13_e2FD, weights.w2_eDF),
            "bias": (weights.b13_e2F, weights.b2_eD),
        }.items():
            *inner, down = (tensors[f"{PREFIX}.{expert}.{name}.{kind}"] for name in shapes)
            assert torch.equal(w13[local], torch.cat(inner))
            assert torch.equal(w2[local], down)


def test_latent_experts_have_matrices_of_the_latent_width_and_two_projections(tmp_path):
    form = ExpertForm(activation="relu2", gated=False, latent=16)
    block = PREFIX.removesuffix(".experts")
    tensors = {
        f"{PREFIX}.up_proj": drawn(EXPERTS, FFN, 16),
        f"{PREFIX}.down_proj": drawn(EXPERTS, 16, FFN),
        f"{block}.fc1_latent_proj.weight": drawn(16, HIDDEN),
        f"{block}.fc2_latent_proj.weight": drawn(HIDDEN, 16),
    }
    layer = load(tmp_path, form, tensors)
    found = (layer.experts.stacked.w13_e2FD, layer.experts.stacked.w2_eDF)
    for weight, stored in zip(found, tensors.values(), strict=False):
        assert torch.equal(weight, stored[LOCAL])
    assert torch.equal(layer.rows.down_LD, tensors[f"{block}.fc1_latent_proj.weight"])
    assert torch.equal(layer.rows.up_DL, tensors[f"{block}.fc2_latent_proj.weight"])
