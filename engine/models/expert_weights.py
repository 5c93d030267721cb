"""Expert weights: which checkpoint tensors fill an MoE layer, as `WeightSlot`s.

Three layouts occur: one matrix per expert and projection (most published checkpoints, and what
save_pretrained writes), all experts of a layer stacked in two tensors (transformers' layout in
memory), or stacked as gpt-oss stores them (`MoENames.alternating`):

| tensor            | in MXFP4, as [E, outputs, inputs]  | unquantised     |
|-------------------|------------------------------------|-----------------|
| gate_up_proj      | [E, 2F, D], gate and up alternate  | [E, D, 2F]      |
| gate_up_proj_bias |                                    | [E, 2F]         |
| down_proj         | [E, D, F]                          | [E, F, D]       |
| down_proj_bias    |                                    | [E, D]          |

Slots exist only for the experts of this rank, homes and copies.

Legend: E experts, e experts on this rank, D model dim, F expert hidden dim, N 2F, without a gate F.
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
    for name, weight in zip(names.latent, moe.rows.parameters(), strict=False):
        yield WeightSlot(f"{block}.{name}.weight", weight, tuple(weight.shape))
    if names.alternating:
        yield from _alternating_slots(moe, f"{block}.experts")
    elif f"{prefix}.mlp.experts.{_first(moe)}" in checkpoint:
        yield from _stacked_slots(moe, f"{prefix}.mlp.experts")
    else:
        yield from _single_slots(moe, f"{block}.experts", names)
    if isinstance(moe.shared, DenseMLP):
        yield from moe.shared.weight_slots(
            f"{block}.{names.shared}", output_gate=f"{block}.{names.shared}_gate.weight"
        )


def _single_slots(moe: MoELayer, prefix: str, names: MoENames) -> Iterator[WeightSlot]:
    """Yield three slots per instance, without a gate two, and as many of biases; gate and up are
    views into one stacked tensor.
    """
    hidden, ffn = moe.spec.width, moe.spec.ffn
    inner = (names.w1, names.w3) if moe.spec.experts.gated else (names.w3,)
    for local, expert in enumerate(moe.local_experts):
        name = f"{prefix}.{expert}"
        w13_ND, w2_DF = moe.experts.weights_of(local)
        for each, part_FD in zip(inner, w13_ND.split(ffn), strict=True):
            yield WeightSlot(f"{name}.{each}.weight", part_FD, (ffn, hidden))
        yield WeightSlot(f"{name}.{names.w2}.weight", w2_DF, (hidden, ffn))
        if (biases := moe.experts.biases_of(local)) is not None:
            b13_N, b2_D = biases
            for each, part_F in zip(inner, b13_N.split(ffn), strict=True):
                yield WeightSlot(f"{name}.{each}.bias", part_F, (ffn,), kind="bias")
            yield WeightSlot(f"{name}.{names.w2}.bias", b2_D, (hidden,), kind="bias")


def _stacked_slots(moe: MoELayer, prefix: str) -> Iterator[WeightSlot]:
    """Yield two slots per run of instances, and two of biases, each a range of a tensor that stacks
    all experts.
    """
    num_experts = moe.spec.router.num_experts
    first = _first(moe)
    for weights, start, run in _runs(moe):
        mine, own = slice(run[0], run[-1] + 1), slice(start, start + len(run))
        for name, target in (
            (first, weights.w13_e2FD),
            ("down_proj", weights.w2_eDF),
            (f"{first}_bias", weights.b13_e2F),
            ("down_proj_bias", weights.b2_eD),
        ):
            if target is not None:
                kind = "bias" if target.dim() == 2 else "matrix"
                full_shape = (num_experts, *target.shape[1:])
                yield WeightSlot(f"{prefix}.{name}", target[own], full_shape, (mine,), kind=kind)


def _first(moe: MoELayer) -> str:
    """Return the name of the first projection of experts that are stacked."""
    return "gate_up_proj" if moe.spec.experts.gated else "up_proj"


def _alternating_slots(moe: MoELayer, prefix: str) -> Iterator[WeightSlot]:
    """Yield the slots of experts stacked as gpt-oss stores them, per run of instances.

    Targets are views of w13 [e, 2, F, D] in the order of the file's dimensions, where F comes
    before the 2 of gate and up.
    """
    num_experts, hidden, ffn = moe.spec.router.num_experts, moe.spec.width, moe.spec.ffn
    for weights, start, run in _runs(moe):
        mine, own = (slice(run[0], run[-1] + 1),), slice(start, start + len(run))
        w13_e2FD, w2_eDF = weights.w13_e2FD[own].unflatten(1, (2, ffn)), weights.w2_eDF[own]
        name = f"{prefix}.gate_up_proj"
        plain = WeightSlot(
            name,
            w13_e2FD.permute(0, 3, 2, 1),
            (num_experts, hidden, ffn, 2),
            mine,
            file_shape=(num_experts, hidden, 2 * ffn),
        )
        yield WeightSlot(
            name,
            w13_e2FD.transpose(1, 2),
            (num_experts, ffn, 2, hidden),
            mine,
            file_shape=(num_experts, 2 * ffn, hidden),
            unquantised=plain,
        )
        name = f"{prefix}.down_proj"
        plain = WeightSlot(name, w2_eDF.transpose(1, 2), (num_experts, ffn, hidden), mine)
        yield WeightSlot(name, w2_eDF, (num_experts, hidden, ffn), mine, unquantised=plain)
        if weights.b13_e2F is not None and weights.b2_eD is not None:
            yield WeightSlot(
                f"{prefix}.gate_up_proj_bias",
                weights.b13_e2F[own].unflatten(1, (2, ffn)).transpose(1, 2),
                (num_experts, ffn, 2),
                mine,
                kind="bias",
                file_shape=(num_experts, 2 * ffn),
            )
            yield WeightSlot(
                f"{prefix}.down_proj_bias",
                weights.b2_eD[own],
                (num_experts, hidden),
                mine,
                kind="bias",
            )


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
