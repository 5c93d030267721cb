"""Meter: the measuring side of the generation loop, one step behind it.

Before a step the ranks exchange control words; with them travel the arrivals and row counts of the
step before. The meter reads that step's spans, says what to send, and files what has come back: in
the run's profile, the load counter, the span file, and, under moe.capacity.speed_aware, the shares
of the capacity.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engine.control import ControlPlane, ControlWords
from engine.moe.shares import ONE, Shares
from engine.profiling.collector import Collector
from engine.profiling.outlets import Outlets
from engine.profiling.pace import Pace
from engine.profiling.phases import Phase, Spans
from engine.profiling.report import StepReport
from engine.profiling.telemetry import Telemetry

logger = logging.getLogger(__name__)


class Meter:
    """Files one run's measurements on one rank. profile: its totals. logs: whether this rank says
    in the log when the shares change.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        profile: Collector,
        outlets: Outlets | None = None,
        *,
        speed_aware: bool = False,
        logs: bool = False,
    ) -> None:
        self.profile = profile
        self._telemetry = telemetry
        self._outlets = outlets or Outlets()
        self._pace = Pace()
        self._shares = Shares() if speed_aware else None
        self._logs = logs
        self._spans: Spans | None = None
        self._num_read = 0
        self._tokens = (0, 0)  # this rank's prefill and decode tokens of the last step
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

    def exchange(self, control: ControlPlane, words: ControlWords) -> list[ControlWords]:
        """Exchange control words; file what comes with them. Collective over the control group."""
        clock, loads, spans = self._telemetry.clock, self._telemetry.loads, self._spans
        clock.meet(Phase.CONTROL)
        clock.sent(control.num_bytes)
        everyone, rows_WL, arrivals = control.exchange(
            words, loads.take_rows(), spans, self._num_read
        )
        clock.enter(Phase.OTHER)
        if rows_WL is not None:
            loads.settle(rows_WL)
        if spans is not None:
            self._num_read += 1
            self.profile.add(spans, arrivals)
            offset = control.clock_offset
            self._outlets.write(self._num_read, spans, arrivals, offset, self._tokens, loads)
        self._tokens = (words.tokens_prefill, words.tokens_decode)
        if self._shares is not None and self._shares.update([each.pace for each in everyone]):
            self._log(everyone)
        return everyone

    def update(self, report: StepReport) -> None:
        """A step is over."""
        self._outlets.update(report, self.profile, self._telemetry.loads)

    def finish(self) -> None:
        """The run is over: nobody will tell the last steps' arrivals."""
        while (spans := self._telemetry.clock.read()) is not None:
            self.profile.add(spans, None)
            self._outlets.count(spans)

    def _log(self, everyone: Sequence[ControlWords]) -> None:
        if self._logs:
            shares = self.shares_W or (ONE,) * len(everyone)
            logger.info(
                "step %d: shares of the capacity are now %s; nanoseconds a row are %s",
                self._num_read,
                ", ".join(f"{share / ONE:.2f}" for share in shares),
                ", ".join(f"{words.pace / 1e3:.0f}" for words in everyone),
            )
