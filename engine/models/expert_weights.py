"""Expert weights: which checkpoint tensors fill an MoE layer, as `WeightSlot`s.

Two layouts occur: one matrix per expert and projection (every published checkpoint, and what
save_pretrained writes), or all experts of a layer stacked in two tensors (transformers' layout in
memory). Slots exist only for the experts of this rank, homes and copies.

Legend: E experts, e experts on this rank, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

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
    spec, block = moe.spec, f"{prefix}.{names.block}"
    num_experts, hidden = spec.router.num_experts, spec.hidden
    gate, alias = f"{block}.gate.weight", f"{prefix}.mlp.gate.weight"
    aliases = () if alias == gate else (alias,)
    yield WeightSlot(gate, moe.gate_weight_ED, (num_experts, hidden), aliases=aliases)
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


def expert_names(spec: ModelSpec) -> dict[int, tuple[list[str], list[str]]]:
    """Return layer -> names of its experts' gate and up weights and of their down weights, in a
    checkpoint with one matrix per expert and projection.
    """
    names, found = spec.names, {}
    for index, layer in enumerate(spec.layers):
        if isinstance(layer.mlp, SparseSpec):
            experts = range(layer.mlp.moe.router.num_experts)
            prefix = f"model.layers.{index}.{names.block}.experts"
            found[index] = (
                [f"{prefix}.{e}.{each}.weight" for e in experts for each in (names.w1, names.w3)],
                [f"{prefix}.{e}.{names.w2}.weight" for e in experts],
            )
    return found


def _single_slots(moe: MoELayer, prefix: str, names: MoENames) -> Iterator[WeightSlot]:
    """Yield three slots per instance; gate and up are rows of one stacked tensor."""
    hidden, ffn = moe.spec.hidden, moe.spec.ffn
    matrices: tuple[tuple[str, Matrix, int, tuple[int, int]], ...] = (
        (names.w1, "w13", 0, (ffn, hidden)),
        (names.w3, "w13", ffn, (ffn, hidden)),
        (names.w2, "w2", 0, (hidden, ffn)),
    )
    for local, expert in enumerate(moe.local_experts):
        for name, matrix, first, shape in matrices:
            target, sink = moe.experts.target(local, matrix, first, shape[0])
            yield WeightSlot(f"{prefix}.{expert}.{name}.weight", target, shape, sink=sink)


def _stacked_slots(moe: MoELayer, prefix: str) -> Iterator[WeightSlot]:
    """Yield two slots per run of instances, each a range of a tensor that stacks all experts."""
    num_experts, hidden, ffn = moe.spec.router.num_experts, moe.spec.hidden, moe.spec.ffn
    matrices: tuple[tuple[str, Matrix, tuple[int, int]], ...] = (
        ("gate_up_proj", "w13", (2 * ffn, hidden)),
        ("down_proj", "w2", (hidden, ffn)),
    )
    for start, run in _runs(moe):
        mine, own = slice(run[0], run[-1] + 1), slice(start, start + len(run))
        for name, matrix, shape in matrices:
            stacked = moe.experts.stacked
            target = (stacked.w13_e2FD if matrix == "w13" else stacked.w2_eDF)[own]
            sink = None
            if moe.experts.low_bit_of(start) is not None:
                target, sink = moe.experts.target(start, matrix, 0, shape[0])
                target = target[None]
            yield WeightSlot(f"{prefix}.{name}", target, (num_experts, *shape), (mine,), sink=sink)


def _runs(moe: MoELayer) -> Iterator[tuple[int, list[int]]]:
    """Yield the runs of consecutive experts among this rank's instances: the first instance, and
    the experts. Those that are held as integers are runs of their own.
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
