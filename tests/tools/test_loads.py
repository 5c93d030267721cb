"""Skewed loads: exact sums, exact routings, and the known figures of Zipf loads under capacity.

Run: pytest tests/tools/test_loads.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.loads import (
    cap_loads,
    fit,
    overloaded_rank_loads,
    ragged_sizes,
    random_routing,
    rank_loads,
    recorded_loads,
    routing_of,
    scores_of,
    zipf_loads,
)

# Deterministic Zipf loads over 4,096 tokens: experts / K / ranks, exponent; max over mean of the
# experts and of the ranks; speed bound of the ranks at gamma 2, 1.5 and 1; share dropped.
ZIPF = [
    ((8, 2, 8, 1.0), "2.94 2.94", "1.47 1.96 2.94", ".118 .181 .302"),
    ((64, 8, 8, 0.3), "2.51 1.72", "1.04 1.18 1.72", ".009 .032 .117"),
    ((64, 8, 8, 0.5), "4.38 2.40", "1.28 1.60 2.40", ".066 .112 .208"),
    ((60, 4, 6, 0.5), "4.26 2.14", "1.22 1.45 2.13", ".064 .110 .206"),
]


@pytest.mark.parametrize(("shape", "imbalance", "bounds", "dropped"), ZIPF)
def test_zipf_loads_have_the_known_imbalance_bounds_and_drops(shape, imbalance, bounds, dropped):
    num_experts, top_k, num_ranks, exponent = shape
    loads = zipf_loads(4096, num_experts, top_k, exponent)
    ranks = rank_loads(loads, num_ranks)
    kept = [cap_loads(loads, factor, 4096, top_k) for factor in ("2", "1.5", "1")]
    found_bounds = [ranks.max() / rank_loads(each, num_ranks).max() for each in kept]
    found_dropped = [1 - each.sum() / loads.sum() for each in kept]
    assert f"{loads.max() / loads.mean():.2f} {ranks.max() / ranks.mean():.2f}" == imbalance
    assert " ".join(f"{bound:.2f}" for bound in found_bounds) == bounds
    assert " ".join(f"{share:.3f}".lstrip("0") for share in found_dropped) == dropped


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


def test_loads_above_all_tokens_are_redistributed_in_proportion():
    # 10 tokens, top-2: expert 0 has 18 of 20 rows by weight, at most 10; the others get 4 and 6.
    assert fit(np.array([45.0, 2.0, 3.0]), 10, 2).tolist() == [10, 4, 6]


def test_the_remainder_of_rounding_goes_to_the_most_loaded_one_each():
    # Shares 2.2, 4.4 and 3.3 round down to 9 of 10 rows: one is left over.
    assert fit(np.array([2.2, 4.4, 3.3]), 10, 1).tolist() == [2, 5, 3]


def test_rows_that_no_weight_asks_for_are_spread_evenly():
    assert fit(np.array([7.0, 0.0, 0.0]), 4, 2).tolist() == [4, 2, 2]


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks"), [(8, 2, 2), (64, 8, 2), (60, 4, 6), (8, 2, 4)]
)
def test_overloaded_rank_loads_give_the_first_rank_the_ratio(experts, top_k, ranks):
    loads = overloaded_rank_loads(4096, experts, top_k, 1.6, ranks)
    assert rank_loads(loads, ranks)[0] / (loads.sum() / ranks) == pytest.approx(1.6, abs=0.001)
    assert loads[0] == loads.max() > 1.6 * loads.mean(), "its first expert has most load"


def test_a_ratio_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="ratio 3"):
        overloaded_rank_loads(100, 8, 2, 3.0, 2)


def test_recorded_loads_are_those_of_the_report(tmp_path):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"run": {"layers": [{"layer": 2, "expert_loads": [5, 1]}]}}))
    assert {layer: loads.tolist() for layer, loads in recorded_loads(report).items()} == {2: [5, 1]}
    report.write_text("{}")
    with pytest.raises(ValueError, match="holds no layers"):
        recorded_loads(report)


def test_recorded_loads_are_counted_from_a_saved_routing(tmp_path):
    path = tmp_path / "routing.npz"
    np.savez(path, layer0=np.array([[0, 2], [2, 1]]), num_experts=4)
    assert recorded_loads(path)[0].tolist() == [1, 1, 2, 0]
    np.savez(path, layer0=np.array([[0, 2]]))
    with pytest.raises(ValueError, match="no num_experts"):
        recorded_loads(path)


def test_scores_choose_the_given_experts_with_margins_or_all_alike():
    ids = routing_of(zipf_loads(50, 8, 3, 1.0), 50)
    scores = scores_of(ids, 8)
    assert torch.equal(scores.topk(3).indices, ids)
    chosen = scores.gather(1, ids).flatten()
    assert chosen.unique().numel() == chosen.numel(), "no ties"
    tied = scores_of(ids, 8, ties=True)
    assert set(tied.gather(1, ids).flatten().tolist()) == {1.0}
    assert int(tied.sum()) == ids.numel()


@given(num_tokens=st.integers(0, 500), num_ranks=st.integers(1, 8))
def test_ragged_sizes_tile_all_tokens_and_leave_the_last_rank_empty(num_tokens, num_ranks):
    sizes = ragged_sizes(num_tokens, num_ranks)
    assert len(sizes) == num_ranks and sum(sizes) == num_tokens and min(sizes) >= 0
    assert num_ranks == 1 or sizes[-1] == 0
    assert sizes == sorted(sizes, reverse=True)


def test_random_routing_draws_distinct_experts_with_their_weights_and_independently():
    ids_TK = random_routing(20000, 6, 2, 1.0).numpy()
    assert all(len(set(row)) == 2 for row in ids_TK.tolist())
    first = np.bincount(ids_TK[:, 0], minlength=6) / len(ids_TK)
    weights = 1 / np.arange(1, 7)
    np.testing.assert_allclose(first, weights / weights.sum(), atol=0.01)
    # Of the first expert's 20,000 * w tokens the second choice follows the other weights.
    second = np.bincount(ids_TK[ids_TK[:, 0] == 0, 1], minlength=6)
    others = np.where(np.arange(6) == 0, 0, weights)
    np.testing.assert_allclose(second / second.sum(), others / others.sum(), atol=0.02)
