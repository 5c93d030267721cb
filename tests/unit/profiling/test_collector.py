"""Collector and cost curves: the sums of steps, and for which rank the group waited.

Run: pytest tests/unit/profiling/test_collector.py
"""

import numpy as np
import pytest

from engine.profiling.collector import Collector
from engine.profiling.cost_model import CostCurve, price
from engine.profiling.device_clocks import HostClock
from engine.profiling.phase_clock import Phase
from tests.helpers.profiles import MS, Simulation, make_spans


def table(*calls: tuple[int, float]) -> np.ndarray:
    """A curve's table from (tokens, milliseconds)."""
    curve = CostCurve()
    tokens, ms = zip(*calls, strict=True)
    curve.add(np.array(tokens), np.array(ms) * MS)
    return curve.table


def test_time_tokens_and_bytes_are_added_up_by_layer_and_phase():
    collector = Collector(2, 1)
    collector.add(
        make_spans(
            (Phase.OTHER, -1, 0, 1),
            (Phase.ATTENTION, 0, 1, 4, 30),
            (Phase.DISPATCH, 0, 4, 6, 12),
            (Phase.EXPERTS, 1, 6, 11, 40),
            (Phase.EXPERTS, 1, 11, 12),
        ),
        None,
    )
    totals = collector.totals()
    assert totals.seconds[0, Phase.OTHER] == pytest.approx(1e-3)
    assert totals.seconds[1, Phase.ATTENTION] == pytest.approx(3e-3)
    assert totals.seconds[2, Phase.EXPERTS] == pytest.approx(6e-3)
    assert totals.tokens[2, Phase.EXPERTS] == 40 and totals.calls[2, Phase.EXPERTS] == 2
    assert totals.num_bytes[1, Phase.DISPATCH] == 1000 and totals.num_bytes.sum() == 1000
    assert totals.by_phase().sum() == pytest.approx(12e-3)
    assert totals.waiting.sum() == 0, "the arrivals of the others are unknown"


def test_steps_are_added_up_whether_or_not_a_batch_of_them_is_full():
    for count in (1, 15, 16, 17, 40):
        collector = Collector(1, 1)
        for _ in range(count):
            collector.add(make_spans((Phase.GATE, 0, 0, 2, 5)), None)
        assert collector.totals().tokens[1, Phase.GATE] == 5 * count
        assert collector.totals().tokens[1, Phase.GATE] == 5 * count, "asking adds nothing"


def test_the_worked_example_of_the_attribution():
    collector = Collector(5, 3)
    arrivals = np.array([[0], [2], [8]]) * MS
    for _ in range(3):  # two to warm up
        collector.add(make_spans((Phase.COMBINE, 4, 0, 9)), arrivals)
    attribution = collector.wait_attribution()
    assert attribution.steps == 1
    assert attribution.seconds[2, 5, Phase.COMBINE] == pytest.approx((8 - 10 / 3) * 1e-3)
    assert attribution.seconds.sum() == attribution.seconds[2, 5, Phase.COMBINE]
    assert attribution.straggler_steps.tolist() == [0, 0, 1]
    assert attribution.bucket_steps.sum() == 3, "every rank is in the histogram of every step"
    assert attribution.bucket_seconds[2].sum() == pytest.approx(attribution.seconds.sum())


def test_ranks_of_a_tensor_group_wait_for_each_other_only():
    """4 ranks in two tensor groups: rank 0 waits 3 ms for rank 1, 0.75 ms of a mean rank; rank 2
    waits 4 ms for rank 3, 1 ms of a mean rank, though it arrives before rank 1.
    """
    arrivals = np.array([[9], [12], [1], [5]]) * MS
    for own, peers, waited in ((0, range(2), 3), (1, range(2), 0), (2, range(2, 4), 4)):
        collector = Collector(5, 4, peers)
        start = float(arrivals[own, 0] / MS)
        for _ in range(3):  # two to warm up
            collector.add(make_spans((Phase.TENSOR, 4, start, start + 5)), arrivals)
        assert collector.totals().waiting[5, Phase.TENSOR] == pytest.approx(3 * waited * 1e-3)
        wait_W = collector.wait_attribution().seconds[:, 5, Phase.TENSOR]
        assert wait_W.tolist() == [0, pytest.approx(0.75e-3), 0, pytest.approx(1e-3)]
        assert collector.wait_attribution().seconds.sum() == pytest.approx(wait_W.sum())
        assert collector.wait_attribution().straggler_steps.tolist() == [0, 0, 0, 1]


def test_a_rank_that_waited_in_its_tensor_group_is_not_the_cause_of_arriving_late_afterwards():
    # The worked example of wait_attribution.py, and a second collective of all: rank 3 is last.
    arrivals = np.array([[0, 21, 30], [20, 20.5, 30], [0, 2, 30], [0, 2, 34]]) * MS
    arrivals = arrivals.astype(np.int64)
    collector = Collector(5, 4, range(2))
    spans = make_spans(
        (Phase.TENSOR, 4, 0, 20), (Phase.CONSENSUS, 4, 21, 22), (Phase.COMBINE, 4, 30, 40)
    )
    for _ in range(3):
        collector.add(spans, arrivals)
    seconds_WP = collector.wait_attribution().seconds[:, 5]
    mean = 21 - (21 + 20.5 + 2 + 2) / 4
    assert seconds_WP[:, Phase.TENSOR].tolist() == [0, pytest.approx(5e-3), 0, 0]
    assert seconds_WP[:, Phase.CONSENSUS].tolist() == [0, pytest.approx(mean * 1e-3), 0, 0]
    assert seconds_WP[:, Phase.COMBINE].tolist() == [0, 0, 0, pytest.approx(3e-3)]


