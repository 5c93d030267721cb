"""Phase clock, waiting split and load counters on hand-worked numbers.

Run: pytest tests/unit/profiling/test_phase_clock.py
"""

import numpy as np
import pytest
import torch

from engine.profiling.device_clocks import HostClock, NoClock, make_clock
from engine.profiling.loads import LoadCounter
from engine.profiling.phase_clock import COLLECTIVE_PHASES, Phase, Spans
from engine.profiling.wait_time import breakdown, waiting_ns

MS = 1_000_000


def spans(*pieces: tuple[Phase, int, int]) -> Spans:
    """Touching or not; every collective phase starts a collective of its own. Milliseconds."""
    phases, starts, ends = (np.array(column) for column in zip(*pieces, strict=True))
    waits = np.isin(phases, COLLECTIVE_PHASES)
    nothing = np.zeros(len(phases), dtype=np.int64)
    return Spans(
        phases=phases,
        layers=nothing - 1,
        tokens=nothing,
        num_bytes=nothing,
        collectives=np.where(waits, waits.cumsum() - 1, -1),
        starts=starts * MS,
        ends=ends * MS,
        arrivals=starts[waits] * MS,
    )


def test_spans_of_a_step_touch_and_add_up_to_its_length():
    clock = HostClock()
    for phase in (Phase.OTHER, Phase.ATTENTION, Phase.EXPERTS, Phase.ATTENTION):
        clock.enter(phase)
    clock.close_step()
    step = clock.read()
    assert step is not None and clock.read() is None
    assert step.phases.tolist() == [0, 1, 6, 1]
    assert (step.starts[1:] == step.ends[:-1]).all()
    total = (step.ends[-1] - step.starts[0]) * 1e-9
    assert step.seconds_by_phase().sum() == pytest.approx(total)
    assert step.seconds_by_phase()[Phase.DISPATCH] == 0


def test_steps_are_read_in_the_order_they_were_closed():
    clock = HostClock()
    for phase in (Phase.GATE, Phase.PLAN):
        clock.enter(phase)
        clock.close_step()
    clock.close_step()  # nothing entered: no step
    first, second = clock.read(), clock.read()
    assert first is not None and second is not None
    assert (first.phases.tolist(), second.phases.tolist()) == ([Phase.GATE], [Phase.PLAN])
    assert clock.read() is None


def test_a_disabled_clock_has_nothing_to_read():
    clock = make_clock(torch.device("cpu"), enabled=False)
    clock.enter(Phase.EXPERTS)
    clock.close_step()
    assert isinstance(clock, NoClock) and clock.read() is None


def test_the_worked_example_of_waiting_holds_on_each_rank():
    arrivals = np.array([[0], [6], [7]]) * MS
    for start, end, expected in ((0, 10, 7), (6, 10, 1), (7, 10, 0)):
        own = spans((Phase.DISPATCH, start, end))
        assert waiting_ns(own, arrivals).tolist() == [expected * MS]


def test_waiting_never_exceeds_the_collective_itself():
    # A peer's stamp far in the future (a bad clock offset) cannot claim more than this rank's span.
    own = spans((Phase.COMBINE, 0, 4))
    assert waiting_ns(own, np.array([[0], [900]]) * MS).tolist() == [4 * MS]


def test_work_between_collectives_is_no_waiting():
    own = spans((Phase.EXPERTS, 0, 50), (Phase.COMBINE, 50, 52), (Phase.OTHER, 52, 60))
    assert waiting_ns(own, np.array([[50], [10]]) * MS).tolist() == [0, 0, 0]


def test_breakdown_adds_up_to_all_time():
    seconds = np.zeros(len(Phase))
    seconds[Phase.ATTENTION], seconds[Phase.EXPERTS], seconds[Phase.GATE] = 1.0, 2.0, 0.25
    seconds[Phase.DISPATCH], seconds[Phase.CONTROL] = 0.5, 0.5
    parts = breakdown(seconds, waiting=0.75)
    assert parts == pytest.approx(
        {
            "attention": 1.0,
            "experts": 2.0,
            "communication": 0.25,
            "waiting": 0.75,
            "other": 0.25,
        }
    )


