"""Levelling of ranks' loads over copies. Run: pytest tests/unit/ops/test_level_rows.py"""

import pytest
import torch

from engine.ops.level_rows import level_rows, level_rows_reference


def case(homes, copies, loads_ES, ranks):
    rows = torch.cat([loads_ES, torch.zeros(len(copies), loads_ES.shape[1])])
    load = torch.zeros(ranks, loads_ES.shape[1]).index_add_(0, torch.tensor(homes), loads_ES)
    return load, rows, torch.tensor(homes), torch.tensor(copies).reshape(-1, 2), torch.ones(ranks)


def test_native_equals_its_reference_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    loads = torch.rand(12, 50, generator=generator) * 100
    homes = [expert % 4 for expert in range(12)]
    copies = [[0, 1], [0, 2], [0, 3], [5, 0], [7, 1]]
    native, plain = case(homes, copies, loads, 4), case(homes, copies, loads, 4)
    native[4][:], plain[4][:] = torch.tensor([1, 1.5, 2, 0.7]), torch.tensor([1, 1.5, 2, 0.7])
    most = level_rows(*native, 5)
    assert torch.equal(most, level_rows_reference(*plain, 5))
    assert torch.equal(native[0], plain[0]) and torch.equal(native[1], plain[1])


@pytest.mark.parametrize("level", [level_rows, level_rows_reference])
def test_a_copy_takes_what_makes_both_ranks_equal(level):
    load, rows, *rest = case([0, 1], [[0, 1]], torch.tensor([[10.0, 3.0], [2.0, 9.0]]), 2)
    assert level(load, rows, *rest, 1).tolist() == [6, 9]
    assert rows.tolist() == [[6, 3], [2, 9], [4, 0]]  # nothing moves to the fuller rank


@pytest.mark.parametrize("level", [level_rows, level_rows_reference])
def test_rows_move_on_over_a_chain_of_copies(level):
    loads = torch.tensor([[9.0], [3.0], [0.0]])
    load, rows, *rest = case([0, 1, 2], [[0, 1], [1, 2]], loads, 3)
    most = level(load, rows, *rest, 60)
    assert most.item() == pytest.approx(5, abs=1.0)  # expert 1 has three rows to pass on: 5 4.5 3
    assert load.flatten().tolist() == pytest.approx([4.5, 4.5, 3], abs=1e-3)


@pytest.mark.parametrize("level", [level_rows, level_rows_reference])
def test_a_rank_with_twice_the_time_per_row_gets_half_the_rows(level):
    load, rows, home, copies, times = case([0, 1], [[0, 1]], torch.tensor([[12.0], [0.0]]), 2)
    times[1] = 2
    assert level(load, rows, home, copies, times, 1).item() == pytest.approx(8)
    assert load.flatten().tolist() == pytest.approx([8, 4])


@pytest.mark.parametrize("level", [level_rows, level_rows_reference])
def test_copies_of_one_expert_exchange_rows_though_its_home_is_full(level):
    # Rank 0 keeps 20 rows of its own; of expert 1, ranks 1 and 2 must share all 12.
    load, rows, *rest = case([0, 0], [[1, 1], [1, 2]], torch.tensor([[20.0], [12.0]]), 3)
    level(load, rows, *rest, 60)
    assert load.flatten().tolist() == pytest.approx([20, 6, 6], abs=1e-3)
