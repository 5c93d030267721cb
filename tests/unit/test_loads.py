"""Skewed loads: exact sums, exact routings, and the known figures of Zipf loads under capacity.

Run: pytest tests/unit/test_loads.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loads import cap_loads, fit, hot_loads, rank_loads, recorded_loads, routing_of, zipf_loads

# Deterministic Zipf loads over 4,096 tokens: experts / K / ranks, exponent; max over mean of the
# experts and of the ranks; speed bound of the ranks at gamma 2, 1.5 and 1; share dropped, which
# depends on how loads are made whole, by less than 0.001.
ZIPF = [
    ((8, 2, 8, 1.0), (2.94, 2.94), (1.47, 1.96, 2.94), (0.118, 0.181, 0.302)),
    ((64, 8, 8, 0.3), (2.51, 1.72), (1.04, 1.18, 1.72), (0.009, 0.032, 0.117)),
    ((64, 8, 8, 0.5), (4.38, 2.40), (1.28, 1.60, 2.40), (0.066, 0.112, 0.208)),
    ((60, 4, 6, 0.5), (4.26, 2.14), (1.22, 1.45, 2.13), (0.064, 0.110, 0.206)),
]


@pytest.mark.parametrize(("shape", "imbalance", "bounds", "dropped"), ZIPF)
def test_zipf_loads_have_the_known_imbalance_bounds_and_drops(shape, imbalance, bounds, dropped):
    num_experts, top_k, num_ranks, exponent = shape
    loads = zipf_loads(4096, num_experts, top_k, exponent)
    ranks = rank_loads(loads, num_ranks)
    assert loads.max() / loads.mean() == pytest.approx(imbalance[0], abs=0.006)
    assert ranks.max() / ranks.mean() == pytest.approx(imbalance[1], abs=0.006)
    for factor, bound, share in zip(("2", "1.5", "1"), bounds, dropped, strict=True):
        kept = cap_loads(loads, factor, 4096, top_k)
        after = rank_loads(kept, num_ranks)
        assert ranks.max() / after.max() == pytest.approx(bound, abs=0.006)
        assert 1 - kept.sum() / loads.sum() == pytest.approx(share, abs=0.001)


@given(
    num_tokens=st.integers(1, 60),
    num_experts=st.integers(1, 12),
    top_k=st.integers(1, 12),
    exponent=st.floats(0, 4),
)
def test_loads_sum_to_all_assignments_and_no_expert_is_chosen_twice_by_a_token(
    num_tokens, num_experts, top_k, exponent
):
    top_k = min(top_k, num_experts)
    loads = zipf_loads(num_tokens, num_experts, top_k, exponent)
    assert loads.sum() == num_tokens * top_k
    assert loads.min() >= 0 and loads.max() <= num_tokens
    assert (np.diff(loads) <= 0).all(), "lower experts are never chosen less"
    ids = routing_of(loads, num_tokens).numpy()
    assert ids.shape == (num_tokens, top_k)
    assert np.bincount(ids.ravel(), minlength=num_experts).tolist() == loads.tolist()
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_what_exceeds_all_tokens_goes_to_the_others_in_proportion():
    # 10 tokens, top-2: expert 0 wants 18 of 20 rows and gets 10; the other ten go 2 : 3.
    assert fit(np.array([45.0, 2.0, 3.0]), 10, 2).tolist() == [10, 4, 6]


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks"), [(8, 2, 2), (64, 8, 2), (60, 4, 6), (8, 2, 4)]
)
def test_hot_loads_give_the_first_rank_what_is_asked(experts, top_k, ranks):
    loads = hot_loads(4096, experts, top_k, 1.6, ranks)
    assert rank_loads(loads, ranks)[0] / (loads.sum() / ranks) == pytest.approx(1.6, abs=0.001)
    assert loads[0] == loads.max() > 1.6 * loads.mean(), "its first expert is the hot one"


def test_a_ratio_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="ratio 3"):
        hot_loads(100, 8, 2, 3.0, 2)


def test_recorded_loads_are_those_of_the_report(tmp_path):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"run": {"layers": [{"layer": 2, "expert_loads": [5, 1]}]}}))
    assert {layer: loads.tolist() for layer, loads in recorded_loads(report).items()} == {2: [5, 1]}
    report.write_text("{}")
    with pytest.raises(ValueError, match="holds no layers"):
        recorded_loads(report)
