"""Live metrics: rank 0 serves Prometheus' text format over HTTP while a job runs.

A snapshot is taken at most once per second; the server thread only reads the last one, so a scrape
does not slow the job down. Label sets are bounded: of ranks and layers only the worst few are
exported, whatever the size of the run. The numbers are those of rank 0's expert-parallel group.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as Source

from engine.profiling.collector import Collector
from engine.profiling.loads import LoadCounter
from engine.profiling.phase_clock import Phase
from engine.profiling.report import StepReport

_EVERY_S = 1.0
WORST = 8


@dataclass(slots=True)
class Snapshot:
    """The values of a scrape."""

    steps: int = 0
    tokens: tuple[int, int] = (0, 0)  # prefill, decode
    running: int = 0
    waiting: int = 0
    finished: int = 0
    phases: dict[str, float] = field(default_factory=dict)  # rank 0's seconds
    waited: float = 0.0  # of them, seconds of waiting for stragglers
    # Share of the steps in which each rank caused the longest wait.
    straggler_share_W: list[float] = field(default_factory=list)
    wait_W: list[float] = field(default_factory=list)  # seconds waited for each rank
    wait_L: list[float] = field(default_factory=list)  # seconds waited in each layer
    before: dict[int, float] = field(default_factory=dict)  # layer -> max over mean rows of ranks
    after: dict[int, float] = field(default_factory=dict)  # the same after capacity


class Metrics(Source):
    """Serves one run's metrics.

    Args:
        ranks: global ranks of the group.

    Raises:
        OSError: the server cannot listen at this host and port.
    """

    def __init__(self, host: str, port: int, ranks: tuple[int, ...]) -> None:
        self._ranks = ranks
        self._snapshot = Snapshot()
        self._shown = 0.0
        self._tokens = [0, 0]
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(port, host, registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def update(self, report: StepReport, collector: Collector, loads: LoadCounter) -> None:
        """Count a step; take a snapshot if the last one is a second old."""
        self._tokens[0] += report.tokens_prefill
        self._tokens[1] += report.tokens_decode
        now = time.monotonic()
        if now - self._shown < _EVERY_S:
            return
        self._shown = now
        totals, attribution = collector.totals(), collector.wait_attribution()
        seconds_P = totals.by_phase()
        steps = max(1, attribution.steps)
        self._snapshot = Snapshot(
            steps=report.step,
            tokens=(self._tokens[0], self._tokens[1]),
            running=report.running,
            waiting=report.waiting,
            finished=report.finished,
            phases={phase.name.lower(): float(seconds_P[phase]) for phase in Phase},
            waited=float(totals.waiting.sum()),
            straggler_share_W=(attribution.straggler_steps / steps).tolist(),
            wait_W=attribution.seconds.sum((1, 2)).tolist(),
            wait_L=attribution.seconds.sum((0, 2))[1:].tolist(),
            before={layer: load.max_over_mean for layer, load in loads.layers.items()},
            after={layer: load.max_over_mean_after for layer, load in loads.layers.items()},
        )

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the last snapshot; runs in the server's thread."""
        now = self._snapshot
        yield _counter("lockstep_steps", "Steps that the group has run.", {(): now.steps})
        prefill, decode = now.tokens
        kinds = {("prefill",): prefill, ("decode",): decode}
        yield _counter("lockstep_tokens", "Tokens that the group has run.", kinds, "kind")
        yield _counter("lockstep_requests_finished", "Requests finished.", {(): now.finished})
        states = {("running",): now.running, ("waiting",): now.waiting}
        yield _gauge("lockstep_requests", "Requests on the ranks.", states, "state")
        phases = {(name,): value for name, value in now.phases.items()}
        text = "Rank 0's seconds in each phase, waiting included."
        yield _counter("lockstep_phase_seconds", text, phases, "phase")
        text = "Rank 0's seconds of waiting for stragglers in collectives."
        yield _counter("lockstep_waiting_seconds", text, {(): now.waited})
        worst = _worst(now.wait_W)
        shares = {(str(self._ranks[index]),): now.straggler_share_W[index] for index in worst}
        text = f"Share of steps in which this rank is the straggler; the {WORST} worst ranks."
        yield _gauge("lockstep_rank_late_ratio", text, shares, "rank")
        waits = {(str(self._ranks[index]),): now.wait_W[index] for index in worst}
        text = f"Seconds that the others waited for this rank; the {WORST} worst ranks."
        yield _gauge("lockstep_rank_lost_seconds", text, waits, "rank")
        layers = {(str(layer),): now.wait_L[layer] for layer in _worst(now.wait_L)}
        text = f"Seconds of waiting for stragglers in this layer; the {WORST} worst layers."
        yield _gauge("lockstep_layer_lost_seconds", text, layers, "layer")
        uneven = sorted(now.before, key=lambda layer: -now.before[layer])[:WORST]
        loads = {
            (str(layer), when): values[layer]
            for layer in uneven
            for when, values in (("before", now.before), ("after", now.after))
        }
        text = (
            "Rows of the most loaded rank over the mean rank, before and after capacity; the "
            f"{WORST} most uneven layers."
        )
        yield _gauge("lockstep_layer_load_ratio", text, loads, "layer", "when")


def _worst(values: list[float]) -> list[int]:
    """Return the indices of the largest values above 0, at most `WORST`."""
    return [int(index) for index in np.argsort(values)[::-1][:WORST] if values[index] > 0]


def _family(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    text: str,
    values: Mapping[Any, float],
    *labels: str,
) -> Metric:
    """Build a metric; values: tuple of label values -> sample."""
    family = kind(name, text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


_counter, _gauge = partial(_family, CounterMetricFamily), partial(_family, GaugeMetricFamily)
