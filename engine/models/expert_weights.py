"""Expert weights: which checkpoint tensors fill an MoE layer, as `WeightSlot`s.

Two layouts occur: one matrix per expert and projection (every published checkpoint, and what
save_pretrained writes), or all experts of a layer stacked in two tensors (transformers' layout in
memory). Slots exist only for the experts of this rank.

Legend: E experts, e experts on this rank, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from engine.layers.mlp import DenseMLP
from engine.models.spec import MoENames
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
    gate, alias = f"{block}.gate.weight", f"{prefix}.mlp.gate.weight"
    aliases = () if alias == gate else (alias,)
    yield WeightSlot(gate, moe.gate_weight_ED, (num_experts, hidden), aliases=aliases)
    if moe.gate_bias_E is not None:
        name = f"{block}.gate.e_score_correction_bias"
        yield WeightSlot(name, moe.gate_bias_E, (num_experts,), kind="bias")
    if f"{prefix}.mlp.experts.gate_up_proj" in checkpoint:
        yield from _stacked_slots(moe, f"{prefix}.mlp.experts")
    else:
        yield from _single_slots(moe, f"{block}.experts", names)
    if isinstance(moe.shared, DenseMLP):
        yield from moe.shared.weight_slots(
            f"{block}.{names.shared}", output_gate=f"{block}.{names.shared}_gate.weight"
        )


def _single_slots(moe: MoELayer, prefix: str, names: MoENames) -> Iterator[WeightSlot]:
    """Yield three slots per local expert; gate and up are views into one stacked tensor."""
    hidden, ffn = moe.spec.hidden, moe.spec.ffn
    w13_e2FD, w2_eDF = moe.experts.w13_e2FD, moe.experts.w2_eDF
    for local in range(moe.num_local_experts):
        name = f"{prefix}.{moe.first_expert + local}"
        w1, w3 = w13_e2FD[local, :ffn], w13_e2FD[local, ffn:]
        yield WeightSlot(f"{name}.{names.w1}.weight", w1, (ffn, hidden))
        yield WeightSlot(f"{name}.{names.w3}.weight", w3, (ffn, hidden))
        yield WeightSlot(f"{name}.{names.w2}.weight", w2_eDF[local], (hidden, ffn))


def _stacked_slots(moe: MoELayer, prefix: str) -> Iterator[WeightSlot]:
    """Yield two slots, each this rank's range of a tensor that stacks all experts."""
    num_experts, hidden, ffn = moe.spec.router.num_experts, moe.spec.hidden, moe.spec.ffn
    mine = slice(moe.first_expert, moe.first_expert + moe.num_local_experts)
    for name, target, rows, columns in (
        ("gate_up_proj", moe.experts.w13_e2FD, 2 * ffn, hidden),
        ("down_proj", moe.experts.w2_eDF, hidden, ffn),
    ):
        yield WeightSlot(f"{prefix}.{name}", target, (num_experts, rows, columns), (mine,))
