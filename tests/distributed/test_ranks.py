"""`run_ranks`, the basis of all tests of several ranks: it returns, reports and never hangs.

python -m pytest tests/distributed/test_ranks.py
"""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.helpers.ranks import RanksFailed, run_ranks


def rank_and_environ(rank: int, offset: int) -> tuple[int, str, str]:
    return rank + offset, os.environ["RANK"], os.environ["WORLD_SIZE"]


def tensor(rank: int) -> torch.Tensor:
    return torch.full((2,), float(rank))


def raise_on_one(rank: int) -> None:
    if rank == 1:
        raise KeyError("lost key")
    time.sleep(3600)


def die_on_zero(rank: int) -> None:
    if rank == 0:
        os._exit(7)
    time.sleep(60)


def sleep(rank: int) -> None:
    time.sleep(60)


def test_results_are_returned_in_rank_order():
    assert run_ranks(rank_and_environ, 3, 10) == [(10, "0", "3"), (11, "1", "3"), (12, "2", "3")]


def test_tensors_survive_the_rank_that_created_them():
    assert [part.tolist() for part in run_ranks(tensor, 2)] == [[0.0, 0.0], [1.0, 1.0]]


def test_an_exception_is_reported_with_its_traceback_and_ends_the_others():
    with pytest.raises(RanksFailed, match="lost key") as caught:
        run_ranks(raise_on_one, 2, timeout=3600)
    assert "raise_on_one" in str(caught.value) and "rank 0: killed" in str(caught.value)


def test_a_rank_that_dies_is_named_with_its_exit_code():
    with pytest.raises(RanksFailed, match="rank 0: exited without a result, exit code 7"):
        run_ranks(die_on_zero, 2)


def test_a_hang_ends_at_the_timeout():
    with pytest.raises(RanksFailed, match="rank 0: no result in 1 s"):
        run_ranks(sleep, 2, timeout=1.0)
