"""Exporters: where a run's measurements go while it runs: span files, metrics, DeepSpeed's logger.

`llm.py` opens them on every rank before a run and closes them after it; `loop.py` hands over what
it has. None of them is needed for the report at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.profiling.collector import Collector
from engine.profiling.deepspeed_comms import CommsTable, DeepSpeedComms
from engine.profiling.loads import LoadCounter, StepLoads
from engine.profiling.phase_clock import Spans
from engine.profiling.report import StepReport
from engine.profiling.span_file import SpanWriter

if TYPE_CHECKING:  # its HTTP server is only imported where somebody wants it
    from engine.profiling.metrics import Metrics


@dataclass(slots=True)
class Exporters:
    """spans: this rank's span file, None where none was asked for. metrics: rank 0's server. comms:
    this rank's part in DeepSpeed's comms logger.
    """

    spans: SpanWriter | None = None
    metrics: Metrics | None = None
    comms: DeepSpeedComms | None = None

    def start(self, loads: LoadCounter) -> None:
        """A run begins."""
        loads.step = {} if self.spans is not None else None

    def write(
        self,
        step: int,
        spans: Spans,
        arrivals_WC: np.ndarray | None,
        offset: int,
        tokens: tuple[int, int],
        loads: StepLoads,
    ) -> None:
        """Take one step for the span file; arguments as in `SpanWriter.write`."""
        if self.spans is not None:
            self.spans.write(step, spans, arrivals_WC, offset, tokens, loads)

    def count(self, spans: Spans) -> None:
        """Take one step's collectives."""
        if self.comms is not None:
            self.comms.add(spans)

    def comms_table(self) -> CommsTable:
        """DeepSpeed's table of this rank's collectives; empty where nobody asked for it."""
        return self.comms.table() if self.comms is not None else {}

    def update(self, report: StepReport, profile: Collector, loads: LoadCounter) -> None:
        """Take one step's report."""
        if self.metrics is not None:
            self.metrics.update(report, profile, loads)

    def close(self) -> None:
        """A run is over."""
        if self.spans is not None:
            self.spans.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.comms is not None:
            self.comms.close()
