"""Usage: what capacity dropped in an evaluation, and what that gains, over all its engine runs."""

from __future__ import annotations

from dataclasses import dataclass

from engine.profiling.report import RunReport


@dataclass(slots=True)
class Usage:
    """Sums over runs and replicas; rows are those of the ranks of one replica."""

    assignments: int = 0  # top-k assignments subject to capacity
    dropped: int = 0  # of them
    added: int = 0  # extras
    mean: float = 0.0  # rows of the mean rank before capacity, over layers and steps
    slowest: float = 0.0  # rows of the most loaded rank in each layer of each step, before capacity
    slowest_after: float = 0.0  # the same after it
    seconds: float = 0.0  # wall time of the engine's runs

    @classmethod
    def of(cls, report: RunReport, num_ranks: int) -> Usage:
        """Return the sums of one run of one replica.

        Args:
            report: of one of its ranks.
            num_ranks: of the replica.
        """
        mean = sum(sum(layer.expert_loads) for layer in report.layers) / num_ranks
        slowest = report.max_over_mean * mean
        return cls(
            assignments=report.totals.assignments,
            dropped=report.totals.dropped,
            added=report.totals.added,
            mean=mean,
            slowest=slowest,
            slowest_after=slowest / report.speed_bound if report.speed_bound else slowest,
            seconds=report.seconds,
        )

    def add(self, other: Usage) -> None:
        """Add `other` to this."""
        self.assignments += other.assignments
        self.dropped += other.dropped
        self.added += other.added
        self.mean += other.mean
        self.slowest += other.slowest
        self.slowest_after += other.slowest_after
        self.seconds += other.seconds

    @property
    def drop_rate(self) -> float:
        """Share of the assignments subject to capacity that was dropped."""
        return self.dropped / self.assignments if self.assignments else 0.0

    @property
    def speed_bound(self) -> float:
        """The most loaded rank's rows before capacity over after it, as in `RunReport`."""
        return self.slowest / self.slowest_after if self.slowest_after else 1.0

    @property
    def share_after(self) -> float:
        """Share of perfect balance: the mean rank's rows before capacity over the most loaded
        rank's after it.
        """
        return self.mean / self.slowest_after if self.slowest_after else 1.0
