"""What is measured on CUDA before the model is built, because it follows from the machine.

The ranks of an expert-parallel group agree on every choice. On the CPU nothing is measured.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.config import Config
from engine.distributed.collectives import GroupCollectives
from engine.distributed.groups import Topology, expert_range
from engine.distributed.link import measure_link
from engine.models.spec import ModelSpec, SparseSpec
from engine.moe.experts_trial import TrialShape, faster_backend
from engine.moe.spec import MoESpec


def measured_at_start(
    config: Config, spec: ModelSpec, topology: Topology, dtype: torch.dtype
) -> tuple[Config, Topology]:
    """Return what to build the model with: the config, with moe.experts.backend `auto` replaced
    where `te` is faster, and the topology, with the expert-parallel group's link.

    Collective over EP on CUDA: every rank must call.
    """
    sparse = [layer.mlp.moe for layer in spec.layers if isinstance(layer.mlp, SparseSpec)]
    group = topology.expert
    # More ranks than experts: refused when the model is built.
    if topology.device.type != "cuda" or not sparse or group.size > sparse[0].router.num_experts:
        return config, topology
    link = measure_link(group, topology.control, topology.device)
    config = _with_faster_backend(config, sparse[0], topology, dtype)
    return config, replace(topology, expert=replace(group, link=link))


def _with_faster_backend(
    config: Config, moe: MoESpec, topology: Topology, dtype: torch.dtype
) -> Config:
    if config.moe.experts.backend != "auto":
        return config
    group = topology.expert
    shape = TrialShape(
        num_local=expert_range(moe.router.num_experts, group.size, group.rank)[1],
        hidden=moe.width,
        ffn=moe.ffn,
        rows=config.scheduler.max_sequences * moe.router.top_k,
    )
    faster = faster_backend(shape, topology.device, dtype, GroupCollectives(topology.control))
    if faster is None:
        return config
    experts = replace(config.moe.experts, backend=faster)
    return replace(config, moe=replace(config.moe, experts=experts))
