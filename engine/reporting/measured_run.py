"""MeasuredRun: everything that measures one run of the generation loop, on one rank.

    with MeasuredRun(config, topology, model, scheduler, telemetry, exporters) as run:
        loop = GenerationLoop(..., run.step_profiler, ...)
        loop.run(source, run.timed(sink))
    report = run.report(loop.totals, resolved_settings, clock_error)

Counters of the layers and of the scheduler run for as long as the engine lives: their values at the
begin of the block are subtracted in the report. Measurements of each step go through
`generation/step_profiler.py`. `run_report.py` computes the report from all of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config import Config
from engine.distributed.groups import Topology
from engine.generation import latency
from engine.generation.request_source import Sink
from engine.generation.scheduler import Scheduler
from engine.generation.step_profiler import StepProfiler
from engine.generation.totals import Totals
from engine.models.language_model import LanguageModel
from engine.moe.policy.policy import Policy
from engine.profiling.collector import Collector
from engine.profiling.exporters import Exporters
from engine.profiling.report import RunReport
from engine.profiling.stall_detector import StallDetector
from engine.profiling.telemetry import Telemetry
from engine.reporting.copies_report import own_placement
from engine.reporting.plan_drift import plan_in_use
from engine.reporting.policy_report import policy_report
from engine.reporting.run_report import Measurements, run_report


@dataclass
class MeasuredRun:
    """Measures one run: its block contains the generation loop; `report` follows the block."""

    config: Config
    topology: Topology
    model: LanguageModel
    scheduler: Scheduler  # its preemptions are counted
    telemetry: Telemetry  # the clock and the counters of the layers; its loads are reset
    exporters: Exporters  # open ones; closed at the end of the block, also after an error
    policy: Policy | None = None  # of moe.policy

    def __enter__(self) -> MeasuredRun:
        topology, tensor_ranks = self.topology, self.topology.tensor_rank_offsets
        every = self.telemetry.clock.every
        self.step_profiler = StepProfiler(
            self.telemetry,
            Collector(self.model.num_layers, topology.expert.size, tensor_ranks, every),
            self.exporters,
            speed_aware=self.config.moe.capacity.speed_aware,
            logs=topology.world.rank == 0,
        )
        self._latencies = {"ttft": latency.Sample(), "tpot": latency.Sample()}
        self._preemptions, self._traffic = self.scheduler.num_preemptions, self._count_traffic()
        for layer in self.model.moe_layers:
            layer.drops.read_and_reset()
        self.telemetry.loads.clear()
        self._plan = plan_in_use(self.model.placement, self.config)
        if self._plan is not None and self._plan.placement.row_times_W:
            self.telemetry.loads.row_times_W = np.array(self._plan.placement.row_times_W)
        self._began = time.monotonic()
        self._stalls = StallDetector(self.config.profiler.enabled)
        self._stalls.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stalls.__exit__()
        try:
            self._comms = self.exporters.comms_table() if kind is None else {}
        finally:
            self.exporters.close()

    def timed(self, sink: Sink) -> Sink:
        """Wrap a sink so that the latencies of its completions become part of the report."""
        return latency.timed(sink, self._latencies)

    def report(self, totals: Totals, settings: dict[str, Any], clock_error: float) -> RunReport:
        """Return the report of the run.

        Args:
            totals: the loop's.
            settings: setting -> the value it has on this rank, where the engine may choose it.
            clock_error: uncertainty of this rank's clock against the others', in seconds.

        Collective over all ranks: every rank must call.
        """
        before = self._traffic
        measured = Measurements(
            seconds=time.monotonic() - self._began,
            totals=totals,
            latencies={key: sample.sampled() for key, sample in self._latencies.items()},
            traffic={
                layer: (num_bytes - before[layer][0], num_collectives - before[layer][1])
                for layer, (num_bytes, num_collectives) in self._count_traffic().items()
            },
            preemptions=self.scheduler.num_preemptions - self._preemptions,
            drops={layer.layer: layer.drops.read_and_reset() for layer in self.model.moe_layers},
            policy=self.config.moe.capacity.policy,
            clock_error=clock_error,
            weights_W=self.step_profiler.weights_W,
            comms=self._comms,
            resolved_settings=settings,
            process_stalls=(self._stalls.count, self._stalls.seconds),
            routing=self.exporters.routing_report(),
            placement=own_placement(self.model, self.config.moe.placement),
            state_bytes=self.model.kv_spec.state_bytes * self.scheduler.max_sequences or None,
        )
        collector, loads = self.step_profiler.collector, self.telemetry.loads
        report = run_report(measured, collector, loads, self.topology, self._plan)
        policy = None
        if self.policy is not None:
            policy = policy_report(self.policy, self.config.moe.policy or "", loads.share_after())
        return replace(report, ranked_by=self._ranked_by(), policy=policy)

    def _ranked_by(self) -> str | None:
        """Return by what a policy ranks assignments, in a model that transformers builds."""
        routers = [layer.spec.router for layer in self.model.moe_layers]
        external = any(router.external is not None for router in routers)
        if not external or self.config.moe.capacity.policy == "none":
            return None
        known = all(router.scores_known for router in routers)
        return "scores" if known else "combine weights"

    def _count_traffic(self) -> dict[int, tuple[int, int]]:
        """Return layer -> bytes sent and collectives called since the engine was built."""
        layers = self.model.moe_layers
        return {layer.layer: (layer.bytes_sent, layer.num_collectives) for layer in layers}
