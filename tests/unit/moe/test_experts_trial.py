"""Transformer Engine runs by itself only where every rank has measured it to be faster.

Run: pytest tests/unit/moe/test_experts_trial.py
"""

import pytest
import torch

from engine.moe import experts_trial
from engine.moe.experts_trial import TrialShape, faster_backend
from tests.helpers.threads import ThreadCollectives, run_threads

CPU = torch.device("cpu")
SHAPE = TrialShape(num_local=2, hidden=16, ffn=24, rows=7)


@pytest.fixture
def times(monkeypatch):
    """Milliseconds of each backend that the ranks measure: their own where the value is a list."""
    found: dict = {"torch": 1.0, "te": 0.5, "imports": [True, True]}
    rank_of: list[int] = []

    def seconds(name, *_):
        value = found[name]
        return (value[rank_of[-1]] if isinstance(value, list) else value) / 1e3

    monkeypatch.setattr(experts_trial, "_te_imports", lambda: found["imports"][rank_of[-1]])
    monkeypatch.setattr(experts_trial, "_seconds", seconds)

    def agreed(dtype=torch.bfloat16):
        def run(collectives: ThreadCollectives):
            rank_of.append(collectives.rank)
            own, gather = collectives.rank, collectives.all_gather

            def all_gather(part):
                pending = gather(part)
                rank_of.append(own)  # the other rank ran meanwhile
                return pending

            collectives.all_gather = all_gather
            return faster_backend(SHAPE, CPU, dtype, collectives)

        return run_threads(run, 2)

    return found, agreed


def test_te_is_taken_where_the_slowest_rank_finds_it_faster(times):
    found, agreed = times
    assert agreed() == ["te", "te"]
    found["te"] = [0.1, 1.2]  # faster than torch on rank 0 alone
    assert agreed() == [None, None]


def test_te_is_not_taken_for_a_gain_that_could_be_noise(times):
    found, agreed = times
    found["te"] = 0.95
    assert agreed() == [None, None]


def test_nothing_is_measured_where_one_rank_cannot_import_te(times):
    found, agreed = times
    found["imports"], found["te"] = [True, False], None
    assert agreed() == [None, None]


def test_float32_is_never_measured(times):
    found, agreed = times
    found["imports"] = None
    assert agreed(torch.float32) == [None, None]


def test_a_backend_that_fails_takes_forever():
    assert experts_trial._seconds("te", SHAPE, CPU, torch.float32) == float("inf")
    assert 0 < experts_trial._seconds("torch", SHAPE, CPU, torch.float32) < float("inf")
