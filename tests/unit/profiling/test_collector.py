"""Collector and cost curves: the sums of steps, and for which rank the group waited.

Run: pytest tests/unit/profiling/test_collector.py
"""

import numpy as np
import pytest

from engine.profiling.collector import Collector
from engine.profiling.cost_model import CostCurve, price
from engine.profiling.device_clocks import HostClock
from engine.profiling.phase_clock import COLLECTIVE_PHASES, NONE, Phase, Spans, spans_of
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


def sampled(begin: int, *pieces: tuple[Phase, int, int, int | None], end: int) -> Spans:
    """A step that is not complete: (phase, layer, tokens, milliseconds where it is stamped)."""
    marks, stamps, arrivals = [], [], []
    for phase, layer, tokens, at in pieces:
        stamp = None if at is None else (begin + at) * MS
        waits = phase in COLLECTIVE_PHASES
        marks.append((phase, layer, tokens, len(arrivals) if waits else NONE))
        stamps.append(stamp)
        arrivals += [stamp] if waits else []
    return spans_of(marks, [(1, 64)], [*stamps, (begin + end) * MS], arrivals, complete=False)


COMPLETE = (
    (Phase.OTHER, -1, 0, 1),
    (Phase.CONTROL, -1, 1, 2),
    (Phase.OTHER, -1, 2, 3),
    (Phase.ATTENTION, 0, 3, 6, 5),
    (Phase.GATE, 0, 6, 7),
    (Phase.CONSENSUS, 0, 7, 9),
    (Phase.PLAN, 0, 9, 10),
    (Phase.DISPATCH, 0, 10, 12),
    (Phase.EXPERTS, 0, 12, 18, 8),
    (Phase.COMBINE, 0, 18, 20),
)
SAMPLED = (
    (Phase.OTHER, -1, 0, 0),
    (Phase.CONTROL, -1, 0, 1),
    (Phase.OTHER, -1, 0, None),
    (Phase.ATTENTION, 0, 5, 3),
    (Phase.GATE, 0, 0, None),
    (Phase.CONSENSUS, 0, 0, 11),
    (Phase.PLAN, 0, 0, None),
    (Phase.DISPATCH, 0, 0, 17),
    (Phase.EXPERTS, 0, 8, None),
    (Phase.COMBINE, 0, 0, 33),
)


def test_a_sampled_step_is_split_as_the_last_complete_one_and_its_waits_are_exact():
    collector = Collector(1, 2, every=16)
    whole = make_spans(*COMPLETE)
    collector.add(whole, np.stack((whole.arrivals, whole.arrivals)))
    before = collector.totals()
    ordinary = sampled(100, *SAMPLED, end=40)
    late = ordinary.arrivals.copy()
    late[1] += 3 * MS  # rank 1 reaches the consensus 3 ms after this one
    collector.add(ordinary, np.stack((ordinary.arrivals, late)))
    totals = collector.totals()
    seconds = totals.seconds - before.seconds
    assert seconds.sum() == pytest.approx(0.040), "as long as the step"
    in_layer = {phase: round(1e3 * seconds[1, phase], 6) for phase in Phase if seconds[1, phase]}
    assert in_layer == {
        Phase.ATTENTION: 6,  # 8 ms from the layer's start to the consensus, 3 to 1
        Phase.GATE: 2,
        Phase.CONSENSUS: 5,  # 6 ms, of which 3 were waiting and 3 are split 2 to 1
        Phase.PLAN: 1,
        Phase.DISPATCH: 4,  # 16 ms to the combine, 2 to 6
        Phase.EXPERTS: 12,
        Phase.COMBINE: 7,
    }
    assert (totals.waiting - before.waiting)[1, Phase.CONSENSUS] == pytest.approx(3e-3)
    assert totals.waiting.sum() == pytest.approx(3e-3)
    assert totals.calls[1, Phase.GATE] == 2 and totals.num_bytes[0, Phase.CONTROL] == 1064
    assert totals.tokens[1, Phase.EXPERTS] == 16


def test_a_sampled_step_before_any_complete_one_keeps_its_time_at_the_stamps():
    collector = Collector(1, 2, every=16)
    collector.add(sampled(0, *SAMPLED, end=40), None)
    seconds = collector.totals().seconds
    assert seconds[1, Phase.DISPATCH] == pytest.approx(0.016) and not seconds[1, Phase.EXPERTS]
    assert seconds.sum() == pytest.approx(0.040)


def test_only_complete_steps_after_the_warm_up_count_in_sampled_cost_curves():
    collector = Collector(1, 2, every=16)
    for _ in range(4):
        collector.add(make_spans(*COMPLETE), None)
    for _ in range(13):
        collector.add(sampled(0, *SAMPLED, end=40), None)
    collector.totals()
    assert collector.experts.table[:, :].sum(1).tolist() == pytest.approx([2, 16, 0.012])


def test_the_same_work_is_attributed_alike_whether_its_steps_are_sampled_or_not():
    found = []
    for every in (1, 4):
        clock = HostClock(every)
        Stamps.now_ns = 0
        collector = Collector(1, 2, every=every)
        clock._stamp = Stamps.take  # pyright: ignore[reportAttributeAccessIssue]
        for step in range(33):
            for phase, layer, start, end, *_ in COMPLETE:
                if phase in COLLECTIVE_PHASES:
                    clock.enter_collective(phase, layer)
                else:
                    clock.enter(phase, layer)
                Stamps.now_ns += (end - start) * MS
            clock.close_step()
            spans = clock.read()
            assert spans is not None
            assert spans.complete == (step <= 2 or step % every == 0)
            peers = spans.arrivals + MS // 4
            collector.add(spans, np.stack((spans.arrivals, peers)))
        found.append((collector.totals(), collector.wait_attribution()))
    (whole, waits), (sampled_, sampled_waits) = found
    np.testing.assert_allclose(sampled_.seconds, whole.seconds)
    np.testing.assert_array_equal(sampled_.waiting, whole.waiting)
    np.testing.assert_array_equal(sampled_.calls, whole.calls)
    np.testing.assert_array_equal(sampled_waits.seconds, waits.seconds)
    assert sampled_waits.step_seconds == waits.step_seconds


class Stamps:
    """A clock that the test moves."""

    now_ns = 0

    @staticmethod
    def take() -> int:
        return Stamps.now_ns
