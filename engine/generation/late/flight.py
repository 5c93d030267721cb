"""Flight: the one step of a rank that is queued on the device while its tokens are unknown here.

fed           what the next step runs on in place of ids that the host has not read
launch        the step just queued stays in flight, where the next one needs none of it here
land_behind   the step in flight is read and committed once that next one is queued
land          the same where the next one has to know it first
"""

from __future__ import annotations

from collections.abc import Collection

from engine.generation.late.late_step import LateStep, can_be_late
from engine.generation.late.record import Routed, counts, record
from engine.generation.runner import Fed, Hidden, Runner
from engine.generation.scheduler import Scheduler
from engine.generation.sequence import Sequence
from engine.generation.step import Step
from engine.generation.totals import Totals


class Flight:
    """The step in flight of one rank, if there is one.

    Args:
        runner: of the rank.
        scheduler: of the rank.
        routed: assignments of a token.
        totals: the run's; surplus rows are counted in it.
        enabled: whether steps may be late at all.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        routed: Routed,
        totals: Totals,
        *,
        enabled: bool,
    ) -> None:
        self._runner, self._scheduler, self._routed = runner, scheduler, routed
        self._totals, self._enabled = totals, enabled
        self._late: LateStep | None = None

    @property
    def is_open(self) -> bool:
        """Whether a step is in flight."""
        return self._late is not None

    @property
    def fed(self) -> Fed | None:
        """New tokens that only the device has; None: there are none."""
        return None if self._late is None else self._late.fed

    def launch(self, step: Step, hidden: Hidden) -> LateStep | None:
        """Choose a step's tokens on the device; None where the host has to read them at once."""
        if not self.may_leave(step):
            return None
        return LateStep.launch(step, self._runner.logits(hidden, step.sample_rows))

    def may_leave(self, step: Step, *, in_graph: bool = False) -> bool:
        """Return whether a step may stay in flight; in_graph: its logits are soon overwritten."""
        if not self._enabled:
            return False
        takes_back = not (in_graph or self._runner.cache.spec.has_states)
        return can_be_late(step, self._runner.model.vocab_size, takes_back=takes_back)

    def put(self, late: LateStep, void: Collection[int]) -> None:
        """Leave a launched step in flight; `void` as `land_behind` has returned it."""
        late.void, self._late = void, late
        self._scheduler.advance(late.step, void)

    def copy_out(self) -> None:
        """Queue the copy of the tokens to the host, at the end of the step's iteration."""
        if self._late is not None:
            self._late.copy_out()

    def land(self) -> list[Sequence]:
        """Commit the step in flight, if any; return the sequences that finished."""
        return self._land()[0]

    def land_behind(self, step: Step) -> tuple[list[Sequence], Collection[int]]:
        """Commit the step in flight, if any, once `step` is queued behind it.

        Returns:
            The sequences that finished, and the slices of `step` that ran on a wrong token.
        """
        finished, wrong = self._land()
        if not wrong:
            return finished, ()
        return finished, {i for i, piece in enumerate(step.slices) if id(piece.seq) in wrong}

    def _land(self) -> tuple[list[Sequence], set[int]]:
        late, self._late = self._late, None
        if late is None:
            return [], set()
        outcome, wrong = late.read()
        step, void = late.step, late.void
        self.drop_surplus(step, void)
        self._routed.count(step, whole=False, void=void)
        finished = record(self._scheduler, step, outcome, advanced=True, void=void)
        return finished, {id(piece.seq) for piece in wrong}

    def drop_surplus(self, step: Step, void: Collection[int]) -> None:
        """Count the rows of a step whose results are left out, before it is committed."""
        surplus = sum(
            piece.length
            for index, piece in enumerate(step.slices[: step.num_decode])
            if not counts(piece, index, void)
        )
        self._totals.surplus_rows += surplus
        self._totals.tokens_decode -= surplus
