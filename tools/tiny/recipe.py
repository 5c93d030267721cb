"""Training recipe: steps, data and learning rate, everything that decides the result.

Read by tools/train_tiny.py. Steps are absolute, so a run can be cut short and resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tiny.tasks import LATE_SHARES, TRAIN_SHARES


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Steps up to `until`: rows of `length` tokens, the first `num_task_rows` of them tasks.

    `task_shares` is how often each task is drawn.
    """

    until: int
    num_rows: int
    length: int
    num_task_rows: int
    task_shares: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Phases, learning rate and coefficients of one run."""

    phases: tuple[Phase, ...]
    rate_knots: tuple[tuple[int, float], ...]  # (step, share of the rate), joined by lines
    seed: int = 20
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    balance_coefficient: float = 0.005
    gradient_clip: float = 1.0

    @property
    def steps(self) -> int:
        """Length of the whole run."""
        return self.phases[-1].until

    @property
    def num_tokens(self) -> int:
        """Tokens seen in the whole run."""
        starts = (0, *(phase.until for phase in self.phases))
        return sum(
            (phase.until - start) * phase.num_rows * phase.length
            for start, phase in zip(starts, self.phases, strict=False)
        )

    def phase(self, step: int) -> Phase:
        """Return the phase of `step` (0-based)."""
        return next(phase for phase in self.phases if step < phase.until)

    def rate(self, step: int) -> float:
        """Return learning rate at `step`: linear warm-up, then the knots."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        for (start, high), (end, low) in zip(self.rate_knots, self.rate_knots[1:], strict=False):
            if step < end:
                share = high + (low - high) * (step - start) / (end - start)
                return self.learning_rate * min(warm, share)
        return 0.0


RECIPES = {
    "mixtral": Recipe(
        phases=(
            Phase(until=1800, num_rows=9, length=256, num_task_rows=4, task_shares=TRAIN_SHARES),
            Phase(until=3000, num_rows=5, length=512, num_task_rows=3, task_shares=LATE_SHARES),
        ),
        rate_knots=((0, 1.0), (1200, 1.0), (3000, 0.0)),
    ),
    # Learns copying and recall sooner, for its share of task rows; sums come last.
    "olmoe": Recipe(
        phases=(
            Phase(until=1100, num_rows=10, length=256, num_task_rows=6, task_shares=TRAIN_SHARES),
            Phase(until=2250, num_rows=5, length=512, num_task_rows=3, task_shares=LATE_SHARES),
        ),
        rate_knots=((0, 1.0), (800, 1.0), (1100, 2 / 3), (2250, 0.0)),
    ),
}
