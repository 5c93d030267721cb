"""Reports: what a step and a run tell their user. Plain data; `engine/progress.py` prints it."""

from __future__ import annotations

from dataclasses import dataclass, field


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
class RankReport:
    """One rank's run.

    tokens_prefill, tokens_decode: tokens of its own requests. expert_rows: rows its experts worked
    on. bytes_sent: to other ranks, by the MoE layers. preemptions: sequences whose K/V had to be
    computed again. seconds: keys attention, experts, communication, waiting, other.
    """

    rank: int
    host: str
    tokens_prefill: int
    tokens_decode: int
    expert_rows: int
    bytes_sent: int
    preemptions: int
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One MoE layer's run: max over mean of the ranks' and of the experts' loads, and the experts'
    loads.
    """

    layer: int
    rank_max_over_mean: float
    expert_max_over_mean: float
    expert_loads: list[int]


@dataclass(frozen=True, slots=True)
class RunReport:
    """The whole run, the same on every rank; `layers` are those of the rank's own expert-parallel
    group.

    seconds: wall time of the generation loop, the longest rank's. steps: steps this group ran.
    max_over_mean: rows of the most loaded rank over the mean rank, all layers. latencies: seconds,
    keys `ttft` (one entry a request: pulled from the queue to first token) and `tpot` (one entry a
    request of two tokens or more: mean seconds per later token).
    """

    seconds: float
    steps: int
    ranks: list[RankReport]
    layers: list[LayerReport]
    max_over_mean: float
    latencies: dict[str, list[float]] = field(default_factory=dict)
