"""The most rows that a rank may have to hold in a call: in rounds, and where nothing is counted."""

from __future__ import annotations

from engine.config import CapacityConfig
from engine.generation.memory import MoEShape, RowBound, row_bound

# Mixtral on 8 ranks.
SHAPE = MoEShape(num_ranks=8, top_k=2, num_experts=8, num_local_experts=1, hidden=4096, ffn=14336)
TOKENS = 8192


def test_without_counts_on_the_host_a_rank_has_room_for_the_worst_case() -> None:
    assert row_bound(SHAPE, CapacityConfig(), TOKENS, 0) == RowBound(16384, 32768, has_rounds=True)
    bound = row_bound(SHAPE, CapacityConfig(), TOKENS, 0, in_rounds=False)
    assert bound == RowBound(16384, 65536)


def test_capacity_bounds_the_rows_with_and_without_counts_on_the_host() -> None:
    capacity = CapacityConfig(policy="token_drop", factor="1.5")
    for in_rounds in (True, False):
        bound = row_bound(SHAPE, capacity, TOKENS, 0, in_rounds=in_rounds)
        assert bound == RowBound(16384, 24576)
