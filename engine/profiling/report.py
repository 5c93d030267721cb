"""Reports: what a step and a run tell their user. Plain data; `engine/progress.py` prints it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, summed over the ranks that run in lockstep.

    tokens_prefill, tokens_decode: tokens run in this step. running, waiting, finished: requests, totals over the ranks.
    max_over_mean: rows of the most loaded expert rank over the mean, this step. elapsed: seconds since the run began.
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
    """One rank's run: tokens it ran, rows its experts worked on, seconds in each kind of work."""

    rank: int
    host: str
    tokens_prefill: int
    tokens_decode: int
    expert_rows: int
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One MoE layer's run: max over mean of the ranks' and of the experts' loads, and the experts' loads."""

    layer: int
    rank_max_over_mean: float
    expert_max_over_mean: float
    expert_loads: list[int]


@dataclass(frozen=True, slots=True)
class RunReport:
    """The whole run. Rank 0 holds every rank's rows; other ranks hold their own lockstep group's.

    seconds: wall time of the generation loop. steps: steps run. latencies: seconds, one entry a request, keys `ttft`
    (submission to first token) and `tpot` (mean seconds per later token). preemptions: sequences recomputed.
    """

    seconds: float
    steps: int
    ranks: list[RankReport]
    layers: list[LayerReport]
    max_over_mean: float
    bytes_sent: int
    collectives: int
    preemptions: int = 0
    latencies: dict[str, list[float]] = field(default_factory=dict)
