"""Exporters: pass a run's measurements on while it runs: span files, routing traces,
metrics, DeepSpeed's logger.

Each is optional. `reporting/open_exporters.py` opens those that the config asks for. The report of
a run does not depend on them, except for DeepSpeed's table.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.profiling.collector import Collector
from engine.profiling.deepspeed_comms import CommsTable, DeepSpeedComms
from engine.profiling.loads import LoadCounter
from engine.profiling.phase_clock import Spans
from engine.profiling.report import RoutingReport, StepReport
from engine.profiling.routing.recorder import RoutingRecorder
from engine.profiling.span_file import SpanWriter
from engine.profiling.telemetry import Telemetry

if TYPE_CHECKING:  # its HTTP server is imported only where it is used
    from engine.profiling.metrics import Metrics


def check_listen(host: str, port: int) -> None:
    """Check that the metrics can be served at an address, which is closed again.

    Raises:
        OSError: the name is unknown, or the address cannot be opened.
        UnicodeError: it cannot be a name.
    """
    flags = socket.AI_PASSIVE
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        probe.bind(address)
        probe.listen(1)


@dataclass(slots=True)
class Exporters:
    """The exporters of one run on one rank."""

    spans: SpanWriter | None = None  # profiler.spans
    routing: RoutingRecorder | None = None  # profiler.routing
    metrics: Metrics | None = None  # profiler.metrics_port, on rank 0
    comms: DeepSpeedComms | None = None  # profiler.deepspeed_comms

    def start(self, telemetry: Telemetry) -> None:
        """Have the loads of each step recorded, if there is a span file or a routing trace."""
        is_read = self.spans is not None or self.routing is not None
        telemetry.loads.step = {} if is_read else None
        if self.routing is not None:
            self.routing.start(telemetry.claims)

    def count(self, spans: Spans) -> None:
        """Log one step's collectives with DeepSpeed, if the step is complete."""
        if self.comms is not None and spans.complete:
            self.comms.add(spans)

    def comms_table(self) -> CommsTable:
        """Return DeepSpeed's table of this rank's collectives; empty unless it is on."""
        return self.comms.table() if self.comms is not None else {}

    def update(self, report: StepReport, collector: Collector, loads: LoadCounter) -> None:
        """Record the routing of a step that has ended, and update the metrics."""
        if self.routing is not None and loads.step is not None:
            self.routing.add(report, loads.step)
        if self.metrics is not None:
            self.metrics.update(report, collector, loads)

    def routing_report(self) -> RoutingReport | None:
        """Return what was recorded of the routing; None where it is not."""
        return self.routing.report() if self.routing is not None else None

    def close(self) -> None:
        """Close all exporters."""
        for exporter in (self.spans, self.routing, self.metrics, self.comms):
            if exporter is not None:
                exporter.close()
