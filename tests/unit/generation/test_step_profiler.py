"""StepProfiler: what it records of a step, whether its stamps can be read one step later or two.

Run: pytest tests/unit/generation/test_step_profiler.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.generation.control import ControlMessage
from engine.generation.step_profiler import StepProfiler
from engine.profiling.collector import Collector
from engine.profiling.device_clocks import HostClock
from engine.profiling.exporters import Exporters
from engine.profiling.phase_clock import Phase, Spans
from engine.profiling.telemetry import Telemetry

STEPS = 5


class LateClock(HostClock):
    """Reads as a CUDA clock does: a step when the next one is closed too."""

    def read(self, *, ended: bool = False) -> Spans | None:
        return super().read() if len(self._closed) > (0 if ended else 1) else None


class Control:
    """The control plane of a single rank."""

    num_bytes, clock_offset = 0, 7

    def exchange(
        self, message: ControlMessage, rows: list[int], spans: Spans | None, step: int
    ) -> Any:
        arrivals = None if spans is None else spans.arrivals[None]
        return [message], np.array([rows]) if rows else None, arrivals


class Lines:
    """In place of a span file."""

    def __init__(self) -> None:
        self.written: list[tuple[Any, ...]] = []

    def write(self, step: int, spans: Spans, arrivals: Any, offset: int, *rest: Any) -> None:
        experts = spans.tokens[spans.phases == Phase.EXPERTS].tolist()
        self.written.append((step, experts, arrivals is not None, offset, *rest))

    def close(self) -> None:
        pass


def run(clock: HostClock, lines: Lines | None) -> StepProfiler:
    """Five steps as the loop has them; step n has n prefill tokens and n rows of expert 0."""
    telemetry = Telemetry(clock=clock)
    exporters = Exporters(spans=lines)  # pyright: ignore[reportArgumentType]
    profiler = StepProfiler(telemetry, Collector(1, 1), exporters)
    control: Any = Control()
    for step in range(1, STEPS + 2):
        clock.enter(Phase.OTHER)
        message = ControlMessage(step, 0, 1, 0, 0, False, time_per_row=profiler.read())
        profiler.exchange(control, message)
        if step > STEPS:  # no rank has work
            break
        clock.enter(Phase.EXPERTS, 0, step)
        rows = np.array([step])
        telemetry.loads.record(
            0, before_E=rows, rank_before=[step], own_after=[step], own_experts=[0]
        )
        clock.close_step()
    clock.close_step()
    profiler.finish()
    return profiler


@pytest.mark.parametrize("clock", [HostClock, LateClock])
def test_every_step_is_recorded_once_with_its_own_tokens_and_loads(clock):
    lines = Lines()
    profiler = run(clock(), lines)
    assert len(lines.written) == STEPS
    for number, line in enumerate(lines.written, 1):
        step, experts, has_arrivals, offset, tokens, loads = line
        assert (step, experts, tokens, offset) == (number, [number], (number, 0), 7)
        (before, after) = loads[0]
        assert (before.tolist(), after) == ([number], [number])
        assert has_arrivals or (clock is LateClock and number == STEPS), (
            "all but the last have arrivals"
        )
    assert profiler.collector.totals().tokens[1, Phase.EXPERTS] == 1 + 2 + 3 + 4 + 5


@pytest.mark.parametrize("clock", [HostClock, LateClock])
def test_without_a_span_file_nothing_piles_up(clock):
    profiler = run(clock(), None)
    assert not profiler._unread
    assert profiler.collector.totals().tokens[1, Phase.EXPERTS] == 15
    assert profiler.collector.totals().calls[0, Phase.CONTROL] == STEPS + 1
