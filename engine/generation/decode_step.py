"""Decode step: whether a step has the fixed shape that graphs take, and its rows in their buffers.

Between `step.py`, which has the sequences, and `layers/decode_inputs.py`, which has the buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.generation.runner import Fed
from engine.generation.sampling.static_sampler import Draws, draws_of, needs_host, sampling_table
from engine.generation.step import Slice, Step
from engine.layers.decode_inputs import DecodeInputs
from engine.ops.to_device import all_to_device


def has_fixed_shape(step: Step, vocab: int) -> bool:
    """Return whether the step is made of decodes that need nothing of the host; so is an empty one.

    What this rank's sequences say alone: ranks agree before they take a graph.
    """
    is_decode = step.num_decode == len(step.slices)
    return is_decode and not any(needs_host(piece.seq, vocab) for piece in step.slices)


def fill_inputs(
    inputs: DecodeInputs, slices: Sequence[Slice], vocab: int, fed: Fed | None = None
) -> Draws:
    """Write the rows of decode slices, in order; return the most that any of them asks for.

    Args:
        inputs: of a bucket with room for them.
        slices: of one token each.
        vocab: tokens of the vocabulary.
        fed: where tokens of the slices are pending.
    """
    sequences = [piece.seq for piece in slices]
    params = [seq.request.params for seq in sequences]
    has_states = inputs.step.queries.states_S is not None
    inputs.fill(
        [0 if piece.is_pending else piece.seq.token_ids[piece.start] for piece in slices],
        np.array([piece.start for piece in slices], dtype=np.int64),
        [seq.block_ids for seq in sequences],
        [seq.state_row or 0 for seq in sequences] if has_states else (),
        sampling_table(
            params,
            [piece.start + 1 for piece in slices],
            [seq.request.key for seq in sequences],
            vocab,
        ),
    )
    rows_F = [row for row, piece in enumerate(slices) if piece.is_pending]
    if fed is not None and rows_F:
        sources_F = [fed.row_of[id(slices[row].seq)] for row in rows_F]
        hosts = [torch.from_numpy(np.array(each)) for each in (rows_F, sources_F)]
        row_F, source_F = all_to_device(hosts, fed.tokens_S.device)
        inputs.step.token_ids_T.index_copy_(0, row_F, fed.tokens_S.index_select(0, source_F))
    return draws_of(params, vocab)
