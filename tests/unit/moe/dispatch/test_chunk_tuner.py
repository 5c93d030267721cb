"""The tuner's trials and choices, without a clock.

Run: pytest tests/unit/moe/dispatch/test_chunk_tuner.py
"""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.moe.dispatch import chunk_tuner as tuner_module
from engine.moe.dispatch.chunk_tuner import CANDIDATES, SAMPLES, ChunkTuner, HostTimer, bucket_of


class Timed:
    """A timer of known length."""

    def __init__(self, length: float) -> None:
        self.length, self.stopped = length, False

    def stop(self) -> None:
        self.stopped = True

    def seconds(self) -> float:
        return self.length


def everything(_: int) -> tuple[int, ...]:
    return CANDIDATES


def tuner_of(num_layers: int, lengths=lambda: 1.0) -> ChunkTuner:
    """A tuner of so many layers; lengths: of the timers, asked as they start."""
    return tuner_with(num_layers, lambda: Timed(lengths()))


def tuner_with(num_layers: int, new_timer) -> ChunkTuner:
    found = ChunkTuner(new_timer=new_timer)
    for layer in range(num_layers):
        found.register(layer)
    return found


def run(tuner: ChunkTuner, layer: int, tokens: int, candidates=everything) -> int:
    """One call; its number of chunks."""
    trial = tuner.begin_trial(layer, tokens, candidates)
    with trial:
        pass
    return trial.chunks


def test_layers_rotate_through_the_candidates_as_in_the_worked_example():
    timed: list[float] = []
    tuner = tuner_of(2, lambda: timed.append(1.0) or 1.0)
    taken: list[list[int]] = [[], []]
    for _ in range(11):
        assert tuner.due(0, 4096) is None
        for layer in (0, 1):
            taken[layer].append(run(tuner, layer, 4096))
    assert taken[0] == [1, 2, 1, 2, 4, 1, 2, 4, 1, 2, 4]
    assert taken[1] == [2, 4, 2, 4, 1, 2, 4, 1, 2, 4, 1]
    assert tuner.due(1, 4096) is None, "the first layer asks"
    assert tuner.due(0, 4096) is not None
    assert len(timed) == SAMPLES * len(CANDIDATES), "warm-up does not count"


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5, 32])
def test_every_layer_tries_every_candidate_as_often(num_layers):
    tuner = tuner_of(num_layers)
    tried = {layer: [] for layer in range(num_layers)}
    warm_up = -(-len(CANDIDATES) // num_layers)
    for step in itertools.count():
        if tuner.due(0, 1000) is not None:
            break
        for layer in range(num_layers):
            tried[layer].append(run(tuner, layer, 1000))
        assert step < 30, "it must end"
    for chunks in tried.values():
        counted = chunks[warm_up:]
        assert len({counted.count(number) for number in CANDIDATES}) == 1
    samples = sum(chunks[warm_up:].count(4) for chunks in tried.values())
    assert samples >= SAMPLES


@pytest.mark.parametrize(
    ("totals", "chosen"),
    [
        ([1000, 900, 950], 2),
        ([1000, 980, 981], 2),
        ([1000, 981, 990], 1),
        ([1000, 1000, 1000], 1),
        ([1000, 1200, 500], 4),
    ],
)
def test_one_chunk_stays_unless_another_number_is_two_percent_faster(totals, chosen):
    tuner = tuner_of(1)
    run(tuner, 0, 600)
    tuner.choose(600, totals)
    assert tuner.choices == {9: chosen}
    assert tuner.begin_trial(0, 1023, everything).chunks == chosen, "the whole bucket"
    assert tuner.due(0, 600) is None, "a bucket is decided once"
    assert tuner.begin_trial(0, 1024, everything).chunks == 1, "another bucket is measured anew"


def test_costs_are_medians_per_token_in_the_order_of_the_candidates():
    now: list[float] = []
    tuner = tuner_of(1, lambda: now[0])
    for visit in range(3 + 3 * SAMPLES):
        tokens = 1000 if visit % 2 else 512  # of one bucket
        slow = 50 if visit > 3 * SAMPLES else 1  # a hiccup
        trial = tuner.begin_trial(0, tokens, everything)
        now[:] = [slow * trial.chunks * tokens * 1e-15]
        with trial:
            pass
    assert tuner.due(0, 512) == [1, 2, 4]


def test_a_bucket_with_one_candidate_has_its_choice_before_anything_is_timed():
    timed: list[float] = []
    tuner = tuner_of(1, lambda: timed.append(1.0) or 1.0)
    assert run(tuner, 0, 3, lambda tokens: [1] if tokens < 256 else CANDIDATES) == 1
    assert not timed
    assert tuner.choices == {1: 1}


def test_candidates_are_asked_for_the_least_tokens_of_a_bucket():
    asked = []
    tuner_of(1).begin_trial(0, 1500, lambda tokens: asked.append(tokens) or [1])
    assert asked == [1024]
    assert [bucket_of(tokens) for tokens in (0, 1, 2, 3, 1023, 1024)] == [0, 0, 1, 1, 9, 10]


def test_a_call_that_fails_leaves_no_time():
    timers: list[Timed] = []
    tuner = tuner_with(1, lambda: timers.append(Timed(1.0)) or timers[-1])
    for _ in range(3):
        run(tuner, 0, 64)
    with pytest.raises(RuntimeError), tuner.begin_trial(0, 64, everything):
        raise RuntimeError
    assert [timer.stopped for timer in timers] == [False]


def test_a_reset_discards_choices_and_times():
    tuner = tuner_of(1)
    run(tuner, 0, 64)
    tuner.choose(64, [3, 1, 2])
    tuner.reset()
    assert tuner.choices == {} and tuner.due(0, 64) is None
    assert run(tuner, 0, 64) == 1


@given(
    num_ranks=st.integers(1, 4),
    num_layers=st.integers(1, 5),
    steps=st.lists(st.integers(0, 5000), max_size=80),
    seed=st.integers(0, 2**16),
)
def test_ranks_with_different_times_always_cut_and_agree_alike(num_ranks, num_layers, steps, seed):
    draw = random.Random(seed).random
    tuners = [tuner_of(num_layers, draw) for _ in range(num_ranks)]
    candidates = lambda tokens: [n for n in CANDIDATES if n == 1 or tokens >= 256 * n]  # noqa: E731
    for tokens in steps:
        for layer in range(num_layers):
            costs = [tuner.due(layer, tokens) for tuner in tuners]
            assert len({each is None for each in costs}) == 1, "some ranks would wait for others"
            if costs[0] is not None:
                totals = [sum(each) for each in zip(*costs, strict=True)]
                for tuner in tuners:
                    tuner.choose(tokens, totals)
            assert len({run(tuner, layer, tokens, candidates) for tuner in tuners}) == 1
    assert all(tuner.choices == tuners[0].choices for tuner in tuners)


def test_a_host_timer_lasts_from_its_start_to_its_end(monkeypatch):
    ticks = iter([5_000, 25_000])
    monkeypatch.setattr(tuner_module.time, "monotonic_ns", lambda: next(ticks))
    timer = HostTimer()
    timer.stop()
    assert timer.seconds() == pytest.approx(20e-6)
