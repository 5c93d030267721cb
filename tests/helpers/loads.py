"""Skewed loads for tests; the generators themselves stand with the benches that share them."""

from bench.loads import (
    cap_loads,
    fit,
    hot_loads,
    ragged_sizes,
    random_routing,
    rank_loads,
    recorded_loads,
    routing_of,
    scores_of,
    zipf_loads,
)

__all__ = [
    "cap_loads",
    "fit",
    "hot_loads",
    "ragged_sizes",
    "rank_loads",
    "recorded_loads",
    "random_routing",
    "routing_of",
    "scores_of",
    "zipf_loads",
]
