"""Exporters: pass a run's measurements on while it runs: span files, metrics, DeepSpeed's logger.

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
from engine.profiling.report import StepReport
from engine.profiling.span_file import SpanWriter

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
    metrics: Metrics | None = None  # profiler.metrics_port, on rank 0
    comms: DeepSpeedComms | None = None  # profiler.deepspeed_comms

    def start(self, loads: LoadCounter) -> None:
        """Have the loads of each step recorded, if there is a span file."""
        loads.step = {} if self.spans is not None else None

    def count(self, spans: Spans) -> None:
        """Log one step's collectives with DeepSpeed, if the step is complete."""
        if self.comms is not None and spans.complete:
            self.comms.add(spans)

    def comms_table(self) -> CommsTable:
        """Return DeepSpeed's table of this rank's collectives; empty unless it is on."""
        return self.comms.table() if self.comms is not None else {}

    def update(self, report: StepReport, collector: Collector, loads: LoadCounter) -> None:
        """Update the metrics after a step."""
        if self.metrics is not None:
            self.metrics.update(report, collector, loads)

    def close(self) -> None:
        """Close all exporters."""
        for exporter in (self.spans, self.metrics, self.comms):
            if exporter is not None:
                exporter.close()
