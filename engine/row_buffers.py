"""Row buffers of the MoE layers: as large as capacity lets rows become, made before a run."""

from __future__ import annotations

from engine.config import Config
from engine.distributed.groups import Topology
from engine.memory import MoEShape, row_bound
from engine.models.decoder import CausalLM


def reserve_rows(model: CausalLM, config: Config, topology: Topology) -> int:
    """Make the row buffers where a capacity policy bounds them; return the bytes that the layers'
    activations may still take.
    """
    if not model.moe_layers:
        return 0
    layer, capacity = model.moe_layers[0], config.moe.capacity
    shape = MoEShape(
        num_ranks=topology.expert.size,
        top_k=layer.spec.router.top_k,
        num_experts=layer.spec.router.num_experts,
        num_local_experts=layer.num_local_experts,
        hidden=layer.spec.hidden,
        ffn=layer.spec.ffn,
    )
    limits = config.scheduler
    bound = row_bound(shape, capacity, limits.max_batch_tokens, limits.max_sequences)
    dtype = model.embedding_VD.dtype
    needed = bound.activation_bytes(shape, dtype)
    if capacity.policy == "none":
        return needed
    layer.reserve(bound.sent, bound.received)
    return needed - model.workspace.num_bytes
