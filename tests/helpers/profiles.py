"""Hand-made steps and profiles for tests of the profiler."""

from __future__ import annotations

import numpy as np

from engine.profiling.collector import Collector, WaitAttribution
from engine.profiling.phase_clock import COLLECTIVE_PHASES, Phase, Spans
from engine.profiling.straggler_causes import RankProfile

MS = 1_000_000


def make_spans(
    *pieces: tuple[Phase, int, float, float] | tuple[Phase, int, float, float, int],
) -> Spans:
    """(phase, layer, start, end[, tokens]) in milliseconds; every collective phase starts one."""
    phases = np.array([piece[0] for piece in pieces])
    waits = np.isin(phases, COLLECTIVE_PHASES)
    starts = np.array([round(piece[2] * MS) for piece in pieces])
    return Spans(
        phases=phases,
        layers=np.array([piece[1] for piece in pieces]),
        tokens=np.array([piece[4] if len(piece) == 5 else 0 for piece in pieces]),
        num_bytes=np.where(waits, 1000, 0),
        collectives=np.where(waits, waits.cumsum() - 1, -1),
        starts=starts,
        ends=np.array([round(piece[3] * MS) for piece in pieces]),
        arrivals=starts[waits],
    )


class Simulation:
    """Ranks that run one MoE layer in lockstep; `step` takes how long each works on what.

    Every collective ends for all ranks `transfer` ms after the last has arrived.
    """

    def __init__(self, num_ranks: int, transfer: float = 0.1) -> None:
        self.collectors = [Collector(1, num_ranks) for _ in range(num_ranks)]
        self.rows = np.zeros(num_ranks)
        self.imbalance = [0.0, 0.0]
        self.transfer = transfer
        self._now = 0.0

    def step(
        self,
        *,
        host: list[float],
        attention: list[float],
        experts: list[float],
        tokens: list[int],
        rows: list[int],
        transfer: float = 0.0,
    ) -> None:
        """Run a step: milliseconds of each rank's work, its attention's tokens, its experts' rows.

        transfer: additional milliseconds of dispatch and combine.
        """
        pieces: list[list[tuple[Phase, int, float, float, int]]] = [[] for _ in host]
        begin = [self._now] * len(host)
        plan = (
            (Phase.OTHER, -1, host, [0] * len(host), Phase.CONTROL, -1, 0.0),
            (Phase.ATTENTION, 0, attention, tokens, Phase.CONSENSUS, 0, 0.0),
            (Phase.PLAN, 0, [0.01] * len(host), [0] * len(host), Phase.DISPATCH, 0, transfer),
            (Phase.EXPERTS, 0, experts, rows, Phase.COMBINE, 0, transfer),
        )
        for phase, layer, work, amount, collective, where, more in plan:
            arrived = [start + each for start, each in zip(begin, work, strict=True)]
            done = max(arrived) + self.transfer + more
            for rank, own in enumerate(pieces):
                own.append((phase, layer, begin[rank], arrived[rank], amount[rank]))
                own.append((collective, where, arrived[rank], done, 0))
            begin = [done] * len(host)
        self._now = begin[0]
        steps = [make_spans(*own) for own in pieces]
        arrivals_WC = np.stack([spans.arrivals for spans in steps])
        for collector, spans in zip(self.collectors, steps, strict=True):
            collector.add(spans, arrivals_WC)
        self.rows += rows
        self.imbalance[0] += max(rows)
        self.imbalance[1] += sum(rows) / len(rows)

    def profiles(self) -> list[RankProfile]:
        """Return every rank's profile; every rank has one expert."""
        return [
            RankProfile(
                rank=rank,
                host=f"h{rank}",
                totals=collector.totals(),
                experts=collector.experts.table,
                attention=collector.attention.table,
                loads_after={0: (rank, [int(self.rows[rank])])},
            )
            for rank, collector in enumerate(self.collectors)
        ]

    def wait_attribution(self) -> WaitAttribution:
        """Return that of the first rank; all have the same."""
        return self.collectors[0].wait_attribution()

    def imbalance_L(self) -> np.ndarray:
        """Return rows of the most loaded rank over the mean rank, summed step by step."""
        return np.array([1.0, self.imbalance[0] / self.imbalance[1]])
