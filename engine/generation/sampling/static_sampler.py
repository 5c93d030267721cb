"""Next tokens chosen on the device alone, in shapes that depend on the number of rows alone.

What a CUDA graph can hold of `sampler.py`, and the same tokens: a row's parameters and its random
number come in a tensor of fixed shape, of which the host has written the numbers before. Which
filters run is fixed per graph, by the most that any row of the step asks for. Rows that the host
has a part in are named by `needs_host`; they leave the graph with their step.

Legend: B rows, V vocabulary, R rows of `drawn_rows.py`, here all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from engine.generation.sampling.drawn_rows import Candidates, DrawnRows, invert
from engine.generation.sampling.sampler import NUCLEUS_CANDIDATES, uniform
from engine.generation.sequence import Sequence as TokenSequence
from engine.request import SamplingParams

# In place of a token: logits that are not finite; a top_p that more candidates have to be sorted
# for, which `sample_rows` does with the same logits.
NOT_FINITE, NEEDS_ALL = -1, -2


class Draws(IntEnum):
    """The most that a row of a step asks for."""

    GREEDY = 0
    PLAIN = 1  # some rows are drawn, none of them with top_k or top_p
    FILTERED = 2


def needs_host(sequence: TokenSequence, vocab: int) -> bool:
    """Return whether choosing the sequence's next token takes host data or gives some.

    Penalties, a bias or a minimum length; log probabilities; a top_k of more tokens than graphs
    sort.
    """
    params = sequence.request.params
    is_wide = NUCLEUS_CANDIDATES < params.top_k < vocab and not params.greedy
    return sequence.history is not None or params.logprobs or is_wide


def draws_of(params: Sequence[SamplingParams], vocab: int) -> Draws:
    """Return the most that any row asks for."""
    drawn = [each for each in params if not each.greedy]
    if any(0 < each.top_k < vocab or each.top_p < 1 for each in drawn):
        return Draws.FILTERED
    return Draws.PLAIN if drawn else Draws.GREEDY


def sampling_table(
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    request_indices: Sequence[int],
    vocab: int,
) -> np.ndarray:
    """Return what `choose_tokens` takes of each row: float64 [5, rows].

    Temperature (0: greedy), random number, top_k (the vocabulary's size where it is off), top_p
    and min_p. Arguments as of `sample_rows`.
    """
    table_5B = np.zeros((5, len(params)))
    drawn = [row for row, each in enumerate(params) if not each.greedy]
    if drawn:
        chosen = [params[row] for row in drawn]
        table_5B[0, drawn] = [each.temperature for each in chosen]
        table_5B[1, drawn] = uniform(
            [each.seed for each in chosen],
            [request_indices[row] for row in drawn],
            [positions[row] for row in drawn],
        )
        table_5B[2, drawn] = [each.top_k if 0 < each.top_k < vocab else vocab for each in chosen]
        table_5B[3, drawn] = [each.top_p for each in chosen]
        table_5B[4, drawn] = [each.min_p for each in chosen]
    return table_5B


def choose_tokens(logits_BV: Tensor, sampling_5B: Tensor, draws: Draws) -> Tensor:
    """Return the next token of each row, int64 [B], as `sample_rows` does, or a negative number.

    Waits for nothing and allocates by the shapes alone.

    Args:
        logits_BV: float32, unchanged.
        sampling_5B: see `sampling_table`; zeros are a greedy row.
        draws: at least what any row asks for.
    """
    vocab = logits_BV.shape[1]
    top_B, tokens_B = logits_BV.max(dim=1)  # of equal maxima the first; NaN counts as a maximum
    if draws is not Draws.GREEDY:
        temperature_B, random_B, top_k_B, top_p_B, min_p_B = sampling_5B.unbind(0)
        rows = DrawnRows(logits_BV, top_B, random_B, temperature_B, top_k_B, top_p_B, min_p_B)
        drawn_B = invert(rows.weights(logits_BV), random_B)
        if draws is Draws.FILTERED:
            candidates = Candidates.of(rows, min(NUCLEUS_CANDIDATES, vocab), nucleus=True)
            filtered_B = candidates.draw()
            if candidates.lacks_R is not None:
                # A row of top_k has its candidates.
                lacks_B = candidates.lacks_R & (top_k_B == vocab)
                filtered_B = torch.where(lacks_B, NEEDS_ALL, filtered_B)
            drawn_B = torch.where((top_k_B < vocab) | (top_p_B < 1), filtered_B, drawn_B)
        tokens_B = torch.where(temperature_B > 0, drawn_B, tokens_B)
    return torch.where(top_B.isfinite(), tokens_B, NOT_FINITE)
