"""The slots of one MoE layer's router. Run: pytest tests/unit/models/test_router_slots.py"""

from __future__ import annotations

from typing import Any, cast

import torch

from engine.config import MoEConfig
from engine.distributed.groups import Group, Topology
from engine.models.expert_weights import moe_slots
from engine.models.spec import MoENames
from engine.moe.layer import MoELayer
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec
from engine.weights.slot import WeightSlot

EXPERTS, HIDDEN = 6, 8


def router_slots(names: MoENames, **fields: Any) -> tuple[MoELayer, dict[str, WeightSlot]]:
    """A layer on one rank, and its slots outside the experts."""
    one, cpu = Group(0, 1, (0,), cast(Any, None)), torch.device("cpu")
    topology = Topology(
        world=one, expert=one, tensor=one, control=one, counts=one, host_world=one, host_tensor=one,
        data_rank=0, num_data=1, replica=0, device=cpu, store=cast(Any, None), local_world_size=1,
        host="here",
    )  # fmt: skip
    router = RouterSpec(num_experts=EXPERTS, top_k=2, **fields)
    layer = MoELayer(
        MoESpec(router=router, hidden=HIDDEN, ffn=4),
        layer=0,
        topology=topology,
        config=MoEConfig(),
        device=cpu,
        dtype=torch.float32,
    )
    slots = moe_slots(layer, "model.layers.0", names, ())
    return layer, {slot.name: slot for slot in slots if ".experts." not in slot.name}


def test_a_family_names_its_gate_whose_bias_is_beside_the_weight():
    layer, slots = router_slots(MoENames(gate="router"), logit_bias=True)
    assert list(slots) == ["model.layers.0.mlp.router.weight", "model.layers.0.mlp.router.bias"]
    bias = slots["model.layers.0.mlp.router.bias"]
    assert bias.target is layer.gate.logit_bias_E
    assert (bias.full_shape, bias.kind) == ((EXPERTS,), "bias")


def test_the_scales_of_experts_are_float32_below_the_block():
    layer, slots = router_slots(MoENames(expert_scale="router.per_expert_scale"), expert_scale=True)
    scale = slots["model.layers.0.mlp.router.per_expert_scale"]
    assert scale.target is layer.gate.expert_scale_E and scale.target.dtype == torch.float32
    assert scale.full_shape == (EXPERTS,)


def test_a_table_of_token_ids_is_below_the_block_and_holds_experts():
    layer, slots = router_slots(MoENames(block="ffn"), token_table=11)
    table = slots["model.layers.0.ffn.gate.tid2eid"]
    assert table.target is layer.gate.table_VK and table.target.dtype == torch.int64
    assert (table.full_shape, table.kind, table.ids_below) == ((11, 2), "ids", EXPERTS)
    assert table.aliases == ("model.layers.0.mlp.gate.tid2eid",)


def test_without_a_logit_bias_the_gate_is_its_weight_alone():
    layer, slots = router_slots(MoENames())
    assert list(slots) == ["model.layers.0.mlp.gate.weight"]
    assert layer.gate.logit_bias_E is None
