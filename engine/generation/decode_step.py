"""Decode step: whether a step has the fixed shape that graphs take, and its rows in their buffers.

Between `step.py`, which has the sequences, and `layers/decode_inputs.py`, which has the buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.generation.sampling.static_sampler import Draws, draws_of, needs_host, sampling_table
from engine.generation.step import Slice, Step
from engine.layers.decode_inputs import DecodeInputs


def has_fixed_shape(step: Step, vocab: int) -> bool:
    """Return whether the step is made of decodes that need nothing of the host; so is an empty one.

    What this rank's sequences say alone: ranks agree before they take a graph.
    """
    is_decode = step.num_decode == len(step.slices)
    return is_decode and not any(needs_host(piece.seq, vocab) for piece in step.slices)


def fill_inputs(inputs: DecodeInputs, slices: Sequence[Slice], vocab: int) -> Draws:
    """Write the rows of decode slices, in order; return the most that any of them asks for.

    Args:
        inputs: of a bucket with room for them.
        slices: of one token each.
        vocab: tokens of the vocabulary.
    """
    sequences = [piece.seq for piece in slices]
    params = [seq.request.params for seq in sequences]
    has_states = inputs.step.queries.states_S is not None
    inputs.fill(
        [piece.seq.token_ids[piece.start] for piece in slices],
        np.array([piece.start for piece in slices], dtype=np.int64),
        [seq.block_ids for seq in sequences],
        [seq.state_row or 0 for seq in sequences] if has_states else (),
        sampling_table(
            params,
            [len(seq.token_ids) for seq in sequences],
            [seq.request.key for seq in sequences],
            vocab,
        ),
    )
    return draws_of(params, vocab)
