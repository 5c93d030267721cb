"""ClockTracker: a drifting offset is tracked; the constant bias of a collective is not."""

from __future__ import annotations

import numpy as np

from engine.distributed.clock import ClockOffset, ClockTracker

_STEP_NS = 20_000_000
_START_NS = 5_000_000_000


def _run(tracker: ClockTracker, *, drift: float, bias_ns: int = 0, steps: int = 3_000) -> int:
    """Track rank 1's clock, which gains `drift` seconds per second on rank 0's; return the true
    offset at the end, nanoseconds.
    """
    noise = np.random.default_rng(7)
    offset = float(_START_NS)
    for step in range(steps):
        now = 10**12 + step * _STEP_NS
        offset = _START_NS - drift * step * _STEP_NS
        late = bias_ns + int(noise.exponential(20_000))
        tracker.note(np.array([now + int(noise.exponential(20_000)), now - int(offset) + late]))
    return int(offset)


def test_a_drift_of_fifty_parts_per_million_is_tracked() -> None:
    tracker = ClockTracker(ClockOffset(_START_NS, 5_000, shared=False), rank=1)
    true = _run(tracker, drift=50e-6)
    assert abs(true - _START_NS) > 2_900_000
    assert abs(tracker.nanoseconds - true) < 60_000


def test_a_rank_that_always_leaves_late_does_not_change_the_offset() -> None:
    tracker = ClockTracker(ClockOffset(_START_NS, 5_000, shared=False), rank=1)
    _run(tracker, drift=0.0, bias_ns=400_000)
    assert abs(tracker.nanoseconds - _START_NS) < 20_000


def test_ranks_of_one_host_read_one_clock() -> None:
    tracker = ClockTracker(ClockOffset(0, 0, shared=True), rank=1)
    _run(tracker, drift=50e-6)
    assert tracker.nanoseconds == 0


def test_unknown_timestamps_are_ignored() -> None:
    tracker = ClockTracker(ClockOffset(_START_NS, 5_000, shared=False), rank=1)
    for _ in range(100):
        tracker.note(np.array([-1, 10**12]))
        tracker.note(np.array([10**12, -1]))
    assert tracker.nanoseconds == _START_NS
