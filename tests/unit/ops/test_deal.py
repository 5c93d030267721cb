"""engine.ops.deal: rows dealt to the instances of their experts."""

from __future__ import annotations

import torch

from engine.ops.deal import deal_claims, deal_rows, list_claims, parts_of_list
from tests.helpers.deal_cases import EXPERTS, claims_of, tables_of


def test_hosts_take_rows_in_turn_up_to_their_ends():
    ends, hosts = torch.tensor([[2, 5], [1, 1]]), torch.tensor([[0, 3, -1], [1, -1, -1]])
    ids = torch.tensor([[0, 0], [0, 0], [1, 1], [-1, 0]])
    place = torch.tensor([[0, 1], [2, 4], [0, 1], [7, 5]])
    assert deal_rows(ids, place, ends, hosts).tolist() == [[0, 0], [3, 3], [1, -1], [-1, -1]]


def test_listed_claims_are_in_order_and_counted_by_rank_and_expert():
    code = torch.tensor([[0, 1, 2, 4], [1, 1, 3, 5]])  # of two experts: 2 and 3 are exempt
    order = torch.tensor([5, 0, 2, 4, 3, 1, 6, 7])
    counts, place = parts_of_list(list_claims(code, order, torch.tensor([[0], [1]]), 2), 2, 2)
    assert counts.tolist() == [[1, 1, 1, 0, 0], [0, 2, 0, 1, 1]]
    assert place[:, 0].tolist() == [1, 0, -1, 1, -1, 1, -1, -1]


def test_exempt_claims_stay_at_home_and_the_best_come_first():
    code = torch.tensor([[0, 0, 2], [0, 3, 4]])
    order = torch.tensor([3, 1, 0, 2, 4, 5])
    slot = torch.tensor([0, 1, 2, -1, -1, -1])
    ends, hosts = torch.tensor([[1, 2], [2, 2]]), torch.tensor([[0, 2, -1], [1, -1, -1]])
    instances, counts = deal_claims(code, order, slot, ends, hosts, 3)
    assert instances.tolist() == [[-1, 2, 0], [0, 1, -1]]
    assert counts.tolist() == [[1, 0, 1], [1, 1, 0]]


def test_counts_are_those_of_the_dealt_claims():
    (ends, hosts), (code, order, slot) = tables_of(3), claims_of(90)
    instances, counts = deal_claims(code, order, slot, ends * 9, hosts, 3 * EXPERTS)
    for rank in range(3):
        found = instances[rank][instances[rank] >= 0]
        assert counts[rank].tolist() == found.bincount(minlength=3 * EXPERTS).tolist()
