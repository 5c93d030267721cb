"""Sampler: greedy and seeded sampling of the next tokens from their logits, and logprobs.

A sampled token depends on its own logits, its parameters and (seed, request index, position), and
on nothing else: not on the other rows, the rank or the number of ranks. Each row draws one number
from a counter-based generator and inverts the distribution's CDF, taken in order of token id. That
order is robust to rounding: logits that differ in the last bit move the CDF by as little, whereas
in order of probability two near-equal tokens could swap places and change the outcome.

Legend: S rows that sample, V vocabulary, R rows of a subset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.generation.sampling.drawn_rows import Candidates, DrawnRows, invert
from engine.generation.sampling.likeliest import Likeliest, token_logprobs
from engine.generation.sampling.logit_adjustments import History, adjust
from engine.ops.to_device import to_device
from engine.request import SamplingParams, TopLogprobs

NUCLEUS_CANDIDATES = 1024  # tokens that top-p looks at before it resorts to sorting them all
_GOLDEN = 0x9E3779B97F4A7C15


class NonFiniteLogitsError(ValueError):
    """Logits that are NaN, infinite, or all -inf. The other rows are sampled nevertheless."""

    def __init__(
        self,
        rows: list[int],
        names: list[str],
        tokens: list[int],
        logprobs: list[float] | None,
        top: list[TopLogprobs] | None = None,
    ) -> None:
        many = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
        super().__init__(
            f"request {', '.join(names[:3])}{many}: its logits are not finite; look for NaN in the "
            "checkpoint, or run with model.dtype = float32 or bfloat16 if this is an overflow"
        )
        self.rows = rows  # the failed ones
        self.tokens = tokens  # what `sample` would have returned, with -1 in the failed rows
        self.logprobs = logprobs
        self.top = top


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome of a step, per row."""

    tokens: list[int]
    logprobs: list[float] | None  # None where no row asks for them
    top: list[TopLogprobs] | None  # empty in rows that ask for none; None where no row does


def uniform(
    seeds: Sequence[int], request_indices: Sequence[int], positions: Sequence[int]
) -> np.ndarray:
    """Return one number in [0, 1) per (seed, request, position), as float64 [S] in numpy.

    Three rounds of the SplitMix64 finaliser (Steele, Lea and Flood, "Fast Splittable Pseudorandom
    Number Generators", OOPSLA 2014), one per key; the top 53 bits make the number.
    """
    state = np.zeros(len(seeds), np.uint64)
    for key in (seeds, request_indices, positions):
        state = (state ^ np.array(key, np.uint64)) + np.uint64(_GOLDEN)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(
    logits_SV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    request_indices: Sequence[int],
    request_ids: Sequence[str | int] | None = None,
) -> tuple[list[int], list[float] | None]:
    """Return the next token of each row and their logprobs, as `sample_rows` does."""
    sampled = sample_rows(logits_SV, params, positions, request_indices, request_ids)
    return sampled.tokens, sampled.logprobs


