"""Record: what a step that has run changes in its sequences, whenever the host has read it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from engine.generation.sampling.step_outcome import StepOutcome
from engine.generation.scheduler import Scheduler
from engine.generation.sequence import Sequence, Status
from engine.generation.step import Slice, Step
from engine.request import CapacityUse, RequestError


@dataclass(frozen=True, slots=True)
class Routed:
    """Assignments of a token over all layers."""

    before: int  # in all MoE layers but the last
    last: int  # in the last one
    runs_last_whole: bool  # the model's last layer runs all rows, not only those that are read

    def count(self, step: Step, *, whole: bool, void: Collection[int]) -> None:
        """Add the routed assignments of a step to its sequences, recomputed tokens left out.

        Args:
            whole: whether the last layer ran all rows, as where tokens are subject to capacity,
                and not only those that are read (`CausalLM.forward`).
            void: see `Scheduler.commit`.
        """
        for index, piece in enumerate(step.slices):
            if not counts(piece, index, void):
                continue
            run = piece.length - piece.num_recomputed
            in_last = run if whole or self.runs_last_whole else min(run, piece.num_read)
            piece.seq.capacity.add(CapacityUse(run * self.before + in_last * self.last))


def counts(piece: Slice, index: int, void: Collection[int]) -> bool:
    """Return whether a slice's results are of use: its sequence has not ended before the step."""
    return piece.seq.status is Status.RUNNING and index not in void


def record(
    scheduler: Scheduler,
    step: Step,
    outcome: StepOutcome,
    *,
    advanced: bool = False,
    void: Collection[int] = (),
) -> list[Sequence]:
    """Commit a step; return the sequences that finished, those with an error first.

    Args:
        scheduler: of the step.
        outcome: of the step.
        advanced: see `Scheduler.commit`.
        void: see there.
    """
    failed: list[Sequence] = []
    for index, message in outcome.errors.items():
        piece = step.slices[index]
        if counts(piece, index, void):
            scheduler.abort(piece.seq, RequestError("non_finite_logits", message))
            failed.append(piece.seq)
    return failed + scheduler.commit(
        step,
        outcome.tokens,
        outcome.logprobs,
        outcome.prompt_logprobs,
        outcome.top,
        outcome.prompt_top,
        advanced=advanced,
        void=void,
    )
