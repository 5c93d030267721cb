"""Counts of a GPU are read one step late, all of them, and none twice.

Run: pytest tests/unit/profiling/test_late_loads.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.profiling.late_loads import LateLoads
from engine.profiling.loads import LoadCounter


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateLoads:
    """Without a GPU there is nothing to wait for, and no memory to pin."""
    empty = torch.empty

    def unpinned(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        assert pin_memory
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return LateLoads()


def test_counts_of_a_step_are_recorded_when_the_next_has_ended(late: LateLoads):
    seen: list[tuple[int, list[int]]] = []
    for step in range(3):
        for layer in range(2):
            counts = torch.tensor([step, layer, 7][: 2 + layer])
            late.add(counts, lambda found, layer=layer: seen.append((layer, found.tolist())))
            counts_of_replay = counts
        late.end_step()
        counts_of_replay.fill_(-1)  # a graph that runs again counts into the same memory
        assert len(seen) == 2 * step
    late.end_step()
    expected = [(layer, [step, layer, 7][: 2 + layer]) for step in range(3) for layer in range(2)]
    assert seen == expected
    late.end_step()
    late.flush()
    assert seen == expected


def test_nothing_is_left_after_a_wait_and_nothing_comes_after_a_clear(late: LateLoads):
    seen: list[list[int]] = []
    late.add(torch.tensor([3]), lambda found: seen.append(found.tolist()))
    late.end_step(wait=True)
    assert seen == [[3]]
    late.add(torch.tensor([4]), lambda found: seen.append(found.tolist()))
    late.end_step()
    late.clear()
    late.flush()
    assert seen == [[3]]


def test_rows_of_all_ranks_that_are_known_are_not_exchanged_again():
    loads = [LoadCounter(), LoadCounter()]
    for counter, after_W in zip(loads, (None, np.array([4, 2])), strict=True):
        counter.record(
            5,
            before_E=np.array([3, 1, 2]),
            rank_before=[4, 2],
            own_after=[3, 1],
            own_experts=[0, 1],
            after_W=after_W,
        )
    exchanged, known = loads
    assert known.take_rows() == [] and exchanged.take_rows() == [4]
    exchanged.set_exchanged(np.array([[4], [2]]))
    for one, other in zip(exchanged.layers.values(), known.layers.values(), strict=True):
        assert (one.slowest_after, one.mean_after) == (other.slowest_after, other.mean_after)
        assert (one.slowest_time, one.slowest) == (other.slowest_time, other.slowest)


def test_counts_are_read_at_once_where_the_host_has_waited_and_after_a_wait_where_not(
    monkeypatch: pytest.MonkeyPatch,
):
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(0))
    late, seen = LateLoads(), []
    late._copied = torch.tensor([1, 2]), [(2, lambda counts: seen.append(counts.tolist()))]
    late.end_step(waited=True)
    assert not waits and seen == [[1, 2]]
    late._copied = torch.tensor([3]), [(1, lambda counts: seen.append((len(waits), *counts)))]
    late.end_step(waited=False)
    assert waits == [0] and seen[1] == (1, 3)


def test_taken_counts_are_not_recorded_at_the_end_of_the_step():
    late = LateLoads()
    late.add(torch.tensor([1]), lambda _: None)
    assert [counts.tolist() for counts, _ in late.take()] == [[1]]
    late.end_step()
    assert late._copied is None
