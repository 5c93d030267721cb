"""Numbers of experts where ranks have unequally many, and rows in blocks per expert."""

from __future__ import annotations

import pytest
import torch

from engine.moe.dispatch.transports.expert_blocks import equal_ids, places_of_rows, rows_of_places

CPU = torch.device("cpu")


def test_equal_ranks_need_no_other_numbers() -> None:
    assert equal_ids((0, 4, 8), CPU) is None


@pytest.mark.parametrize(
    ("first_experts", "ids"),
    [((0, 3, 5), [0, 1, 2, 3, 4, -1]), ((0, 2, 5), [0, 1, 3, 4, 5, -1])],
)
def test_a_rank_has_as_many_numbers_as_the_largest(first_experts, ids) -> None:
    ids_E1 = equal_ids(first_experts, CPU)
    assert ids_E1 is not None
    assert ids_E1.tolist() == ids
    assert ids_E1[torch.tensor([-1])].item() == -1  # no assignment stays none


def test_places_are_the_first_rows_of_each_block() -> None:
    load_e, place_R = torch.tensor([1, 3]), torch.arange(5)
    assert rows_of_places(load_e, 4, place_R).tolist()[:4] == [0, 4, 5, 6]
    assert places_of_rows(load_e, torch.arange(4), 5).view(2, 4)[0, 0] == 0
    assert places_of_rows(load_e, torch.arange(4), 5).view(2, 4)[1, :3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("load", [[0, 0, 0], [0, 4, 0], [2, 0, 4], [4, 4, 4]])
def test_every_index_is_a_row_or_a_place(load: list[int]) -> None:
    load_e, places = torch.tensor(load), 12
    rows = rows_of_places(load_e, 4, torch.arange(places))
    back = places_of_rows(load_e, torch.arange(4), places)
    assert 0 <= int(rows.min()) and int(rows.max()) < 12
    assert 0 <= int(back.min()) and int(back.max()) < places
    for place in range(sum(load)):  # there and back
        assert back[rows[place]] == place
