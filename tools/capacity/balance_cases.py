"""Cases of the balance report: which placement, under which capacity, on which prompts.

A case may carry a demand on its loss, tasks and share; it holds for the bundled checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from capacity.calibration import TASKS
from capacity.jobs import TEXT
from engine.config import CapacityConfig
from engine.moe.placement.placement import Precision

GAMMA = "1.0526"  # 1 / 0.95: ranks get at most what leaves the mean rank 95% of it
DEMANDED_GAMMA = "1.05"  # where something is demanded, decode's rows are left room within the share
MIXED = "mixed"  # the evaluation job with texts and tasks, or a plan for calibration data with as
# much of each; the others have one of the two
ROBUST = "robust"  # planned for texts, tasks and both mixed


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a case has to reach."""

    share: float
    loss: float | None = None  # most loss added, % of dropless
    tasks: float | None = None  # fewest points of task accuracy
    exact: bool = False  # tokens and log probabilities of dropless, bit for bit

    @property
    def text(self) -> str:
        """The demand in a table's cell."""
        if self.exact:
            return f"bit for bit, share {self.share:.2f}"
        return f"loss +{self.loss:.2f}%, tasks {self.tasks:+.2f}, share {self.share:.2f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of the table."""

    copies: int = 0  # per layer
    precision: Precision = "model"  # of the copies
    planned_for: str = ROBUST
    gamma: str | None = None  # of Token Drop, scope rank; None: dropless
    job: str = MIXED  # that is run
    demand: Demand | None = None

    @property
    def name(self) -> str:
        """The mechanism in words."""
        words = []
        if self.copies:
            kind = "full-precision" if self.precision == "model" else self.precision
            words.append(f"{self.copies} {kind} {'copy' if self.copies == 1 else 'copies'}")
            if self.planned_for != ROBUST:
                words[-1] += f" planned for {self.planned_for}"
        words.append("dropless" if self.gamma is None else f"Token Drop {self.gamma}")
        return ", ".join(words)

    @property
    def placement(self) -> tuple[int, str, str]:
        """What the engine is built for: cases with the same one share it."""
        return self.copies, self.precision, self.planned_for

    @property
    def capacity(self) -> CapacityConfig:
        """The setting of moe.capacity."""
        if self.gamma is None:
            return CapacityConfig()
        return CapacityConfig(policy="token_drop", scope="rank", factor=self.gamma)


def make_cases(checkpoint: str, ranks: int, counts: Sequence[int]) -> list[Case]:
    """Return the cases of one model and number of ranks, dropless first.

    Args:
        checkpoint: its folder's name, for the demands.
        ranks: W.
        counts: of int4 copies per layer; W is always among them.
    """
    cases = [Case(), Case(gamma=GAMMA)]
    cases += [Case(copies=count) for count in sorted({ranks // 2, ranks})]
    whole = Demand(share=0.99, exact=True)
    cases.append(Case(copies=ranks, planned_for=MIXED, demand=whole))
    demanded, demand = _demand(checkpoint, ranks)
    low = Case(copies=ranks, precision="int4", gamma=GAMMA)
    for count in sorted({count for count in counts if count <= ranks} | {ranks}):
        cases.append(replace(low, copies=count))
    low = replace(low, gamma=DEMANDED_GAMMA)
    if demanded is not None:
        cases.append(replace(low, copies=demanded, demand=demand))
    alone = None
    if (checkpoint, ranks) == ("tiny_mixtral", 8):
        alone = Demand(share=0.95, loss=0.06, tasks=-0.5)
    for planned_for in (ROBUST, TEXT, TASKS):
        for job in (TEXT, TASKS):
            wanted = alone if planned_for == ROBUST else None
            cases.append(replace(low, planned_for=planned_for, job=job, demand=wanted))
    return cases


def _demand(checkpoint: str, ranks: int) -> tuple[int | None, Demand | None]:
    """Return the int4 copies of which something is demanded, and what."""
    copies = {
        ("tiny_mixtral", 4): 4,
        ("tiny_mixtral", 8): 8,
        ("tiny_olmoe", 4): 1,
        ("tiny_olmoe", 8): 4,
    }.get((checkpoint, ranks))
    if copies is None:
        return None, None
    loss = 0.05 if checkpoint == "tiny_mixtral" else 0.02
    return copies, Demand(share=0.95, loss=loss, tasks=-0.25)
