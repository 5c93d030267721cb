"""Telemetry: the clock and the counters that one engine shares with its layers.

One `Telemetry` per engine; the layers only write to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.profiling.decisions import DecisionLog
from engine.profiling.device_clocks import NoClock
from engine.profiling.loads import LoadCounter
from engine.profiling.phase_clock import PhaseClock
from engine.profiling.routing.claim_log import ClaimLog


@dataclass(slots=True)
class Telemetry:
    """The measurements of one engine on one rank."""

    clock: PhaseClock = field(default_factory=NoClock)  # time per phase and layer
    loads: LoadCounter = field(default_factory=LoadCounter)  # rows per expert and layer
    decisions: DecisionLog = field(default_factory=DecisionLog)  # what capacity kept, on request
    claims: ClaimLog = field(default_factory=ClaimLog)  # what the router chose, on request
