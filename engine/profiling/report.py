"""Reports: what a step and a run tell their user. Plain data; `progress.py` prints it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.profiling.deepspeed_comms import CommsTable
from engine.profiling.findings import Finding


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, summed over the ranks that run in lockstep.

    tokens_prefill, tokens_decode: tokens run in this step. running, waiting, finished: requests,
    totals over the ranks. max_over_mean: rows of the most loaded expert rank over the mean, this
    step. elapsed: seconds since the run began.
    """

    step: int
    tokens_prefill: int
    tokens_decode: int
    running: int
    waiting: int
    finished: int
    max_over_mean: float
    elapsed: float


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """One phase of one rank over a run. seconds: all of it; waiting: of them, for late peers.
    tokens: that it worked on, rows in dispatch, experts and combine. bytes_sent: to other ranks.
    """

    seconds: float
    waiting: float
    tokens: int
    bytes_sent: int


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's run.

    tokens_prefill, tokens_decode: tokens of its own requests. expert_rows: rows its experts worked
    on. bytes_sent, num_collectives: to other ranks and with them, by the MoE layers. preemptions:
    sequences whose K/V had to be computed again. seconds: keys attention, experts, communication,
    waiting, other. phases: the same time phase by phase. slowness: its seconds of compute over what
    its peers would have needed for the same calls. late_share: share of the steps in which the
    others lost most to this rank. lost: seconds that its being late cost the others, by cause.
    comms: DeepSpeed's table of its collectives, empty unless profiler.deepspeed_comms. resolved:
    what settings that may be left to the engine have come to on this rank. absent: seconds in which
    its process did not run.
    """

    rank: int
    host: str
    tokens_prefill: int
    tokens_decode: int
    expert_rows: int
    bytes_sent: int
    num_collectives: int
    preemptions: int
    seconds: dict[str, float]
    phases: dict[str, PhaseReport] = field(default_factory=dict)
    slowness: float = 1.0
    late_share: float = 0.0
    lost: dict[str, float] = field(default_factory=dict)
    comms: CommsTable = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    absent: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One MoE layer's run.

    rank_max_over_mean, expert_max_over_mean: rows of the most loaded over the mean, before capacity
    and after it. expert_loads, expert_loads_after: rows of each expert; in the model's last layer,
    where no token competes, of those tokens alone whose output is read. assignments: top-k
    assignments that competed for capacity; dropped, added: of them, and extras beside them.
    orphans: tokens that kept no expert. gate_mass_kept: share of the competing tokens' combine
    weights that survived, extras not counted. bytes_sent: to other ranks, by all ranks of the
    group. num_collectives: that each rank called. seconds: of each phase, a mean rank's, waiting
    included. lost: seconds that a mean rank waited in this layer for late ones. lost_by_cause: of a
    mean rank's time here, what unequal loads, unequal tokens, a slow device, the host and the
    network cost.
    """

    layer: int
    rank_max_over_mean: float
    rank_max_over_mean_after: float
    expert_max_over_mean: float
    expert_max_over_mean_after: float
    expert_loads: list[int]
    expert_loads_after: list[int]
    assignments: int = 0
    dropped: int = 0
    added: int = 0
    orphans: int = 0
    gate_mass_kept: float = 1.0
    drop_rate: float = 0.0
    bytes_sent: int = 0
    num_collectives: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    lost: float = 0.0
    lost_by_cause: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LayerTotals:
    """All MoE layers of one expert-parallel group together, over a run.

    assignments, dropped, added, gate_mass_kept, drop_rate: as in `LayerReport`. orphans: (token,
    layer) pairs that kept no expert. bytes_sent: to other ranks, by all ranks of the group.
    collectives_per_call: that each rank called in one layer of one step, the mean.
    """

    assignments: int = 0
    dropped: int = 0
    added: int = 0
    orphans: int = 0
    gate_mass_kept: float = 1.0
    drop_rate: float = 0.0
    bytes_sent: int = 0
    collectives_per_call: float = 0.0


@dataclass(frozen=True, slots=True)
class RunReport:
    """The whole run, the same on every rank; `layers` and their `totals` are those of the rank's
    own expert-parallel group, as are steps, max_over_mean, max_over_mean_after and speed_bound.

    seconds: wall time of the generation loop, the longest rank's. steps: steps this group ran.
    max_over_mean, max_over_mean_after: rows of the most loaded rank over the mean rank, all layers,
    before capacity and after it. speed_bound: how much faster the MoE layers can have become by it,
    the sum of the most loaded rank's rows before over that after. latencies: seconds, keys `ttft`
    (one entry a request: pulled from the queue to first token) and `tpot` (one entry a request of
    two tokens or more: mean seconds per later token), float64; a sample, whose percentiles are
    estimates, where a rank had more than `latency.py` keeps, 100,000. verdict: who was slow
    and why, in every group. lost: seconds that a mean rank lost, by cause. clock_error:
    uncertainty of the ranks' clocks against each other, seconds, the worst rank's. capacity_shares:
    each rank's share of the capacity at the end, 1 being even; None where all were the same
    throughout.
    """

    seconds: float
    steps: int
    ranks: list[RankReport]
    layers: list[LayerReport]
    max_over_mean: float
    max_over_mean_after: float = 1.0
    speed_bound: float = 1.0
    totals: LayerTotals = field(default_factory=LayerTotals)
    latencies: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    verdict: list[Finding] = field(default_factory=list)
    lost: dict[str, float] = field(default_factory=dict)
    clock_error: float = 0.0
    capacity_shares: list[float] | None = None
