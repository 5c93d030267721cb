"""StepProfiler: the measuring side of the generation loop, a step behind it, on CUDA two.

Before a step the ranks exchange control words; with them travel the row counts of the step before
and the arrivals of the last one whose stamps can be read. The meter reads that step's spans, says
what to send, and files what has come back: in the run's profile, the load counter, the span file,
and, under moe.capacity.speed_aware, the shares of the capacity.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import numpy as np

from engine.generation.control import ControlMessage, ControlPlane
from engine.moe.capacity.speed_weights import ONE, Shares
from engine.profiling.collector import Collector
from engine.profiling.exporters import Exporters
from engine.profiling.loads import StepLoads
from engine.profiling.phase_clock import Phase, Spans
from engine.profiling.report import StepReport
from engine.profiling.row_time import RowTime
from engine.profiling.telemetry import Telemetry

logger = logging.getLogger(__name__)


class StepProfiler:
    """Files one run's measurements on one rank. profile: its totals. logs: whether this rank says
    in the log when the shares change.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        collector: Collector,
        outlets: Exporters | None = None,
        *,
        speed_aware: bool = False,
        logs: bool = False,
    ) -> None:
        self.collector = collector
        self._telemetry = telemetry
        self._outlets = outlets or Exporters()
        self._pace = RowTime()
        self._shares = Shares() if speed_aware else None
        self._logs = logs
        self._spans: Spans | None = None
        self._num_read = 0
        self._tokens: tuple[int, int] | None = None  # prefill and decode, this rank's last step
        # What the span file says of the steps whose spans were not read yet.
        self._unread: deque[tuple[tuple[int, int], StepLoads]] = deque()
        self._offset = 0
        self._outlets.start(telemetry.loads)

    @property
    def shares_W(self) -> tuple[int, ...] | None:
        """Each rank's share of the capacity (`moe/shares.py`); None: all the same."""
        return self._shares.current if self._shares is not None else None

    def read(self) -> int:
        """Read the last step's spans; return this rank's pace, 0 where it is not asked for."""
        self._spans = self._telemetry.clock.read()
        if self._shares is None:
            return 0
        if self._spans is not None:
            self._pace.add(self._spans)
        return self._pace.picoseconds_a_row

    def exchange(self, control: ControlPlane, words: ControlMessage) -> list[ControlMessage]:
        """Exchange control words; file what comes with them. Collective over the control group."""
        clock, loads, spans = self._telemetry.clock, self._telemetry.loads, self._spans
        clock.enter_collective(Phase.CONTROL)
        clock.sent(control.num_bytes)
        everyone, rows_WL, arrivals = control.exchange(
            words, loads.take_rows(), spans, self._num_read
        )
        clock.enter(Phase.OTHER)
        if rows_WL is not None:
            loads.set_exchanged(rows_WL)
        if self._tokens is not None and loads.step is not None:
            self._unread.append((self._tokens, loads.step))
            loads.step = {}
        self._offset = control.clock_offset
        if spans is not None:
            self._file(spans, arrivals)
        self._tokens = (words.tokens_prefill, words.tokens_decode)
        if self._shares is not None and self._shares.update([each.pace for each in everyone]):
            self._log(everyone)
        return everyone

    def update(self, report: StepReport) -> None:
        """A step is over."""
        self._outlets.update(report, self.collector, self._telemetry.loads)

    def finish(self) -> None:
        """The run is over: nobody will tell the last steps' arrivals."""
        while (spans := self._telemetry.clock.read(ended=True)) is not None:
            self._file(spans, None)

    def _file(self, spans: Spans, arrivals_WC: np.ndarray | None) -> None:
        """Take the next step that was read."""
        self._num_read += 1
        self.collector.add(spans, arrivals_WC)
        if self._unread:
            tokens, loads = self._unread.popleft()
            self._outlets.write(self._num_read, spans, arrivals_WC, self._offset, tokens, loads)
        self._outlets.count(spans)

    def _log(self, everyone: Sequence[ControlMessage]) -> None:
        if self._logs:
            shares = self.shares_W or (ONE,) * len(everyone)
            logger.info(
                "step %d: shares of the capacity are now %s; nanoseconds a row are %s",
                self._num_read,
                ", ".join(f"{share / ONE:.2f}" for share in shares),
                ", ".join(f"{words.pace / 1e3:.0f}" for words in everyone),
            )
