"""The profiler's clock of the device against the host's: it must follow its drift for a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from engine.profiling.device_clocks import make_clock
from engine.profiling.phase_clock import Phase
from gpu_checks.check import Check, Settings, at_most, figure

GROUP = "clocks"
# Between a stamp and the host's own time right after it: the launch and the wait.
BOUND_US = 1000.0


def check_clocks(settings: Settings) -> Iterator[Check]:
    """Check stamps of short steps, a hundred per second, for a minute."""
    device, length_s = settings.device, 1.0 if settings.is_tiny else 60.0
    clock = make_clock(device)
    work = torch.ones(1024, 1024, device=device)
    first: list[float] = []
    last: list[float] = []
    began = time.monotonic()
    while (now := time.monotonic()) < began + length_s:
        clock.enter(Phase.ATTENTION, 0, 1)
        torch.mm(work, work)
        clock.enter(Phase.EXPERTS, 0, 1)
        torch.mm(work, work)
        clock.close_step()
        spans = clock.read(ended=True)  # waits for the step's last event
        assert spans is not None
        behind_us = (time.monotonic_ns() - int(spans.ends[-1])) / 1e3
        (first if now < began + length_s / 6 else last).append(behind_us)
        time.sleep(0.01)
    start, end = min(first), min(last[len(last) * 4 // 5 :])
    name = "device clock"
    yield figure(GROUP, f"{name}: at first, us behind the host", start, f"{len(first)} steps")
    yield at_most(GROUP, f"{name}: change over {length_s:.0f} s, us", abs(end - start), BOUND_US)
    early = max(0.0, -min(*first, *last))
    yield at_most(GROUP, f"{name}: stamps ahead of the host, us", early, BOUND_US)
