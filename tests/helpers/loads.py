"""Skewed loads for tests; the generators are in `tools/bench/loads.py`, shared with the benches."""

from bench.loads import (
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

__all__ = [
    "cap_loads",
    "fit",
    "overloaded_rank_loads",
    "ragged_sizes",
    "rank_loads",
    "recorded_loads",
    "random_routing",
    "routing_of",
    "scores_of",
    "zipf_loads",
]
