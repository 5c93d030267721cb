"""Reports: what was measured of a step and of a run. Plain data.

`reporting/summary.py` prints a run's report and writes it as JSON, under keys that it maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from engine.profiling.cost_model import ExpertCost
from engine.profiling.deepspeed_comms import CommsTable
from engine.profiling.findings import Finding


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, summed over the ranks that run in lockstep."""

    step: int
    tokens_prefill: int  # tokens run in this step
    tokens_decode: int
    running: int  # requests
    waiting: int
    finished: int  # requests since the run began
    max_over_mean: float  # rows of the most loaded expert rank over the mean, this step
    elapsed: float  # seconds since the run began


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """One phase of one rank over a run."""

    seconds: float
    waiting: float  # of the seconds, those of waiting for stragglers
    tokens: int  # processed; rows in dispatch, experts and combine
    bytes_sent: int  # to other ranks


@dataclass(frozen=True, slots=True)
class RankPlacement:
    """The copies of one rank, in a run with moe.placement."""

    copied_rows: int  # that its copies computed
    copy_bytes: int  # memory of their weights


@dataclass(frozen=True, slots=True)
class LayerPlacementReport:
    """The copies of one MoE layer; see `RunPlacement` for the shares."""

    copied_rows: int  # that copies computed
    expert_copied_rows: list[int]  # the same by expert
    share: float
    share_after: float


@dataclass(frozen=True, slots=True)
class RunPlacement:
    """The placement of a run, and what its copies did in one expert-parallel group.

    A share of perfect balance is the mean rank's rows before capacity over the most loaded rank's.
    """

    file: str  # moe.placement
    digest: str  # equal for equal placements
    precision: str  # of copies
    copies: int  # of all layers
    copied_rows: int  # that copies computed
    share: float  # if every expert's rows were at its home, over all layers
    share_after: float  # as run: after capacity and the split over copies


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's run."""

    rank: int
    host: str
    tokens_prefill: int  # tokens of its own requests
    tokens_decode: int
    expert_rows: int  # rows that its experts processed
    bytes_sent: int  # to other ranks, by the MoE layers
    num_collectives: int  # called by the MoE layers
    preemptions: int  # sequences whose K/V had to be computed again
    seconds: dict[str, float]  # keys attention, experts, communication, waiting, other
    phases: dict[str, PhaseReport] = field(default_factory=dict)  # the same time per phase
    relative_compute_time: float = 1.0  # its seconds over its peers' for the same calls
    straggler_share: float = 0.0  # share of the steps in which it caused the longest wait
    # cause -> seconds that a mean rank waited for this one
    wait_caused: dict[str, float] = field(default_factory=dict)
    comms: CommsTable = field(default_factory=dict)  # filled by profiler.deepspeed_comms
    # setting -> value, of the settings that the engine may choose
    resolved_settings: dict[str, Any] = field(default_factory=dict)
    process_stall_seconds: float = 0.0  # time in which its process did not run
    placement: RankPlacement | None = None  # None: without moe.placement
    expert_cost: ExpertCost | None = None  # None: no call was timed
    # Memory of the recurrent states of all sequences that may run at once; None: the model has none
    state_bytes: int | None = None
    # Rows of sequences that had ended, which steps scheduled ahead have run (not in tokens_decode);
    # None: there were none
    surplus_rows: int | None = None


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One MoE layer's run."""

    layer: int
    rank_max_over_mean: float  # rows of the most loaded rank over the mean, before capacity
    rank_max_over_mean_after: float  # after capacity
    expert_max_over_mean: float  # the same of the experts
    expert_max_over_mean_after: float
    # Rows of each expert. In the model's last layer, if no token is subject to capacity, only those
    # of tokens whose output is read.
    expert_loads: list[int]
    expert_loads_after: list[int]
    assignments: int = 0  # top-k assignments subject to capacity
    dropped: int = 0  # of them
    added: int = 0  # extras, not counted in `assignments`
    orphans: int = 0  # tokens that kept no expert, and no zero expert
    gate_mass_kept: float = 1.0  # share of the combine weights that survived, without extras
    drop_rate: float = 0.0  # dropped / assignments
    bytes_sent: int = 0  # to other ranks, by all ranks of the group
    num_collectives: int = 0  # called by each rank
    seconds: dict[str, float] = field(default_factory=dict)  # phase -> of a mean rank, with waiting
    wait: float = 0.0  # seconds that a mean rank waited for stragglers in this layer
    # cause -> seconds of a mean rank in this layer; network: of transfer
    wait_by_cause: dict[str, float] = field(default_factory=dict)
    # Rows of the shared expert that another rank than their token's computed, over all ranks of the
    # group; None: moe.shared_expert is replicated, and report.json has no such key.
    shared_rows_moved: int | None = None
    placement: LayerPlacementReport | None = None  # None: the layer has no copies
    # Assignments to zero experts of tokens subject to capacity, not counted in `assignments`; None:
    # there were none, and report.json has no such key.
    zero_assignments: int | None = None