def record(loads: LoadCounter, layer: int, before: list[int], own_after: int | None = None):
    """One expert per rank; this is rank 1 of 2."""
    after = before[1] if own_after is None else own_after
    loads.record(
        layer,
        before_E=np.array(before),
        rank_before=before,
        own_after=[after],
        own_experts=[1],
    )


def test_rows_after_capacity_count_once_all_ranks_have_exchanged_them():
    loads = LoadCounter()
    record(loads, 3, [6, 2])
    record(loads, 5, [1, 7], own_after=4)
    assert loads.take_rows() == [2, 4] and loads.take_rows() == []
    record(loads, 3, [6, 2])
    assert loads.take_rows() == [2]
    loads.set_exchanged(np.array([[4], [2]]))
    assert loads.layers[3].max_over_mean_after == pytest.approx(4 / 3)
    assert loads.layers[3].own_after.tolist() == [4]
    assert loads.layers[5].max_over_mean_after == 1.0, "the rows of layer 5 are not exchanged yet"
    assert loads.speed_bound() == pytest.approx((6 + 6 + 7) / 4)


def test_one_rank_is_balanced_before_and_after_whatever_it_dropped():
    loads = LoadCounter()
    for exchanged in (False, True):
        loads.record(
            0, before_E=np.array([6, 2]), rank_before=[8], own_after=[4, 2], own_experts=[0, 1]
        )
        assert loads.take_rows() == [6]
        if exchanged:
            loads.set_exchanged(np.array([[6]]))
        assert loads.max_over_mean() == loads.max_over_mean_after() == 1.0
    assert loads.layers[0].own_after.tolist() == [8, 4]


def test_the_bound_is_of_the_slowest_rank_of_each_step_not_of_the_sums():
    # Each rank is the slow one once: over both steps their rows are even, and yet all waited.
    loads = LoadCounter()
    for before, after in (([6, 2], [4, 2]), ([2, 6], [2, 4])):
        record(loads, 0, before, own_after=after[1])
        loads.take_rows()
        loads.set_exchanged(np.array([[after[0]], [after[1]]]))
    assert loads.layers[0].experts.tolist() == [8, 8]
    assert loads.max_over_mean() == (6 + 6) / (4 + 4)
    assert loads.max_over_mean_after() == (4 + 4) / (3 + 3)
    assert loads.speed_bound() == (6 + 6) / (4 + 4)


def test_a_new_run_starts_from_nothing_even_when_the_last_was_broken_off():
    loads = LoadCounter()
    record(loads, 0, [6, 2])  # stopped before its rows were taken
    loads.clear()
    assert loads.take_rows() == [] and loads.reset_step() == 1.0
    record(loads, 4, [3, 3])
    assert loads.take_rows() == [3]
    loads.set_exchanged(np.array([[3], [3]]))
    assert list(loads.layers) == [4] and loads.speed_bound() == 1.0


def test_load_counter_weighs_layers_by_their_rows():
    loads = LoadCounter()
    record(loads, 0, [6, 2])  # max 6, mean 4
    record(loads, 1, [1, 1])  # max 1, mean 1
    assert loads.layers[0].max_over_mean == pytest.approx(1.5)
    assert loads.max_over_mean() == pytest.approx(7 / 5)
    assert loads.reset_step() == pytest.approx(7 / 5)
    assert loads.reset_step() == 1.0, "an empty step is balanced"
    record(loads, 0, [0, 4])
    assert loads.layers[0].experts.tolist() == [6, 6]
    assert loads.reset_step() == pytest.approx(2.0)
    loads.clear()
    assert loads.max_over_mean() == 1.0 and not loads.layers


def test_the_wait_in_a_tensor_collective_is_for_the_tensor_group():
    own = spans((Phase.TENSOR, 0, 9), (Phase.COMBINE, 9, 20))
    arrivals = np.array([[0, 9], [4, 11], [8, 12], [8, 12]]) * MS
    assert waiting_ns(own, arrivals, range(2)).tolist() == [4 * MS, 3 * MS]
