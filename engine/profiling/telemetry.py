"""Telemetry: the clock and the counters that one engine shares with its layers.

The runner makes one `Telemetry` and hands it to the model; layers only write to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.profiling.decisions import DecisionLog
from engine.profiling.device_clocks import NoClock
from engine.profiling.loads import LoadCounter
from engine.profiling.phase_clock import PhaseClock


@dataclass(slots=True)
class Telemetry:
    """clock: who spends time where. loads: who had how many rows. decisions: what capacity kept,
    when somebody asked for it.
    """

    clock: PhaseClock = field(default_factory=NoClock)
    loads: LoadCounter = field(default_factory=LoadCounter)
    decisions: DecisionLog = field(default_factory=DecisionLog)