@dataclass(frozen=True, slots=True)
class LayerTotals:
    """All MoE layers of one expert-parallel group together, over a run; as in `LayerReport`."""

    assignments: int = 0
    dropped: int = 0
    added: int = 0
    orphans: int = 0  # (token, layer) pairs that kept no expert
    gate_mass_kept: float = 1.0
    drop_rate: float = 0.0
    bytes_sent: int = 0  # to other ranks, by all ranks of the group
    collectives_per_call: float = 0.0  # mean of a rank's collectives in one layer of one step


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """What a run has recorded of one expert-parallel group's routing (`profiling/routing`)."""

    folder: str
    segment: int  # of the trace, from 1
    steps: int  # of this run, with their loads
    every: int  # of so many steps one was kept
    claims_steps: int | None = None  # steps with claims of the first rank; None: not recorded


# kept: within the tolerance. The others are below the promise by more. other phases: copies do not
# take the rows of all tokens. small steps: as much as steps of this size have. plan again: the mean
# loads have drifted. uneven steps: they have not, but single steps are less even than planned.
PlanVerdict = Literal[
    "kept", "too few rows", "other phases", "small steps", "plan again", "uneven steps"
]


@dataclass(frozen=True, slots=True)
class PlanLayerReport:
    """What a placement promised for one MoE layer, and what the run got."""

    layer: int
    promised: float  # share of perfect balance, for the nearest domain
    share: float  # of the run
    distance: float  # share of the rows that are at other experts than in the nearest domain


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What a placement promised and what one expert-parallel group got (`plan_drift.py`)."""

    file: str  # moe.placement
    domain: str  # the nearest to the run's loads
    distance: float  # to it: share of the rows that are at other experts, of a mean layer
    distances: dict[str, float]  # the same to every domain
    promised: float  # share of perfect balance over all layers; for low-bit copies at most the
    # share up to which they take rows
    share: float  # of the run
    # Of steps of the run's size with the planned loads, and with the run's mean loads; None where
    # the promise was kept.
    expected: float | None
    predicted: float | None
    verdict: PlanVerdict
    layers: list[PlanLayerReport]
    text: Sequence[str]  # sentences


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """The policy of a run (moe.policy), what it promised and the share that the run got."""

    file: str  # moe.policy
    digest: str  # equal for equal policies
    ranks: int | None  # that it was made for; None: any number
    model: str | None  # fingerprint of the model that it was made for
    data: dict[str, str]  # fingerprints of its calibration data
    placement: str | None  # digest of its placement
    # By layer that may drop something: policy, factor, scope, order, consensus, phases.
    layers: dict[int, dict[str, Any]]
    expected: dict[str, Any] | None  # share, loss, bound, confidence, measure; None: not measured
    share: float  # of perfect balance over all layers, as run


@dataclass(frozen=True, slots=True)
class RunReport:
    """The whole run.

    The same on every rank, except for what describes the rank's own expert-parallel group: layers,
    totals, steps, max_over_mean, max_over_mean_after, speed_bound, routing, plan, and the
    placement's rows and shares.
    """

    seconds: float  # wall time of the generation loop, the maximum over the ranks
    steps: int
    ranks: list[RankReport]
    layers: list[LayerReport]
    max_over_mean: float  # rows of the most loaded rank over the mean rank, before capacity
    max_over_mean_after: float = 1.0  # after capacity
    # How much faster capacity can have made the MoE layers: the sum of the most loaded rank's rows
    # before it over that after it.
    speed_bound: float = 1.0
    totals: LayerTotals = field(default_factory=LayerTotals)
    # Seconds, float64. ttft: per request, from the queue to its first token. tpot: per request of
    # two tokens or more, the mean time per later token. Samples if a rank had more requests than
    # `generation/latency.py` keeps; percentiles are estimates then.
    latencies: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    findings: list[Finding] = field(default_factory=list)  # of every group, the costliest first
    # cause -> seconds of a mean rank that waited; network: of transfer
    wait_caused: dict[str, float] = field(default_factory=dict)
    clock_error: float = 0.0  # uncertainty between the ranks' clocks, seconds, the worst rank's
    # Each rank's share of the capacity at the end, 1 being even; None if always even.
    capacity_shares: list[float] | None = None
    routing: RoutingReport | None = None  # where profiler.routing has recorded; None: it has not
    placement: RunPlacement | None = None  # None: without moe.placement
    plan: PlanReport | None = None  # None: moe.placement has no domains
    # By what assignments are ranked in a model that transformers builds: "scores", of all experts,
    # or "combine weights" of the chosen ones, in some layer. None: it is a model of this engine.
    ranked_by: str | None = None
    policy: PolicyReport | None = None  # None: without moe.policy

    @property
    def has_copies(self) -> bool:
        """Whether some expert has a copy."""
        return self.placement is not None and self.placement.copies > 0