def sample_rows(
    logits_SV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    request_indices: Sequence[int],
    request_ids: Sequence[str | int] | None = None,
    histories: Sequence[History | None] = (),
) -> Sampled:
    """Return the next token of each row, their logprobs and the likeliest, where rows ask for them.

    Equal logits: the lower id wins, in greedy choice and at the edge of top_k and top_p.

    Args:
        logits_SV: float32 [S, V], any device; -inf forbids a token. Overwritten where `histories`
            adjust them.
        positions: the position of each new token in its sequence.
        request_ids: names for the error; by default the indices.
        histories: one per row, None in rows whose logits are not adjusted; () for none at all.

    A logprob is the natural log of the softmax of the raw logits (temperature 1, unfiltered, before
    bias and penalties).

    Raises:
        NonFiniteLogitsError: a ValueError that names the requests with non-finite logits.
    """
    if not params:
        return Sampled([], None, None)
    assert logits_SV.dtype == torch.float32, f"logits are {logits_SV.dtype}"
    asks_logprobs = any(p.logprobs for p in params)
    raw_SV = logits_SV
    if any(histories):
        logits_SV = logits_SV.clone() if asks_logprobs else logits_SV
        adjust(logits_SV, histories)
    top_S, tokens_S = logits_SV.max(dim=1)  # of equal maxima the first; NaN counts as a maximum
    if not all(p.greedy for p in params):
        _sample_rows(logits_SV, top_S, tokens_S, params, positions, request_indices)
    chosen_S = torch.where(top_S.isfinite(), tokens_S, -1)
    logprobs: list[float] | None = None
    top: list[TopLogprobs] | None = None
    if asks_logprobs:
        logprobs_S = token_logprobs(raw_SV, tokens_S)
        likeliest = Likeliest.of(raw_SV, [p.top_logprobs for p in params])
        parts = [chosen_S.double(), logprobs_S.double()]
        # All in one copy: float64 holds token ids and float32 logprobs exactly.
        # SYNC: the host needs the tokens to see which sequences end and to schedule the next step.
        packed = torch.cat(parts if likeliest is None else [*parts, likeliest.packed]).tolist()
        count = len(params)
        tokens, logprobs = [int(token) for token in packed[:count]], packed[count : 2 * count]
        if likeliest is not None:
            top = likeliest.unpack(packed[2 * count :])
    else:
        tokens = chosen_S.tolist()  # SYNC: as above
    if min(tokens) < 0:
        bad = [row for row, token in enumerate(tokens) if token < 0]
        names = [repr(request_ids[r]) if request_ids else f"#{request_indices[r]}" for r in bad]
        raise NonFiniteLogitsError(bad, names, tokens, logprobs, top)
    return Sampled(tokens, logprobs, top)


def _sample_rows(
    logits_SV: Tensor,
    top_S: Tensor,
    tokens_S: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    request_indices: Sequence[int],
) -> None:
    """Overwrite `tokens_S` in the rows that are not greedy: those with filters, then the others."""
    vocab = logits_SV.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    drawn = [row for row, p in enumerate(params) if not p.greedy]
    filtered = [row for row in drawn if top_k[row] < vocab or params[row].top_p < 1]
    plain = [row for row in drawn if top_k[row] == vocab and params[row].top_p == 1]
    for numbers in filter(None, (filtered, plain)):
        random = uniform(
            [params[row].seed for row in numbers],
            [request_indices[row] for row in numbers],
            [positions[row] for row in numbers],
        )
        # One small copy to the device: float64 holds the row numbers and top_k exactly.
        table = np.array(
            [
                (
                    row,
                    draw,
                    params[row].temperature,
                    top_k[row],
                    params[row].top_p,
                    params[row].min_p,
                )
                for row, draw in zip(numbers, random, strict=True)
            ],
            dtype=np.float64,  # a temperature may be an integer of any size
        )
        has_min_p = any(params[row].min_p for row in numbers)
        row_R, random_R, temperature_R, top_k_R, top_p_R, min_p_R = to_device(
            torch.from_numpy(table), logits_SV.device
        ).unbind(1)
        row_R = row_R.long()
        whole = len(numbers) == len(params)
        logits_RV = logits_SV if whole else logits_SV.index_select(0, row_R)
        rows = DrawnRows(
            logits_RV,
            top_S[row_R],
            random_R,
            temperature_R,
            top_k_R,
            top_p_R,
            min_p_R if has_min_p else None,
        )
        if numbers is plain:
            tokens_S[row_R] = invert(rows.weights(logits_RV), rows.random_R)
        else:
            limits = {top_k[row] for row in numbers}
            nucleus = vocab in limits
            width = max(limits - {vocab} | ({NUCLEUS_CANDIDATES} if nucleus else set()))
            tokens_S[row_R] = _pick_filtered(rows, min(width, vocab), nucleus=nucleus)


def _pick_filtered(rows: DrawnRows, width: int, *, nucleus: bool) -> Tensor:
    """Return tokens [R], sampled after filtering; arguments as of `Candidates.of`.

    If the top_p of a row needs more candidates than `width`, all tokens are sorted.
    """
    candidates = Candidates.of(rows, width, nucleus=nucleus)
    # SYNC: whether to sort the whole vocabulary depends on the values; rare, so worth the wait.
    if candidates.lacks_R is not None and bool(candidates.lacks_R.any()):
        candidates = Candidates.of(rows, rows.logits_RV.shape[1], nucleus=nucleus)
    return candidates.draw()
