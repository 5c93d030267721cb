"""The outcome of a step: new tokens, log probabilities of new and prompt tokens, failures.

Between `runner.py`, which gives logits, and `Scheduler.commit`, which records the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.generation.sampling.likeliest import Likeliest, token_logprobs
from engine.generation.sampling.sampler import NonFiniteLogitsError, Sampled, sample_rows
from engine.generation.step import Step
from engine.request import TopLogprobs

# Rows whose prompt logprobs are computed at once: the logits of a whole chunk over a large
# vocabulary take gigabytes.
_PROMPT_ROWS = 256

Logits = Callable[[list[int]], torch.Tensor]  # rows of a step -> their logits, float32 [R, V]


@dataclass(slots=True)
class StepOutcome:
    """What `Scheduler.commit` records. Lists of likeliest tokens are None where none are asked."""

    tokens: list[int] = field(default_factory=list)  # one per slice of `Step.sampling`
    logprobs: list[float] | None = None  # the same; None where no request wants them
    top: list[TopLogprobs] | None = None
    prompt_logprobs: list[float] = field(default_factory=list)  # one per row of `Step.prompt_rows`
    prompt_top: list[TopLogprobs] | None = None
    errors: dict[int, str] = field(default_factory=dict)  # slices whose logits are not finite


def read_step(step: Step, logits_of: Logits) -> StepOutcome:
    """Sample a step and return its outcome, on the host."""
    outcome = StepOutcome()
    _read_prompts(step, logits_of, outcome)
    outcome.errors = _prompt_failures(step, outcome.prompt_logprobs)
    if not step.sampling:
        return outcome
    requests = [piece.seq.request for piece in step.sampling]
    try:
        sampled = sample_rows(
            logits_of(step.sample_rows),
            [request.params for request in requests],
            [len(piece.seq.token_ids) for piece in step.sampling],
            [request.key for request in requests],
            [request.id for request in requests],
            [piece.seq.history for piece in step.sampling],
        )
    except NonFiniteLogitsError as error:
        sampled = Sampled(error.tokens, error.logprobs, error.top)
        failed = {id(step.sampling[row]) for row in error.rows}
        for index, piece in enumerate(step.slices):
            if id(piece) in failed:
                outcome.errors.setdefault(index, str(error))
    outcome.tokens, outcome.logprobs, outcome.top = sampled.tokens, sampled.logprobs, sampled.top
    return outcome


def _read_prompts(step: Step, logits_of: Logits, outcome: StepOutcome) -> None:
    """Compute the log probabilities of prompts, a part of the rows at a time."""
    counts = _prompt_top_counts(step)
    if counts:
        outcome.prompt_top = []
    for start in range(0, len(step.prompt_rows), _PROMPT_ROWS):
        part = slice(start, start + _PROMPT_ROWS)
        rows = step.prompt_rows[part]
        logits = logits_of(rows)
        logprobs_R = token_logprobs(logits, step.prompt_targets[part])
        likeliest = Likeliest.of(logits, counts[part])
        if likeliest is not None:
            logprobs_R = torch.cat([logprobs_R.double(), likeliest.packed])
        # SYNC: the logprobs of prompts become part of their completions.
        packed = logprobs_R.tolist()
        outcome.prompt_logprobs += packed[: len(rows)]
        if outcome.prompt_top is not None:
            none_asked: list[TopLogprobs] = [[] for _ in rows]
            outcome.prompt_top += (
                none_asked if likeliest is None else likeliest.unpack(packed[len(rows) :])
            )


def _prompt_top_counts(step: Step) -> list[int]:
    """Return how many likeliest tokens each of `step.prompt_rows` asks for; [] for none at all."""
    counts: list[int] = []
    for piece in step.slices[step.num_decode :] if step.prompt_rows else ():
        top = piece.seq.request.params.prompt_top_logprobs
        counts += [top] * len(piece.prompt_logprob_rows)
    return counts if any(counts) else []


def _prompt_failures(step: Step, of_prompt: list[float]) -> dict[int, str]:
    """Return the slices with a prompt logprob that is not finite: index -> error message."""
    failures: dict[int, str] = {}
    start = 0
    for index, piece in enumerate(step.slices):
        count = len(piece.prompt_logprob_rows)
        if count and not all(map(math.isfinite, of_prompt[start : start + count])):
            failures[index] = str(NonFiniteLogitsError([], [repr(piece.seq.request.id)], [], None))
        start += count
    return failures
