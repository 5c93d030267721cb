"""Expert weights: which checkpoint tensors fill an MoE layer, as `WeightSlot`s.

Four layouts occur: one matrix per expert and projection (most published checkpoints, and what
save_pretrained writes), all experts of a layer stacked in two tensors (transformers' layout in
memory), or stacked as gpt-oss stores them (`MoENames.alternating`):

| tensor            | in MXFP4, as [E, outputs, inputs]  | unquantised     |
|-------------------|------------------------------------|-----------------|
| gate_up_proj      | [E, 2F, D], gate and up alternate  | [E, D, 2F]      |
| gate_up_proj_bias |                                    | [E, 2F]         |
| down_proj         | [E, D, F]                          | [E, F, D]       |
| down_proj_bias    |                                    | [E, D]          |

Llama 4 (`MoENames.transposed`) stacks as in the last column, gate before up, without biases; what
others have quantised of it has one matrix per expert and projection.

Slots exist only for the experts of this rank, homes and copies.

Legend: E experts, e experts on this rank, D model dim, F expert hidden dim, N 2F, without a gate F.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from engine.layers.mlp import DenseMLP
from engine.models.spec import ModelSpec, MoENames, SparseSpec
from engine.moe.layer import MoELayer
from engine.moe.low_bit_experts import Matrix
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
    spec, gate, block = moe.spec, moe.gate, f"{prefix}.{names.block}"
    num_logits, hidden = spec.router.num_logits, spec.hidden
    name, alias = f"{block}.{names.gate}.weight", f"{prefix}.mlp.gate.weight"
    aliases = () if alias == name else (alias,)
    yield WeightSlot(name, gate.weight_ED, (num_logits, hidden), aliases=aliases)
    if gate.logit_bias_E is not None:
        name = f"{block}.{names.gate}.bias"
        yield WeightSlot(name, gate.logit_bias_E, (num_logits,), kind="bias")
    if gate.expert_scale_E is not None:
        name = f"{block}.{names.expert_scale}"
        yield WeightSlot(name, gate.expert_scale_E, (spec.router.num_experts,), kind="norm")
    if gate.table_VK is not None:
        name, alias = f"{block}.{names.table}", f"{prefix}.mlp.{names.table}"
        aliases, shape = () if alias == name else (alias,), tuple(gate.table_VK.shape)
        below = spec.router.num_experts
        yield WeightSlot(name, gate.table_VK, shape, kind="ids", ids_below=below, aliases=aliases)
    if (bias := gate.correction_bias_E) is not None:
        name, alias = f"{block}.{names.bias}", f"{prefix}.mlp.{names.bias}"
        aliases = () if alias == name else (alias,)
        target = bias if names.bias_rows is None else bias.unsqueeze(0)
        yield WeightSlot(name, target, tuple(target.shape), kind="bias", aliases=aliases)
    for name, weight in zip(names.latent, moe.rows.parameters(), strict=False):
        yield WeightSlot(f"{block}.{name}.weight", weight, tuple(weight.shape))
    if names.alternating:
        yield from alternating_slots(moe, f"{block}.experts")
    elif names.transposed and f"{block}.experts.0.{names.w2}.weight" not in checkpoint:
        yield from transposed_slots(moe, f"{block}.experts")
    elif f"{prefix}.mlp.experts.{_first(moe)}" in checkpoint:
        yield from stacked_slots(moe, f"{prefix}.mlp.experts")
    else:
        yield from single_slots(moe, f"{block}.experts", names)
    if isinstance(moe.shared, DenseMLP):
        yield from moe.shared.weight_slots(
            f"{block}.{names.shared}", output_gate=f"{block}.{names.shared}_gate.weight"
        )


def expert_names(spec: ModelSpec) -> dict[int, tuple[list[str], list[str]]]:
    """Return layer -> names that its experts' gate and up weights may have in a checkpoint, and
    their down weights: one matrix per expert and projection, or all of them stacked.
    """
    names, found = spec.names, {}
    for index, layer in enumerate(spec.layers):
        if isinstance(layer.mlp, SparseSpec):
            experts = range(layer.mlp.moe.router.num_experts)
            layer_prefix = spec.prefix(index)[0]
            prefix = f"{layer_prefix}.{names.block}.experts"
            stacked = prefix if names.alternating else f"{layer_prefix}.mlp.experts"
            first = "gate_up_proj" if layer.mlp.moe.experts.gated else "up_proj"
            found[index] = (
                [
                    *(
                        f"{prefix}.{e}.{each}.weight"
                        for e in experts
                        for each in (names.w1, names.w3)
                    ),
                    f"{stacked}.{first}",
                ],
                [
                    *(f"{prefix}.{e}.{names.w2}.weight" for e in experts),
                    f"{stacked}.down_proj",
                ],
            )
    return found


def single_slots(moe: MoELayer, prefix: str, names: MoENames) -> Iterator[WeightSlot]:
    """Yield three slots per instance, without a gate two, and as many of biases; gate and up are
    rows of one stacked tensor.
    """
    hidden, ffn = moe.spec.width, moe.spec.ffn
    inner = (names.w1, names.w3) if moe.spec.experts.gated else (names.w3,)
    matrices: list[tuple[str, Matrix, int, tuple[int, int]]] = [
        (each, "w13", index * ffn, (ffn, hidden)) for index, each in enumerate(inner)
    ]
    matrices.append((names.w2, "w2", 0, (hidden, ffn)))
    for local, expert in enumerate(moe.local_experts):
        for name, matrix, first, shape in matrices:
            target, sink = moe.experts.target(local, matrix, first, shape[0])
            yield WeightSlot(f"{prefix}.{expert}.{name}.weight", target, shape, sink=sink)
        if (biases := moe.experts.biases_of(local)) is not None:
            b13_N, b2_D = biases
            for each, part_F in zip(inner, b13_N.split(ffn), strict=True):
                yield WeightSlot(f"{prefix}.{expert}.{each}.bias", part_F, (ffn,), kind="bias")
            name = f"{prefix}.{expert}.{names.w2}.bias"
            yield WeightSlot(name, b2_D, (hidden,), kind="bias")


def stacked_slots(moe: MoELayer, prefix: str) -> Iterator[WeightSlot]:
    """Yield two slots per run of instances, and two of biases, each a range of a tensor that stacks
    all experts.
    """
    num_experts, first = moe.spec.router.num_experts, _first(moe)
    for start, run in _runs(moe):
        mine = slice(run[0], run[-1] + 1)
        if moe.experts.low_bit_of(start) is not None:
            yield from _stacked_sinks(moe, prefix, start, mine)
            continue
        own, weights = slice(start, start + len(run)), moe.experts.stacked
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


def _stacked_sinks(moe: MoELayer, prefix: str, local: int, mine: slice) -> Iterator[WeightSlot]:
    """Yield the two slots of one instance that is held in few bits, and two of biases."""
    num_experts, hidden, ffn = moe.spec.router.num_experts, moe.spec.width, moe.spec.ffn
    inner = moe.spec.experts.parts * ffn
    matrices: tuple[tuple[str, Matrix, tuple[int, int]], ...] = (
        (_first(moe), "w13", (inner, hidden)),
        ("down_proj", "w2", (hidden, ffn)),
    )
    for name, matrix, shape in matrices:
        target, sink = moe.experts.target(local, matrix, 0, shape[0])
        full_shape = (num_experts, *shape)
        yield WeightSlot(f"{prefix}.{name}", target[None], full_shape, (mine,), sink=sink)
    if (biases := moe.experts.biases_of(local)) is not None:
        for (name, _, _), bias in zip(matrices, biases, strict=True):
            full_shape = (num_experts, *bias.shape)
            name = f"{prefix}.{name}_bias"
            yield WeightSlot(name, bias[None], full_shape, (mine,), kind="bias")


def transposed_slots(moe: MoELayer, prefix: str) -> Iterator[WeightSlot]:
    """Yield two slots per run of instances, each a range of a tensor that stacks all experts with
    their matrices transposed, and two of biases.
    """
    num_experts, hidden, ffn = moe.spec.router.num_experts, moe.spec.width, moe.spec.ffn
    matrices: tuple[tuple[str, Matrix, tuple[int, int]], ...] = (
        (_first(moe), "w13", (moe.spec.experts.parts * ffn, hidden)),
        ("down_proj", "w2", (hidden, ffn)),
    )
    weights = moe.experts.stacked
    for start, run in _runs(moe):
        mine, own = (slice(run[0], run[-1] + 1),), slice(start, start + len(run))
        biases: tuple[torch.Tensor | None, ...] = (weights.b13_e2F, weights.b2_eD)
        biases = tuple(bias if bias is None else bias[own] for bias in biases)
        if moe.experts.low_bit_of(start) is not None:  # a run of one instance
            biases = tuple(bias[None] for bias in moe.experts.biases_of(start) or ())
        for name, matrix, (rows, columns) in matrices:
            sink = None
            if moe.experts.low_bit_of(start) is None:
                target = (weights.w13_e2FD if matrix == "w13" else weights.w2_eDF)[own]
            else:
                held, sink = moe.experts.target(start, matrix, 0, rows)
                target = held[None]
            shape = (num_experts, columns, rows)
            yield WeightSlot(f"{prefix}.{name}", target.transpose(1, 2), shape, mine, sink=sink)
        for (name, _, (rows, _)), bias in zip(matrices, biases, strict=False):
            if bias is not None:
                name, shape = f"{prefix}.{name}_bias", (num_experts, rows)
                yield WeightSlot(name, bias, shape, mine, kind="bias")


def _first(moe: MoELayer) -> str:
    """Return the name of the first projection of experts that are stacked."""
    return "gate_up_proj" if moe.spec.experts.gated else "up_proj"


def alternating_slots(moe: MoELayer, prefix: str) -> Iterator[WeightSlot]:
    """Yield the slots of experts stacked as gpt-oss stores them, per run of instances.

    Targets are views of w13 [e, 2, F, D] in the order of the file's dimensions, where F comes
    before the 2 of gate and up.
    """
    num_experts, hidden, ffn = moe.spec.router.num_experts, moe.spec.width, moe.spec.ffn
    weights = moe.experts.stacked
    for start, run in _runs(moe):
        mine, own = (slice(run[0], run[-1] + 1),), slice(start, start + len(run))
        up_sink = down_sink = None
        if moe.experts.low_bit_of(start) is None:
            w13_e2FD, w2_eDF = weights.w13_e2FD[own], weights.w2_eDF[own]
        else:  # a run of one instance
            target, up_sink = moe.experts.target(start, "w13", 0, 2 * ffn, alternate=True)
            w13_e2FD = target[None]
            target, down_sink = moe.experts.target(start, "w2", 0, hidden)
            w2_eDF = target[None]
        w13_e2FD = w13_e2FD.unflatten(1, (2, ffn))
        name = f"{prefix}.gate_up_proj"
        plain = WeightSlot(
            name,
            w13_e2FD.permute(0, 3, 2, 1),
            (num_experts, hidden, ffn, 2),
            mine,
            file_shape=(num_experts, hidden, 2 * ffn),
            sink=up_sink,
        )
        yield WeightSlot(
            name,
            w13_e2FD.transpose(1, 2),
            (num_experts, ffn, 2, hidden),
            mine,
            file_shape=(num_experts, 2 * ffn, hidden),
            unquantised=plain,
            sink=up_sink,
        )
        name = f"{prefix}.down_proj"
        plain = WeightSlot(
            name, w2_eDF.transpose(1, 2), (num_experts, ffn, hidden), mine, sink=down_sink
        )
        yield WeightSlot(
            name, w2_eDF, (num_experts, hidden, ffn), mine, unquantised=plain, sink=down_sink
        )
        b13_e2F, b2_eD = weights.b13_e2F, weights.b2_eD
        if up_sink is not None and (biases := moe.experts.biases_of(start)) is not None:
            b13_e2F, b2_eD = (bias[None] for bias in biases)
        elif b13_e2F is not None and b2_eD is not None:
            b13_e2F, b2_eD = b13_e2F[own], b2_eD[own]
        if b13_e2F is not None and b2_eD is not None:
            yield WeightSlot(
                f"{prefix}.gate_up_proj_bias",
                b13_e2F.unflatten(1, (2, ffn)).transpose(1, 2),
                (num_experts, ffn, 2),
                mine,
                kind="bias",
                file_shape=(num_experts, 2 * ffn),
            )
            yield WeightSlot(
                f"{prefix}.down_proj_bias", b2_eD, (num_experts, hidden), mine, kind="bias"
            )


def _runs(moe: MoELayer) -> Iterator[tuple[int, list[int]]]:
    """Yield the runs of consecutive experts among this rank's instances: the first instance, and
    the experts. Those that are held in few bits are runs of their own.
    """
    held, start = moe.local_experts, 0
    for end in range(1, len(held) + 1):
        if (
            end == len(held)
            or held[end] != held[end - 1] + 1
            or moe.experts.low_bit_of(end) is not None
            or moe.experts.low_bit_of(start) is not None
        ):
            yield start, held[start:end]
            start = end
