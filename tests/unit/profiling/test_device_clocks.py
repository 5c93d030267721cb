"""Clocks of a simulated GPU: what they wait for, and how they follow the host's clock.

Run: pytest tests/unit/profiling/test_device_clocks.py
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.profiling import device_clocks
from engine.profiling.collector import Collector
from engine.profiling.device_clocks import CudaClock
from engine.profiling.phase_clock import Phase, Spans

US, MS, S = 1_000, 1_000_000, 1_000_000_000


class Gpu:
    """The host's clock, and one device with a clock of its own that runs events in order."""

    def __init__(self, skew: float = 0.0, latency_ns: int = 0) -> None:
        self.now_ns = 10 * S
        self.busy_until = 0
        self.waited_for: list[int] = []
        self.num_records = 0
        self._skew, self._latency = skew, latency_ns

    def run_event(self) -> tuple[int, int]:
        """Put an event on the stream; return when it runs by the host's and the device's clock."""
        self.num_records += 1
        self.busy_until = at = max(self.now_ns + self._latency, self.busy_until)
        return at, 7 * S + round(at * (1 + self._skew))


class Event:
    """In place of torch.cuda.Event: float32 milliseconds between two, as CUDA has them."""

    gpu = Gpu()

    def __init__(self, enable_timing: bool = False) -> None:
        self.at_host, self._at_device = -1, -1

    def record(self, stream: object = None) -> None:
        self.at_host, self._at_device = Event.gpu.run_event()

    def synchronize(self) -> None:
        assert self.at_host >= 0
        Event.gpu.waited_for.append(self.at_host)
        Event.gpu.now_ns = max(Event.gpu.now_ns, self.at_host)

    def elapsed_time(self, later: Event) -> float:
        return float(np.float32((later._at_device - self._at_device) * 1e-6))


def cuda_clock(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None = None, every: int = 1
) -> CudaClock:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    time = SimpleNamespace(monotonic_ns=lambda: Event.gpu.now_ns)
    monkeypatch.setattr(device_clocks, "time", time)
    Event.gpu = gpu or Gpu()
    clock = CudaClock(torch.device("cuda", 0), every)
    Event.gpu.waited_for.clear()
    Event.gpu.num_records = 0
    return clock


def test_a_cuda_clock_never_waits_for_a_step_with_nothing_queued_behind_it(monkeypatch):
    clock = cuda_clock(monkeypatch)
    ends, tokens = [], []
    for step in range(5):
        clock.enter(Phase.EXPERTS, 0, step)
        Event.gpu.now_ns += 1_000
        clock.close_step()
        ends.append(Event.gpu.now_ns)
        spans = clock.read()
        assert (spans is None) == (step == 0)
        assert clock.read() is None
        assert Event.gpu.waited_for == ends[:step], "the last step may still run"
        tokens += [] if spans is None else spans.tokens.tolist()
    rest = clock.read(ended=True)
    assert rest is not None and tokens + rest.tokens.tolist() == [0, 1, 2, 3, 4]
    assert clock.read(ended=True) is None


def test_a_skipped_collective_has_no_stamp_on_a_cuda_clock(monkeypatch):
    clock = cuda_clock(monkeypatch)
    Event.gpu.now_ns += 5_000
    clock.skip_collective(Phase.TENSOR, 0)
    clock.enter_collective(Phase.DISPATCH, 0)
    clock.close_step()
    step = clock.read(ended=True)
    assert step is not None and step.collectives.tolist() == [0, 1]
    assert step.arrivals.tolist() == [-1, step.starts[1]]
    assert clock.position().collective == 2


def test_a_cuda_clock_resolves_microseconds_after_hours(monkeypatch):
    clock = cuda_clock(monkeypatch)
    for _ in range(4000):  # four hours
        Event.gpu.now_ns += 3_600 * MS
        clock.enter(Phase.EXPERTS, 0, 1)
        Event.gpu.now_ns += 7_000
        clock.enter(Phase.OTHER)
        Event.gpu.now_ns += 1_000
        clock.close_step()
        spans = clock.read(ended=True)
        assert spans is not None
    assert (spans.ends - spans.starts).tolist() == [
        pytest.approx(7_000, abs=300),
        pytest.approx(1_000, abs=300),
    ]
    assert spans.starts[0] == pytest.approx(Event.gpu.now_ns - 8_000, abs=2_000)
    assert len(clock._pool) <= 4, "events are reused"


def simulate(
    monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], num_steps: int, step_ns: int, sync: int = 1
) -> tuple[list[CudaClock], list[list[Spans]], np.ndarray]:
    """Ranks that run the same steps, each with four collectives at which all arrive together.

    sync: the host waits for the device in every so manieth step, else it runs ahead of it. Returns
    each rank's clock and spans, and the host's time of the steps' collectives, int64 [steps, 4].
    """
    clocks = [cuda_clock(monkeypatch, gpu) for gpu in gpus]
    spans: list[list[Spans]] = [[] for _ in gpus]
    truth = np.zeros((num_steps, 4), dtype=np.int64)
    for step in range(num_steps):
        begin = gpus[0].now_ns
        for clock, gpu, own in zip(clocks, gpus, spans, strict=True):
            Event.gpu, gpu.now_ns = gpu, begin
            clock.enter(Phase.OTHER)
            for index in range(4):
                # The device is busy until the collective can start, and the host ahead of it.
                truth[step, index] = begin + (index + 1) * step_ns // 5
                gpu.busy_until = truth[step, index]
                clock.enter_collective(Phase.DISPATCH, 0)
            gpu.busy_until = begin + step_ns - 50 * US
            if step % sync == 0:  # as the sampler does
                gpu.now_ns = gpu.busy_until
            clock.close_step()
            gpu.now_ns = begin + step_ns
            if (step_spans := clock.read()) is not None:
                own.append(step_spans)
    for clock, gpu, own in zip(clocks, gpus, spans, strict=True):
        Event.gpu = gpu
        while (step_spans := clock.read(ended=True)) is not None:
            own.append(step_spans)
    return clocks, spans, truth


