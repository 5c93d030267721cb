"""Figures: costs that follow from what a device is said to do, for a model's shape. Not measured.

Every phase takes the longer of its bytes and its operations; the shares of the published rates that
are reached, and what a launch and a collective cost, are assumptions in the device file.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.simulate.cost_model import CostModel, ExpertLine, Hop, Line
from engine.simulate.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a device does; the field names are the keys of a device file's `figures`."""

    memory_gib: float  # that a driver leaves
    memory_bytes_per_s: float
    flops_per_s: float  # dense 16-bit products
    link_bytes_per_s: float  # per direction, to GPUs of the same node
    network_bytes_per_s: float  # per direction, to other nodes
    memory_share: float  # of the published rate that is reached
    product_share: float
    link_share: float
    network_share: float
    collective_s: float  # of a collective within a node, beyond its bytes
    network_collective_s: float  # of one that leaves it
    launch_s: float  # of the host, per kernel
    sync_s: float  # of a host wait
    launches_per_layer: float
    step_s: float  # of a step beside its layers


def cost_model(name: str, figures: Figures, shape: Shape, context: int) -> CostModel:
    """Return the costs of a model on an assumed device.

    Args:
        name: of the device.
        figures: of the device.
        shape: of the model.
        context: keys that a token attends to, the mean.
    """
    memory = figures.memory_bytes_per_s * figures.memory_share
    products = figures.flops_per_s * figures.product_share
    link = figures.link_bytes_per_s * figures.link_share
    network = figures.network_bytes_per_s * figures.network_share
    item, row_bytes = shape.weight_bytes, shape.hidden * shape.activation_bytes
    expert_flops = 2 * shape.matrices * shape.hidden * shape.ffn
    # Read and written by the products, gathered and regrouped.
    moved = row_bytes * 4 + 2 * shape.matrices * shape.ffn * shape.activation_bytes
    per_row = expert_flops / products + moved / memory
    read = shape.expert_weights * item / memory
    attention = 2 * shape.attention_weights + 4 * shape.hidden * context
    hop = Hop(alpha=figures.collective_s, beta=1 / link)
    return CostModel(
        name=name,
        attention=Line(
            fixed=shape.attention_weights * item / memory, per_token=attention / products
        ),
        gate=Line(per_token=2 * shape.hidden * shape.num_experts / products),
        plan=Line(per_token=(1 + shape.top_k) * row_bytes * 2 / memory),
        experts=ExpertLine(least=figures.launch_s, per_row=per_row, read_rows=read / per_row),
        consensus=hop,
        dispatch=hop,
        combine=hop,
        network=Hop(alpha=figures.network_collective_s, beta=1 / network),
        step=Line(fixed=figures.step_s),
        host=figures.launches_per_layer * figures.launch_s + figures.sync_s,
    )
