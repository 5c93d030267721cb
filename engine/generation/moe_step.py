"""Who competes for expert capacity in a step: from the scheduler's slices to the layers' `MoEStep`.

`loop.py` counts this rank's competing tokens before the step, agrees on everybody's by control
words, and then asks for the `MoEStep`. A token is in the prefill phase while its position is inside
the prompt, whether it runs alone, in a chunk, or a second time after a preemption.

Legend: T tokens of this data rank's step, t of this rank's slice, W expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.config import RequestPhase
from engine.distributed.groups import Topology
from engine.generation.control import ControlMessage
from engine.generation.step import Slice, Step
from engine.moe.step import MoEStep, TokenCounts
from engine.moe.token_shard import TokenShard, part_bounds
from engine.ops.to_device import to_device
from engine.profiling.phase_clock import PhaseClock
from engine.request import CapacityUse


def count_competing(step: Step, phases: Sequence[RequestPhase]) -> int:
    """Tokens of the step that are in one of `phases`."""
    return sum(length for piece in step.slices for length in _competing_parts(piece, phases))


def build_moe_step(
    step: Step,
    everyone: Sequence[ControlMessage],
    phases: Sequence[RequestPhase],
    topology: Topology,
    shares_W: tuple[int, ...] | None = None,
) -> MoEStep | None:
    """What the MoE layers must know of this rank's tokens; None where no token of the group
    competes, which all ranks see alike.

    everyone: the agreed words of every rank of the expert-parallel group; those of a tensor group
    are its leader's. shares_W: each rank's share of the capacity, None: all the same.
    """
    tensor = topology.tensor.size
    leaders = [everyone[rank // tensor * tensor] for rank in range(len(everyone))]
    num_competing = sum(words.competing for words in leaders[::tensor])
    if not num_competing:
        return None
    sizes_W = [
        part_bounds(words.tokens_prefill + words.tokens_decode, tensor, rank % tensor)
        for rank, words in enumerate(leaders)
    ]
    start, end = part_bounds(step.num_tokens, tensor, topology.tensor.rank)
    request_T, position_T, competes_T = _identify(step, phases)
    own_competes = competes_T[start:end]
    num_own = int(own_competes.sum())
    device = topology.device
    return MoEStep(
        request_T=_upload(request_T[start:end], device),
        position_T=_upload(position_T[start:end], device),
        competes_T=None if num_own == end - start else _upload(own_competes, device),
        num_own_competing=num_own,
        num_tokens_W=tuple(last - first for first, last in sizes_W),
        num_competing=num_competing,
        tally=TokenCounts.zeros(end - start, device),
        shares_W=shares_W,
    )


def capacity_uses(
    step: Step, moe_step: MoEStep, topology: Topology, clock: PhaseClock
) -> list[CapacityUse]:
    """What capacity did to each slice's tokens that ran for the first time; assignments are left
    to the caller. clock: told of the collective, which the caller's next phase ends.

    Collective over the tensor group: every rank must call.
    """
    assert moe_step.tally is not None, "the step was built with a tally"
    tally_T4 = TokenShard(topology.tensor).gather(moe_step.tally.stack(), step.num_tokens, clock)
    # SYNC: once a step, when the step is over anyway and its tokens are read.
    rows_T4 = tally_T4.cpu().double().numpy()
    uses, row = [], 0
    for piece in step.slices:
        first, row = row + piece.num_recomputed, row + piece.length
        dropped, added, mass, kept = rows_T4[first:row].sum(0).tolist()
        uses.append(CapacityUse(dropped=int(dropped), added=int(added), mass=mass, mass_kept=kept))
    return uses


def _competing_parts(piece: Slice, phases: Sequence[RequestPhase]) -> list[int]:
    in_prompt = max(0, min(piece.start + piece.length, piece.seq.num_prompt) - piece.start)
    lengths = {"prefill": in_prompt, "decode": piece.length - in_prompt}
    return [lengths[phase] for phase in phases]


def _identify(
    step: Step, phases: Sequence[RequestPhase]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Request and position of every token, int32 [T], and whether it competes, bool [T]."""
    request_T = np.empty(step.num_tokens, dtype=np.int32)
    position_T = np.empty(step.num_tokens, dtype=np.int32)
    competes_T = np.empty(step.num_tokens, dtype=np.bool_)
    row = 0
    for piece in step.slices:
        rows = slice(row, row + piece.length)
        request_T[rows] = piece.seq.request.index
        positions = np.arange(piece.start, piece.start + piece.length)
        position_T[rows] = positions
        in_prompt = positions < piece.seq.num_prompt
        competes_T[rows] = (in_prompt & ("prefill" in phases)) | (~in_prompt & ("decode" in phases))
        row += piece.length
    return request_T, position_T, competes_T


def _upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)
