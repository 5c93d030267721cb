"""The bench of re-planning: what it reads from the ranks' replies.

Run: pytest tests/tools/test_bench_replan.py
"""

from __future__ import annotations

from typing import Any

import pytest
from bench_replan import outcome


def replies(rows: list[list[int]], moves: list[int]) -> list[dict[str, Any]]:
    """Two ranks, one layer of four experts; `rows` of both ranks in each step."""
    before = [[[sum(pair) // 2, sum(pair) - sum(pair) // 2, 0, 0]] for pair in rows]
    return [
        {
            "after": [[pair[rank]] for pair in rows],
            "before": before,
            "seconds": [1.0 + 0.5 * (number == 3 and rank == 1) for number in range(len(rows))],
            "moves": moves,
        }
        for rank in range(2)
    ]


def test_recovery_is_counted_from_the_change_and_must_last():
    rows = [[10, 10], [10, 10], [15, 5], [10, 10], [15, 5], [10, 10], [10, 10], [10, 10]]
    found = outcome(replies(rows, [0, 0, 0, 0, 1, 1, 2, 2]), change=2, window=6, limit=0.9)
    assert found.recovered == 3, "the second fall counts"
    assert (found.moved_by_then, found.moved) == (1 / 4, 2 / 4)
    assert found.share_at_change == pytest.approx(10 / 15)
    assert found.share_after == 1.0
    assert (found.slowest, found.median) == (1.5, 1.0)


def test_a_share_that_stays_low_is_no_recovery():
    found = outcome(replies([[10, 10]] * 3 + [[15, 5]] * 4, [0] * 7), 3, 4, 0.9)
    assert found.recovered is None
    with pytest.raises(ValueError, match="has 7 steps, 8 are needed"):
        outcome(replies([[10, 10]] * 7, [0] * 7), 3, 5, 0.9)