def test_only_as_much_is_moved_to_another_rank_as_was_waited_for_it():
    # Rank 0 waited 2 ms for rank 1 and then took 10 ms of its own.
    arrivals = np.array([[0, 12], [2, 2], [0, 0], [0, 0]]) * MS
    collector = Collector(1, 4, range(2, 4))
    for _ in range(3):
        collector.add(make_spans((Phase.TENSOR, 0, 0, 1), (Phase.DISPATCH, 0, 1, 13)), arrivals)
    seconds_W = collector.wait_attribution().seconds[:, 1, Phase.DISPATCH]
    assert seconds_W.tolist() == [pytest.approx(6.5e-3), pytest.approx(2e-3), 0, 0]


def test_a_tensor_group_without_tokens_waits_for_no_rank_and_causes_no_wait():
    clock = HostClock()
    clock.enter(Phase.ATTENTION, 0)
    clock.skip_collective(Phase.TENSOR, 0)
    clock.enter(Phase.OTHER, 0)
    clock.close_step()
    spans = clock.read()
    assert spans is not None and spans.arrivals.tolist() == [-1]
    assert clock.position().collective == 1, "it is counted: all ranks number alike"
    at = int(spans.starts[0])
    arrivals = np.array([[at + 9 * MS], [at + 7 * MS], [-1], [-1]])
    collector = Collector(1, 4, range(2, 4))
    for _ in range(3):
        collector.add(spans, arrivals)
    assert collector.totals().waiting.sum() == 0
    wait_W = collector.wait_attribution().seconds.sum((1, 2))
    assert wait_W.tolist() == [pytest.approx(0.5e-3), 0, 0, 0]


def test_a_step_with_next_to_no_wait_has_no_straggler():
    collector = Collector(1, 2)
    arrivals = np.array([[0], [0.1]]) * MS
    for _ in range(3):
        collector.add(make_spans((Phase.COMBINE, 0, 0, 90)), arrivals.astype(np.int64))
    assert collector.wait_attribution().straggler_steps.tolist() == [0, 0]


def test_a_collective_that_is_waited_for_later_is_attributed_where_it_was_started():
    # Rank 1 starts the dispatch at 7 ms; this rank started at 1, worked on, and waits from 5 on.
    clock = HostClock()
    clock.enter(Phase.PLAN, 0)
    number = clock.record_arrival()
    clock.enter(Phase.EXPERTS, 0, 3)
    clock.enter_collective(Phase.DISPATCH, 0, 8, number)
    clock.sent(64)
    clock.close_step()
    spans = clock.read()
    assert spans is not None and spans.collectives.tolist() == [-1, -1, 0]
    assert spans.num_bytes.tolist() == [0, 0, 64] and spans.tokens.tolist() == [0, 3, 8]
    assert len(spans.arrivals) == 1 and spans.arrivals[0] < spans.starts[2]
    late = np.array([spans.arrivals, spans.ends[2:] + MS])
    collector = Collector(1, 2)
    for _ in range(3):
        collector.add(spans, late)
    assert collector.wait_attribution().seconds[1, 1, Phase.DISPATCH] > 0
    waited = collector.totals().waiting[1, Phase.DISPATCH]
    assert waited == pytest.approx(3e-9 * float(spans.ends[2] - spans.starts[2]))


def test_the_worked_example_of_the_price():
    peers = table((100, 2.0), (500, 6.0))
    own = table(*[(300, 6.0)] * 10)
    assert price(own, [peers]) == pytest.approx(40e-3)


def test_a_price_beyond_the_peers_sizes_goes_on_at_their_last_rate_and_never_below_their_first():
    peers = table((64, 2.0), (512, 8.0))
    assert price(table((1024, 1.0)), [peers]) == pytest.approx(16e-3)
    assert price(table((8, 1.0)), [peers]) == pytest.approx(2e-3)


def test_of_several_peers_the_median_prices_so_that_one_slow_peer_does_not_hide_another():
    peers = [table((100, ms)) for ms in (1.0, 1.1, 5.0)]
    assert price(table((100, 5.0)), peers) == pytest.approx(1.1e-3)
    assert np.isnan(price(table((100, 5.0)), [CostCurve().table]))


def test_every_rank_has_the_same_attribution():
    ranks = Simulation(3)
    for turn in range(20):
        work = [1.0, 2.0 + turn % 3, 1.5]
        ranks.step(
            host=[0.2] * 3, attention=[1.0] * 3, experts=work, tokens=[8] * 3, rows=[8, 9, 7]
        )
    first, *others = [collector.wait_attribution() for collector in ranks.collectors]
    for other in others:
        assert (other.seconds == first.seconds).all()
        assert (other.straggler_steps == first.straggler_steps).all()
    assert first.straggler_steps.tolist() == [0, 18, 0]
