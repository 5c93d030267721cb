"""Which tensors of a checkpoint a rank asks for, and where they go. No files, no collectives.

python -m pytest tests/models/test_weight_slots.py
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from engine.distributed.groups import Group, Topology
from engine.models.decoder import CausalLM
from engine.models.registry import build_model
from tests.helpers.model_cases import CASES
from tests.helpers.model_harness import make_config


def model_of(case: str, rank: int = 0, world: int = 1, tensor: int = 1) -> CausalLM:
    """Rank `rank` of a run that never communicates."""

    def group(index: int, size: int) -> Group:
        return Group(index, size, tuple(range(size)), cast(Any, None))

    cpu = torch.device("cpu")
    topology = Topology(
        world=group(rank, world),
        expert=group(rank, world),
        tensor=group(rank % tensor, tensor),
        control=group(rank, world),
        counts=group(rank, world),
        host_world=group(rank, world),
        host_tensor=group(rank % tensor, tensor),
        data_rank=rank // tensor,
        num_data=world // tensor,
        replica=0,
        device=cpu,
        store=cast(Any, None),
        local_world_size=world,
        host="here",
    )
    config = make_config(Path("unused"), tensor=tensor)
    return build_model(CASES[case].config(), config, topology, cpu, torch.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_slots_fill_every_parameter_once(case, tensor):
    model = model_of(case, rank=1 if tensor == 2 else 0, world=tensor, tensor=tensor)
    # A direct query projection has rows in the fused bias that stay zero and no tensor fills.
    never_filled = {
        id(parameter): parameter == 0
        for name, parameter in model.named_parameters()
        if name.endswith("down_bias_O") and model.spec.layers[0].attention.q_rank is None
    }
    for parameter in model.parameters():
        parameter.fill_(0)
    for slot in model.weight_slots():
        shape = slot.full_shape
        if slot.shard is not None:
            shape = torch.empty(shape, device="meta")[slot.shard].shape
        assert tuple(slot.target.shape) == tuple(shape), slot.name
        slot.target.add_(1)
    for name, parameter in model.named_parameters():
        if id(parameter) in never_filled:
            attention = model.layers[0].attention
            assert parameter[: attention.down_q].eq(0).all()
            assert parameter[attention.down_q :].eq(1).all()
        else:
            assert parameter.eq(1).all(), name


@pytest.mark.parametrize("case", ["mixtral-5-experts-top-1", "qwen2-moe", "deepseek-v3"])
@pytest.mark.parametrize("world", [2, 3])
def test_each_expert_is_read_by_one_rank_and_everything_else_by_all(case, world):
    readers = Counter(
        slot.name for rank in range(world) for slot in model_of(case, rank, world).weight_slots()
    )
    assert set(readers) == {slot.name for slot in model_of(case).weight_slots()}
    for name, count in readers.items():
        assert count == (1 if ".experts." in name else world), name


def test_stacked_experts_are_read_as_one_slice_a_rank():
    model = model_of("mixtral", 1, 2)
    prefix = "model.layers.1.mlp.experts"
    slots = {slot.name: slot for slot in model.weight_slots([f"{prefix}.gate_up_proj"])}
    assert slots[f"{prefix}.gate_up_proj"].full_shape == (4, 48, 32)
    shard = slots[f"{prefix}.gate_up_proj"].shard
    assert shard is not None and shard[0] == slice(2, 4)
    assert f"{prefix}.down_proj" in slots
    assert not any(name.startswith("model.layers.1.block_sparse_moe.experts") for name in slots)
    # Layer 0 was not listed as stacked.
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in slots


def is_ignored(model: CausalLM, name: str, checkpoint: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in model.ignored_weights(checkpoint))


def test_what_plain_decoding_leaves_out_is_ignored():
    names = ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.0.up_proj.weight"]
    v3 = model_of("deepseek-v3")
    assert all(is_ignored(v3, name, names) for name in names)
    assert not is_ignored(v3, "model.layers.3.mlp.gate.weight", names)
    # Without the projection of a prediction head it is a layer that config.json does not count.
    assert not is_ignored(v3, names[1], names[1:])
    assert not any(is_ignored(model_of("mixtral"), name, names) for name in names)


def test_a_tied_head_has_a_slot_where_the_checkpoint_has_both():
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for names, expected in (((), 1), ([embedding], 1), ([head], 1), ([embedding, head], 2)):
        tied = model_of("mixtral-window-head-dim-tied")
        slots = [slot for slot in tied.weight_slots(names) if slot.name in (embedding, head)]
        assert len(slots) == expected and slots[0].aliases == (head,)
        assert all(slot.target is tied.embedding_VD for slot in slots)
        assert not is_ignored(tied, head, list(names))
    assert slots[1].tied_to == embedding and slots[1].untie is not None
    assert slots[1].untie() is tied.head_VD and tied.head_VD is not tied.embedding_VD
