"""MeasuredRun: everything that measures one run of the generation loop, on one rank.

    with MeasuredRun(config, topology, model, scheduler, telemetry, exporters) as run:
        loop = GenerationLoop(..., run.step_profiler, ...)
        loop.run(source, run.timed(sink))
    report = run.report(loop.totals, resolved_settings, clock_error)

Counters of the layers and of the scheduler run for as long as the engine lives: the block notes
them when it begins, and the report has the differences. What the loop measures step by step goes
through `generation/step_profiler.py`. `run_report.py` turns the result into a report.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from engine.config import Config
from engine.distributed.groups import Topology
from engine.generation import latency
from engine.generation.loop import Totals
from engine.generation.request_source import Sink
from engine.generation.scheduler import Scheduler
from engine.generation.step_profiler import StepProfiler
from engine.models.decoder import CausalLM
from engine.profiling.collector import Collector
from engine.profiling.deepspeed_comms import CommsTable
from engine.profiling.exporters import Exporters
from engine.profiling.report import RunReport
from engine.profiling.stall_detector import StallDetector
from engine.profiling.telemetry import Telemetry
from engine.reporting.run_report import Measurements, run_report


class MeasuredRun:
    """Measures one run: enter before the loop, leave after it, then ask for the report."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        model: CausalLM,
        scheduler: Scheduler,
        telemetry: Telemetry,
        exporters: Exporters,
    ) -> None:
        """Args:
        scheduler: its preemptions are counted.
        telemetry: the clock and the counters that the layers write to; its loads are cleared.
        exporters: open ones; closed at the end of the block, also after an error.
        """
        self._capacity = config.moe.capacity
        self._topology = topology
        self._layers = model.moe_layers
        self._scheduler = scheduler
        self._loads = telemetry.loads
        self._exporters = exporters
        self._stalls = StallDetector(config.profiler.enabled)
        self._latencies = {"ttft": latency.Sample(), "tpot": latency.Sample()}
        self._comms: CommsTable = {}
        self.step_profiler = StepProfiler(
            telemetry,
            Collector(model.num_layers, topology.expert.size, topology.tensor_rank_offsets),
            exporters,
            speed_aware=self._capacity.speed_aware,
            logs=topology.world.rank == 0,
        )

    def __enter__(self) -> MeasuredRun:
        self._preemptions = self._scheduler.num_preemptions
        self._traffic = self._count_traffic()
        for layer in self._layers:
            layer.account.take()
        self._loads.clear()
        self._began = time.monotonic()
        self._stalls.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stalls.__exit__(kind, error, traceback)
        try:
            if error is None:
                self._comms = self._exporters.comms_table()
        finally:
            self._exporters.close()

    def timed(self, sink: Sink) -> Sink:
        """Wrap a sink so that the latencies of its completions are part of the report."""
        return latency.timed(sink, self._latencies)

    def report(
        self, totals: Totals, resolved_settings: dict[str, Any], clock_error: float
    ) -> RunReport:
        """Return the report of the run, the same on every rank of a replica.

        Args:
            totals: the loop's.
            resolved_settings: setting -> the value it has on this rank.
            clock_error: uncertainty of this rank's clock against the others', in seconds.

        Collective over all ranks: every rank must call.
        """
        traffic = {
            layer: (num_bytes - self._traffic[layer][0], num_collectives - self._traffic[layer][1])
            for layer, (num_bytes, num_collectives) in self._count_traffic().items()
        }
        measurements = Measurements(
            seconds=time.monotonic() - self._began,
            totals=totals,
            collector=self.step_profiler.collector,
            latencies={key: sample.taken() for key, sample in self._latencies.items()},
            loads=self._loads,
            traffic=traffic,
            preemptions=self._scheduler.num_preemptions - self._preemptions,
            drops={layer.layer: layer.account.take() for layer in self._layers},
            policy=self._capacity.policy,
            clock_error=clock_error,
            shares_W=self.step_profiler.shares_W,
            comms=self._comms,
            resolved_settings=resolved_settings,
            process_stalls=(self._stalls.count, self._stalls.seconds),
        )
        return run_report(measurements, self._topology)

    def _count_traffic(self) -> dict[int, tuple[int, int]]:
        """Layer -> bytes sent to other ranks and collectives called since the engine was built."""
        return {layer.layer: (layer.bytes_sent, layer.num_collectives) for layer in self._layers}
