"""MoE step: which tokens of a step are subject to expert capacity, as the MoE layers' `MoEStep`.

Built from the scheduler's slices (`step.py`) and all ranks' control messages (`control.py`), which
carry how many tokens each rank has and how many are eligible: subject to capacity because their
phase is in moe.capacity.phases. A token is in the prefill phase while its position is inside the
prompt, whether it runs alone, in a chunk, or a second time after a preemption.

Legend: T tokens of this data rank's step, t of this rank's slice, W expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch

from engine.config import RequestPhase
from engine.distributed.groups import Topology
from engine.generation.control import ControlMessage
from engine.generation.step import Slice, Step
from engine.moe.dispatch.static_layout import bucket_for
from engine.moe.step import MoEStep, TokenCounts
from engine.moe.token_shard import TokenShard, part_bounds
from engine.ops.to_device import all_to_device
from engine.profiling.phase_clock import PhaseClock
from engine.request import CapacityUse


@dataclass(frozen=True, slots=True)
class CopiesUse:
    """When copies of experts take rows."""

    phases: Collection[RequestPhase]  # moe.copies.phases
    low_bit: bool  # copies are less precise than homes

    def take_rows(self, messages: list[ControlMessage]) -> bool:
        """Return whether a step has tokens of a phase whose rows copies take.

        Args:
            messages: of all ranks.
        """
        counts = {
            "prefill": sum(message.tokens_prefill for message in messages),
            "decode": sum(message.tokens_decode for message in messages),
        }
        return any(counts[phase] for phase in self.phases)


@dataclass(frozen=True, slots=True)
class LayerPhases:
    """The phases whose tokens compete for capacity, layer by layer (moe.policy)."""

    by_layer: Mapping[int, tuple[RequestPhase, ...]]  # of the MoE layers, in the order of
    # `RequestPhase`; empty: nothing competes there
    last: int  # index of the model's last layer
    low_bit_copies: bool = False  # which take rows of layers that drop nothing, too

    @property
    def all(self) -> tuple[RequestPhase, ...]:
        """The phases of which tokens compete in some layer."""
        found = {phase for phases in self.by_layer.values() for phase in phases}
        return tuple(phase for phase in get_args(RequestPhase) if phase in found)

    @property
    def counted(self) -> tuple[RequestPhase, ...]:
        """The phases whose tokens a rank counts for the others: the rest follows from its tokens of
        all phases where layers differ.
        """
        return ("prefill",) if self.differ else self.all

    @property
    def differ(self) -> bool:
        """Whether the layers in which tokens compete have different phases."""
        return len(set(filter(None, self.by_layer.values()))) > 1

    @property
    def limits_last(self) -> bool:
        """Whether the model's last layer runs all rows where tokens compete; as one with a dense
        MLP does, which has no say.
        """
        return bool(self.by_layer.get(self.last, self.all))


ExchangeWay = Literal["auto", "counted", "static"]  # moe.dispatch.exchange


def static_bucket(
    messages: Sequence[ControlMessage], tensor: int, exchange: ExchangeWay
) -> int | None:
    """Return the tokens that every rank's part of a step is padded to where it may take the static
    exchange; None: it may not. The same on every rank.

    Args:
        messages: of all ranks; only those of a tensor group's first rank count tokens.
        tensor: ranks of a tensor group.
        exchange: moe.dispatch.exchange; auto: steps of decode alone.
    """
    if exchange == "counted":
        return None
    if exchange == "auto" and any(message.tokens_prefill for message in messages):
        return None
    most = max(message.tokens_prefill + message.tokens_decode for message in messages)
    return bucket_for(-(-most // tensor))


def count_eligible(step: Step, phases: Sequence[RequestPhase]) -> int:
    """Return how many tokens of the step are in one of `phases`."""
    return sum(length for piece in step.slices for length in _eligible_lengths(piece, phases))


def build_moe_step(
    step: Step,
    messages: Sequence[ControlMessage],
    phases: Sequence[RequestPhase],
    topology: Topology,
    weights_W: tuple[int, ...] | None = None,
    *,
    limited: bool = True,
    layers: LayerPhases | None = None,
) -> MoEStep | None:
    """Build the MoE layers' view of this rank's tokens.

    Args:
        messages: of every rank of the expert-parallel group, in rank order. A tensor group counts
            once: by the message of its first rank.
        phases: moe.capacity.phases.
        weights_W: share of the capacity per rank; None: equal shares.
        limited: see `MoEStep`.
        layers: the phases of each layer, `phases` being all of them; None: the same in all layers.

    Returns None, on all ranks alike, where no token of the group is eligible.
    """
    tensor = topology.tensor.size
    leaders = [messages[rank // tensor * tensor] for rank in range(len(messages))]
    num_eligible = sum(message.tokens_eligible for message in leaders[::tensor])
    tokens_W = [message.tokens_prefill + message.tokens_decode for message in leaders]
    num_counted = num_eligible
    if layers is not None and layers.differ:
        num_eligible = sum(tokens_W[::tensor])
    if not num_eligible:
        return None
    tokens = _identify(step, phases)
    made = _part(tokens, tokens_W, num_eligible, topology, weights_W, limited=limited)
    if layers is not None:
        made = _by_layer(made, step, layers, num_counted, topology)
    # Which of the rows that are read are eligible is known of all ranks only where all are.
    if layers is not None and not layers.low_bit_copies:
        return made
    if made.runs_last_whole or set(phases) != set(get_args(RequestPhase)):
        return made
    read_W = [message.tokens_read for message in leaders]
    rows_R = _read_rows(step)
    read = tuple(each_T[rows_R] for each_T in tokens)
    last = _part(read, read_W, sum(read_W[::tensor]), topology, weights_W, limited=False)
    return replace(made, last=last)


def _by_layer(
    made: MoEStep, step: Step, layers: LayerPhases, num_prefill: int, topology: Topology
) -> MoEStep:
    """Return the step with what the layers see of it.

    Args:
        made: the step of all phases.
        layers: the phases of each layer.
        num_prefill: tokens of all ranks in the prefill phase, where the layers differ.
    """
    if not layers.differ:
        return replace(made, limits_last=layers.limits_last)
    tensor = topology.tensor
    in_prompt_T = _identify(step, ("prefill",))[2]
    start, end = part_bounds(len(in_prompt_T), tensor.size, tensor.rank)
    in_prompt_t = in_prompt_T[start:end]
    masks = {"prefill": in_prompt_t, "decode": ~in_prompt_t}
    totals = {"prefill": num_prefill, "decode": made.num_eligible - num_prefill}
    on_device = all_to_device([torch.from_numpy(mask) for mask in masks.values()], topology.device)
    of_phase: dict[str, MoEStep | None] = {}
    for (phase, mask_t), eligible_t in zip(masks.items(), on_device, strict=True):
        num_own = int(mask_t.sum())
        of_phase[phase] = None
        if totals[phase]:
            of_phase[phase] = replace(
                made,
                eligible_T=None if num_own == len(mask_t) else eligible_t,
                num_own_eligible=num_own,
                num_eligible=totals[phase],
            )
    by_layer = {
        index: of_phase[phases[0]] for index, phases in layers.by_layer.items() if len(phases) == 1
    }
    limits_last = layers.limits_last and by_layer.get(layers.last, made) is not None
    return replace(made, limits_last=limits_last, by_layer=by_layer)


def _part(
    tokens: tuple[np.ndarray, ...],
    tokens_W: list[int],
    num_eligible: int,
    topology: Topology,
    weights_W: tuple[int, ...] | None,
    *,
    limited: bool,
) -> MoEStep:
    """Return the `MoEStep` of this rank's part of its data rank's tokens.

    Args:
        tokens: as `_identify` returns them.
        tokens_W: tokens of each rank's data rank.
        num_eligible: of all ranks.
    """
    tensor = topology.tensor.size
    sizes_W = [part_bounds(count, tensor, rank % tensor) for rank, count in enumerate(tokens_W)]
    request_T, position_T, eligible_T = tokens
    start, end = part_bounds(len(request_T), tensor, topology.tensor.rank)
    num_own = int(eligible_T[start:end].sum())
    device = topology.device
    own = [torch.from_numpy(each[start:end]) for each in (request_T, position_T, eligible_T)]
    request_t, position_t, eligible_t = all_to_device(own, device)
    return MoEStep(
        request_T=request_t,
        position_T=position_t,
        eligible_T=None if num_own == end - start else eligible_t,
        num_own_eligible=num_own,
        num_tokens_W=tuple(last - first for first, last in sizes_W),
        num_eligible=num_eligible,
        counts=TokenCounts.zeros(end - start, device),
        weights_W=weights_W,
        limited=limited,
    )


def capacity_uses(
    step: Step,
    moe_step: MoEStep,
    topology: Topology,
    clock: PhaseClock,
    *,
    counts_copies: bool = False,
) -> list[CapacityUse]:
    """Return what capacity did to each slice's tokens, without those that ran before a preemption.

    Args:
        moe_step: the step's, its counts filled by the layers.
        clock: records the collective; the phase is left open.
        counts_copies: whether rows of low-bit copies are counted.

    The numbers of assignments are not filled in.

    Collective over the tensor group: every rank must call.
    """
    assert moe_step.counts is not None, "the step was built without counts"
    shard = TokenShard(topology.tensor)
    counts = [shard.gather(moe_step.counts.stack(), step.num_tokens, clock)]
    if (last := moe_step.last) is not None and last.counts is not None:
        counts.append(shard.gather(last.counts.stack(), step.num_read, clock))
    counts_N5 = counts[0] if len(counts) == 1 else torch.cat(counts)
    # SYNC: once per step, when the step is over anyway and its tokens are read.
    rows_N5 = counts_N5.cpu().double().numpy()
    rows_T5, read_R5 = rows_N5[: step.num_tokens], rows_N5[step.num_tokens :]
    if len(read_R5):
        rows_T5[_read_rows(step)] += read_R5
    uses, row = [], 0
    for piece in step.slices:
        first, row = row + piece.num_recomputed, row + piece.length
        dropped, added, mass, kept, copied = rows_T5[first:row].sum(0).tolist()
        uses.append(
            CapacityUse(
                dropped=int(dropped),
                added=int(added),
                mass=mass,
                mass_kept=kept,
                copied=int(copied) if counts_copies else None,
            )
        )
    return uses


_POSITION_BITS = 20  # a position is below 2**20, a choice below 2**11: both in an int32


def _eligible_lengths(piece: Slice, phases: Sequence[RequestPhase]) -> list[int]:
    """Return how many tokens of the slice are in each of `phases`."""
    in_prompt = max(0, min(piece.start + piece.length, piece.seq.num_prompt) - piece.start)
    lengths = {"prefill": in_prompt, "decode": piece.length - in_prompt}
    return [lengths[phase] for phase in phases]


def _read_rows(step: Step) -> np.ndarray:
    """Return the rows of the step whose final hidden state is read, int64, ascending."""
    rows, row = [np.empty(0, dtype=np.int64)], 0
    for piece in step.slices:
        row += piece.length
        rows.append(np.arange(row - piece.num_read, row))
    return np.concatenate(rows)


def _identify(
    step: Step, phases: Sequence[RequestPhase]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return every token's request and position, int32 [T], and if it is eligible, bool [T]."""
    request_T = np.empty(step.num_tokens, dtype=np.int32)
    position_T = np.empty(step.num_tokens, dtype=np.int32)
    eligible_T = np.empty(step.num_tokens, dtype=np.bool_)
    row = 0
    for piece in step.slices:
        rows = slice(row, row + piece.length)
        request_T[rows] = piece.seq.request.index
        positions = np.arange(piece.start, piece.start + piece.length)
        # Choices of one line differ in what breaks ties; the first has its positions alone.
        position_T[rows] = positions + (piece.seq.request.choice << _POSITION_BITS)
        in_prompt = positions < piece.seq.num_prompt
        eligible_T[rows] = (in_prompt & ("prefill" in phases)) | (~in_prompt & ("decode" in phases))
        row += piece.length
    return request_T, position_T, eligible_T
