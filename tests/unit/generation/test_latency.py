"""Latencies of a run: all of them where they are few, a uniform sample where they are many.

Run: pytest tests/unit/generation/test_latency.py
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from engine.generation.latency import MAX_VALUES, Sample, pooled, timed
from engine.request import Completion, RequestError, Timing


def sample_of(values, max_values: int = MAX_VALUES) -> Sample:
    sample = Sample(max_values)
    for value in values:
        sample.add(value)
    return sample


def completion(num_tokens: int, timing: Timing) -> Completion:
    return Completion(
        index=0,
        id="0",
        text="",
        token_ids=[1] * num_tokens,
        finish_reason="length",
        prompt_tokens=1,
        completion_tokens=num_tokens,
        timing=timing,
    )


def test_up_to_the_bound_every_value_is_kept_in_order():
    sample = sample_of([3.0, 1.0, 2.0], max_values=3)
    count, values = sample.sampled()
    assert count == 3 and values.dtype == np.float64 and values.tolist() == [3.0, 1.0, 2.0]


def test_beyond_the_bound_memory_stays_and_percentiles_are_close():
    sample = sample_of(range(50_000), max_values=2000)
    count, values = sample.sampled()
    assert count == 50_000 and len(values) == 2000 == len(set(values.tolist()))
    assert len(pickle.dumps(sample.sampled())) < 2000 * 8 + 500, "eight bytes per value are sent"
    for point in (10, 50, 99):
        assert np.percentile(values, point) == pytest.approx(500 * point, abs=2000)
    assert (values < 2000).sum() < 200, "the first have no better chance than others"


def test_the_same_values_give_the_same_sample():
    one, other = (sample_of(range(5000), max_values=100).sampled()[1] for _ in range(2))
    assert one.tolist() == other.tolist()


def test_pooled_samples_that_are_whole_are_everything_in_rank_order():
    pool = pooled(
        [sample_of([1.0, 2.0]).sampled(), sample_of([]).sampled(), sample_of([0.5]).sampled()]
    )
    assert pool.tolist() == [1.0, 2.0, 0.5]
    assert pooled([]).tolist() == []


def test_a_rank_counts_by_its_requests_not_by_what_its_sample_holds():
    many = sample_of([1.0] * 9000, max_values=100).sampled()
    few = sample_of([2.0] * 1000, max_values=100).sampled()
    for each in ([many, few], [few, many]):
        pool = pooled(each)
        assert np.mean(pool == 2.0) == pytest.approx(0.1, abs=0.02) and len(pool) > 100
    assert np.mean(pooled([many, sample_of([2.0] * 90, max_values=100).sampled()]) == 2.0) < 0.02


def test_a_completion_is_recorded_with_its_first_token_and_the_mean_of_the_later_ones():
    latencies = {"ttft": Sample(), "tpot": Sample()}
    passed: list[Completion] = []
    deliver = timed(passed.extend, latencies)
    done = [completion(1, Timing(1.0, 1.5, 1.5)), completion(3, Timing(1.0, 2.0, 4.0))]
    deliver(
        [
            *done,
            Completion.failure(2, "2", RequestError("invalid_json", "none")),
            completion(2, Timing(1.0, None, None)),
        ]
    )
    assert latencies["ttft"].sampled()[1].tolist() == [0.5, 1.0]
    assert latencies["tpot"].sampled()[1].tolist() == [1.0]
    assert len(passed) == 4
