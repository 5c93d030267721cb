"""StepProfiler: the measurements of each step of the generation loop, one step later, on CUDA two.

Before a step the ranks exchange control messages, which also carry the row counts of the previous
step and the arrivals of the last step whose stamps can be read. The step profiler reads that step's
spans, sends its arrivals, and records what it receives: in the run's collector, the load counter,
the span file, and, under moe.capacity.speed_aware, each rank's share of the capacity.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import numpy as np

from engine.generation.control import ControlMessage, ControlPlane
from engine.moe.capacity.speed_weights import ONE, SpeedWeights
from engine.profiling.collector import Collector
from engine.profiling.exporters import Exporters
from engine.profiling.loads import StepLoads
from engine.profiling.phase_clock import Phase, Spans
from engine.profiling.report import StepReport
from engine.profiling.row_time import RowTime
from engine.profiling.telemetry import Telemetry

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records one run's measurements on one rank.

    Args:
        collector: receives every step.
        speed_aware: whether the shares of the capacity follow the ranks' speeds.
        logs: whether this rank logs changes of the shares.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        collector: Collector,
        exporters: Exporters | None = None,
        *,
        speed_aware: bool = False,
        logs: bool = False,
    ) -> None:
        self.collector = collector
        self._telemetry = telemetry
        self._exporters = exporters or Exporters()
        self._row_time = RowTime()
        self._speed_weights = SpeedWeights() if speed_aware else None
        self._logs = logs
        self._spans: Spans | None = None
        self._num_read = 0
        self._tokens: tuple[int, int] | None = None  # prefill and decode, this rank's last step
        # Tokens and loads, for the span file, of the steps whose spans were not read yet.
        self._unread: deque[tuple[tuple[int, int], StepLoads]] = deque()
        self._offset = 0
        self._exporters.start(telemetry)
        telemetry.clock.begin_run()

    @property
    def weights_W(self) -> tuple[int, ...] | None:
        """Each rank's share of the capacity (`moe/capacity/speed_weights.py`); None: all equal."""
        return self._speed_weights.current if self._speed_weights is not None else None

    def read(self) -> int:
        """Read the last step's spans; return this rank's time per row in picoseconds.

        0 where it is unknown, or not needed.
        """
        self._spans = self._telemetry.clock.read()
        if self._speed_weights is None:
            return 0
        if self._spans is not None:
            self._row_time.add(self._spans)
        return self._row_time.picoseconds_per_row

    def exchange(self, control: ControlPlane, message: ControlMessage) -> list[ControlMessage]:
        """Exchange control messages; record the measurements that they carry.

        Returns every rank's message. Collective over the control group: every rank must call.
        """
        clock, loads, spans = self._telemetry.clock, self._telemetry.loads, self._spans
        clock.enter_collective(Phase.CONTROL)
        clock.sent(control.num_bytes)
        everyone, rows_WL, arrivals = control.exchange(
            message, loads.take_rows(), spans, self._num_read
        )
        clock.enter(Phase.OTHER)
        if rows_WL is not None:
            loads.set_exchanged(rows_WL)
        if self._tokens is not None and loads.step is not None:
            if self._exporters.spans is not None:
                self._unread.append((self._tokens, loads.step))
            loads.step = {}
        self._offset = control.clock_offset
        if spans is not None:
            self._record(spans, arrivals)
        self._tokens = (message.tokens_prefill, message.tokens_decode)
        if self._speed_weights is not None and self._speed_weights.update(
            [each.time_per_row for each in everyone]
        ):
            self._log(everyone)
        return everyone

    def update(self, report: StepReport) -> None:
        """Pass the report of the step that has ended to the exporters, and its loads."""
        self._exporters.update(report, self.collector, self._telemetry.loads)

    def finish(self) -> None:
        """Record the last steps, whose arrivals are not exchanged any more."""
        while (spans := self._telemetry.clock.read(ended=True)) is not None:
            self._record(spans, None)

    def _record(self, spans: Spans, arrivals_WC: np.ndarray | None) -> None:
        self._num_read += 1
        self.collector.add(spans, arrivals_WC)
        if self._unread and (file := self._exporters.spans) is not None:
            tokens, loads = self._unread.popleft()
            file.write(self._num_read, spans, arrivals_WC, self._offset, tokens, loads)
        self._exporters.count(spans)

    def _log(self, everyone: Sequence[ControlMessage]) -> None:
        if self._logs:
            shares = self.weights_W or (ONE,) * len(everyone)
            logger.info(
                "step %d: shares of the capacity are now %s; nanoseconds per row are %s",
                self._num_read,
                ", ".join(f"{share / ONE:.2f}" for share in shares),
                ", ".join(f"{each.time_per_row / 1e3:.0f}" for each in everyone),
            )