@pytest.mark.parametrize("skew", [50e-6, -50e-6, 3e-3, -3e-3])
@pytest.mark.parametrize("sync", [1, 7])
def test_stamps_follow_the_hosts_clock_though_the_devices_clock_drifts(monkeypatch, skew, sync):
    # Half an hour at 50 ppm is 90 ms; 6 s at 0.3%, 18 ms.
    step_ns, num_steps = (1_200 * MS, 1_500) if abs(skew) < 1e-3 else (10 * MS, 600)
    gpu = Gpu(skew, latency_ns=4 * US)
    (clock,), (spans,), truth = simulate(monkeypatch, [gpu], num_steps, step_ns, sync)
    assert len(gpu.waited_for) == num_steps, "no sync but that of the step that is read"
    stamps = np.stack([step.arrivals for step in spans])
    late = np.abs(stamps - truth)[100:].max()
    assert late < 30 * US, f"{late / US:.0f} us"
    assert 0 <= clock.error_ns < 30 * US


def test_stamps_never_run_backwards(monkeypatch):
    (_,), (spans,), _ = simulate(monkeypatch, [Gpu(1e-3, 4 * US)], 300, 10 * MS)
    starts = np.concatenate([step.starts for step in spans])
    assert (np.diff(starts) >= 0).all()


def test_a_pause_between_runs_is_made_up_for_in_the_first_step(monkeypatch):
    gpu = Gpu(20e-6, 4 * US)
    (clock,), _, _ = simulate(monkeypatch, [gpu], 200, 10 * MS)
    gpu.now_ns += 3_600 * S
    clock.enter(Phase.OTHER)
    begun = gpu.now_ns
    gpu.now_ns += 10 * MS
    clock.close_step()
    step = clock.read(ended=True)
    assert step is not None
    # float32 milliseconds of an hour resolve a quarter of a millisecond.
    assert step.starts[0] == pytest.approx(begun, abs=500 * US)


def test_ranks_whose_devices_drift_apart_are_no_stragglers(monkeypatch):
    gpus = [Gpu(0.0, 4 * US), Gpu(3e-3, 4 * US)]  # 0.3% for 6 s: as 10 ppm for half an hour
    _, spans, _ = simulate(monkeypatch, gpus, 600, 10 * MS)
    collector = Collector(1, 2)
    for own, other in zip(*spans, strict=True):
        collector.add(own, np.stack((own.arrivals, other.arrivals)))
    waits = collector.wait_attribution()
    assert waits.seconds.sum() < 0.01 * waits.step_seconds
    assert waits.straggler_steps.tolist() == [0, 0]


def test_the_error_says_how_long_events_usually_waited_for_the_device(monkeypatch):
    gpu = Gpu()
    clock = cuda_clock(monkeypatch, gpu)
    for step in range(64):
        gpu.busy_until = gpu.now_ns + (0 if step % 4 == 0 else 200 * US)
        clock.enter(Phase.OTHER)
        clock.close_step()
        gpu.now_ns += 10 * MS
        clock.read(ended=True)
    assert clock.error_ns == pytest.approx(200 * US, abs=5 * US)


def run_layers(clock: CudaClock, layers: int) -> None:
    """Mark a step as the model does: the control message, then layers with three collectives."""
    clock.enter(Phase.OTHER)
    clock.enter_collective(Phase.CONTROL)
    clock.enter(Phase.OTHER)
    for layer in range(layers):
        clock.enter(Phase.ATTENTION, layer, 8)
        clock.enter(Phase.OTHER, layer)
        clock.enter(Phase.GATE, layer, 8)
        clock.enter(Phase.PLAN, layer)
        clock.enter_collective(Phase.CONSENSUS, layer)
        clock.enter(Phase.PLAN, layer)
        clock.enter(Phase.PLAN, layer)
        clock.enter_collective(Phase.DISPATCH, layer)
        clock.enter(Phase.EXPERTS, layer, 8)
        clock.enter_collective(Phase.COMBINE, layer)
        clock.enter(Phase.PLAN, layer)
        clock.enter(Phase.OTHER, layer)
        Event.gpu.now_ns += MS
    clock.close_step()


def test_an_ordinary_step_records_an_event_per_collective_and_layer(monkeypatch):
    clock = cuda_clock(monkeypatch, every=16)
    layers, counts, complete = 32, [], []
    for _ in range(34):
        Event.gpu.num_records = 0
        run_layers(clock, layers)
        counts.append(Event.gpu.num_records)
        step = clock.read(ended=True)
        assert step is not None and (step.arrivals >= 0).all()
        assert len(step.arrivals) == 1 + 3 * layers
        complete.append(step.complete)
    whole, ordinary = 12 * layers + 4, 4 * layers + 3
    assert complete == [step in (0, 1, 2, 16, 32) for step in range(34)]
    assert counts == [whole if each else ordinary for each in complete]


def test_each_run_begins_with_complete_steps(monkeypatch):
    clock = cuda_clock(monkeypatch, every=16)
    for _ in range(2):
        clock.begin_run()
        found = []
        for _ in range(5):
            run_layers(clock, 1)
            step = clock.read(ended=True)
            assert step is not None
            found.append(step.complete)
        assert found == [True, True, True, False, False]
