"""What is measured on CUDA before the model is built, because it follows from the machine.

The ranks of an expert-parallel group agree on every choice. On the CPU nothing is measured.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.config import Config
from engine.distributed.collectives import GroupCollectives
from engine.distributed.groups import Topology, expert_range
from engine.models.spec import ModelSpec, SparseSpec
from engine.moe.experts_trial import TrialShape, faster_backend


def measured_at_start(
    config: Config, spec: ModelSpec, topology: Topology, dtype: torch.dtype
) -> Config:
    """Return the config with moe.experts.backend `auto` replaced where `te` is faster.

    Collective over EP on CUDA: every rank must call.
    """
    sparse = [layer.mlp.moe for layer in spec.layers if isinstance(layer.mlp, SparseSpec)]
    if topology.device.type != "cuda" or not sparse or config.moe.experts.backend != "auto":
        return config
    moe, group = sparse[0], topology.expert
    num_experts = moe.router.num_experts
    if group.size > num_experts:
        return config  # refused when the model is built
    shape = TrialShape(
        num_local=expert_range(num_experts, group.size, group.rank)[1],
        hidden=moe.hidden,
        ffn=moe.ffn,
        rows=config.scheduler.max_sequences * moe.router.top_k,
    )
    faster = faster_backend(shape, topology.device, dtype, GroupCollectives(topology.control))
    if faster is None:
        return config
    experts = replace(config.moe.experts, backend=faster)
    return replace(config, moe=replace(config.moe, experts=experts))
