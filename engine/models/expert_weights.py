"""Expert weights: which checkpoint tensors fill an MoE layer, as `WeightSlot`s.

Two layouts occur: one matrix per expert and projection (every published checkpoint, and what
save_pretrained writes), or all experts of a layer stacked in two tensors (transformers' layout in
memory). Slots exist only for the experts of this rank, homes and copies.

Legend: E experts, e experts on this rank, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from engine.layers.mlp import DenseMLP
from engine.models.spec import MoENames
from engine.moe.experts import ExpertWeights
from engine.moe.layer import MoELayer
from engine.weights.slot import WeightSlot


def moe_slots(
    moe: MoELayer, prefix: str, names: MoENames, checkpoint: Collection[str]
) -> Iterator[WeightSlot]:
    """Yield the slots of one MoE layer.

    Args:
        prefix: the decoder layer's name, as in model.layers.0.
        names: the family's names below it.
        checkpoint: names of the tensors in the checkpoint; empty when there is none.
    """
    spec, block = moe.spec, f"{prefix}.{names.block}"
    num_experts, hidden = spec.router.num_experts, spec.hidden
    gate, alias = f"{block}.{names.gate}.weight", f"{prefix}.mlp.gate.weight"
    aliases = () if alias == gate else (alias,)
    yield WeightSlot(gate, moe.gate_weight_ED, (num_experts, hidden), aliases=aliases)
    if moe.logit_bias_E is not None:
        name = f"{block}.{names.gate}.bias"
        yield WeightSlot(name, moe.logit_bias_E, (num_experts,), kind="bias")
    if moe.expert_scale_E is not None:
        name = f"{block}.{names.expert_scale}"
        yield WeightSlot(name, moe.expert_scale_E, (num_experts,), kind="norm")
    if moe.gate_bias_E is not None:
        name, alias = f"{block}.{names.bias}", f"{prefix}.mlp.{names.bias}"
        aliases = () if alias == name else (alias,)
        bias = moe.gate_bias_E if names.bias_rows is None else moe.gate_bias_E.unsqueeze(0)
        yield WeightSlot(name, bias, tuple(bias.shape), kind="bias", aliases=aliases)
    if f"{prefix}.mlp.experts.gate_up_proj" in checkpoint:
        yield from _stacked_slots(moe, f"{prefix}.mlp.experts")
    else:
        yield from _single_slots(moe, f"{block}.experts", names)
    if isinstance(moe.shared, DenseMLP):
        yield from moe.shared.weight_slots(
            f"{block}.{names.shared}", output_gate=f"{block}.{names.shared}_gate.weight"
        )


def _single_slots(moe: MoELayer, prefix: str, names: MoENames) -> Iterator[WeightSlot]:
    """Yield three slots per instance; gate and up are views into one stacked tensor."""
    hidden, ffn = moe.spec.hidden, moe.spec.ffn
    for local, expert in enumerate(moe.local_experts):
        name = f"{prefix}.{expert}"
        w13_2FD, w2_DF = moe.experts.weights_of(local)
        yield WeightSlot(f"{name}.{names.w1}.weight", w13_2FD[:ffn], (ffn, hidden))
        yield WeightSlot(f"{name}.{names.w3}.weight", w13_2FD[ffn:], (ffn, hidden))
        yield WeightSlot(f"{name}.{names.w2}.weight", w2_DF, (hidden, ffn))


def _stacked_slots(moe: MoELayer, prefix: str) -> Iterator[WeightSlot]:
    """Yield two slots per run of instances, each a range of a tensor that stacks all experts."""
    num_experts, hidden, ffn = moe.spec.router.num_experts, moe.spec.hidden, moe.spec.ffn
    for weights, start, run in _runs(moe):
        mine, own = slice(run[0], run[-1] + 1), slice(start, start + len(run))
        for name, target, rows, columns in (
            ("gate_up_proj", weights.w13_e2FD, 2 * ffn, hidden),
            ("down_proj", weights.w2_eDF, hidden, ffn),
        ):
            full_shape = (num_experts, rows, columns)
            yield WeightSlot(f"{prefix}.{name}", target[own], full_shape, (mine,))


def _runs(moe: MoELayer) -> Iterator[tuple[ExpertWeights, int, list[int]]]:
    """Yield the runs of consecutive experts among this rank's instances: the weights that they are
    stacked in, where the run begins there, and its experts.
    """
    experts = moe.experts
    for weights, held in (
        (experts.stacked, moe.local_experts[: experts.num_stacked]),
        (experts.loading, moe.local_experts[experts.num_stacked :]),
    ):
        start = 0
        for end in range(1, len(held) + 1):
            if end == len(held) or held[end] != held[end - 1] + 1:
                assert weights is not None
                yield weights, start, held[start:end]
                start = end
