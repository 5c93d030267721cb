"""The dispatch plan against hand-worked indices and against a slow oracle. Run: pytest
tests/unit/moe/dispatch/test_plan.py
"""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.moe.dispatch import plan as plan_module
from engine.moe.dispatch.plan import ExpertOrder, make_plan
from engine.ops import sort_by_expert as sort_op
from tests.helpers.bounds import bounds


def sort_by_expert(ids_TK: torch.Tensor, num_experts: int) -> ExpertOrder:
    return ExpertOrder(*sort_op.sort_by_expert(ids_TK, num_experts))


def test_the_worked_example_of_the_module_docstring_holds():
    order = sort_by_expert(torch.tensor([[3, 0], [0, 2]]), 4)
    assert order.token_N.tolist() == [0, 1, 1, 0]
    assert order.slot_TK.tolist() == [[3, 0], [1, 2]]
    assert order.load_E.tolist() == [2, 0, 1, 1]
    plan = make_plan(order, np.array([[2, 0, 1, 1], [1, 1, 0, 0]]), 0, [0, 2, 4])
    assert plan.send_splits == [2, 2]
    assert plan.recv_splits == [2, 2]
    assert plan.expert_counts == [3, 1]
    assert plan.recv_index_R is not None and plan.recv_index_R.tolist() == [0, 1, 2, 3]
    assert plan.num_received == 4


def test_arrival_order_regroups_rows_of_two_sources_by_expert():
    order = sort_by_expert(torch.tensor([[0], [1]]), 2)
    # Arrivals: rank 0 sent e0 e1, rank 1 sent e0 e0 e1. Grouped: e0 is 0, 2, 3 and e1 is 1, 4.
    plan = make_plan(order, np.array([[1, 1], [2, 1]]), 0, [0, 2, 2])
    assert plan.recv_index_R is not None and plan.recv_index_R.tolist() == [0, 2, 3, 1, 4]
    assert plan.send_splits == [2, 0]


def test_the_receive_index_is_made_when_it_is_first_read_and_once(monkeypatch):
    made = []
    make = plan_module._recv_index
    monkeypatch.setattr(plan_module, "_recv_index", lambda *each: made.append(1) or make(*each))
    order = sort_by_expert(torch.tensor([[3, 0], [0, 2]]), 4)
    plan = make_plan(order, np.array([[2, 0, 1, 1], [1, 1, 0, 0]]), 0, [0, 2, 4])
    assert not made, "rows can be sent without it"
    first = plan.recv_index_R
    assert first is not None and plan.recv_index_R is first and made == [1]


@given(
    num_ranks=st.integers(1, 5),
    num_experts=st.integers(5, 11),
    top_k=st.integers(1, 5),
    tokens=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_every_assignment_reaches_its_expert_and_finds_its_way_back(
    num_ranks, num_experts, top_k, tokens, seed
):
    """Simulates the all-to-all with Python lists over all ranks' plans."""
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.rand(tokens[rank], num_experts, generator=generator).argsort(1)[:, :top_k]
        for rank in range(num_ranks)
    ]
    orders = [sort_by_expert(part, num_experts) for part in ids]
    counts = np.stack([order.load_E.numpy() for order in orders])
    starts = bounds(num_experts, num_ranks)
    plans = [make_plan(orders[rank], counts, rank, starts) for rank in range(num_ranks)]

    def sent(source: int, target: int) -> list[tuple[int, int, int]]:
        """(source rank, token, position in send order) of the rows one rank sends another."""
        begin = sum(plans[source].send_splits[:target])
        rows = range(begin, begin + plans[source].send_splits[target])
        return [(source, int(orders[source].token_N[row]), row) for row in rows]

    for target, plan in enumerate(plans):
        arrived = [row for source in range(num_ranks) for row in sent(source, target)]
        assert len(arrived) == plan.num_received
        assert plan.recv_splits == [len(sent(source, target)) for source in range(num_ranks)]
        if plan.recv_index_R is not None:
            assert sorted(plan.recv_index_R.tolist()) == list(range(len(arrived)))
            arrived = [arrived[index] for index in plan.recv_index_R.tolist()]
        row = 0
        for local, count in enumerate(plan.expert_counts):
            for source, token, slot in arrived[row : row + count]:
                k = orders[source].slot_TK[token].tolist().index(slot)
                assert int(ids[source][token, k]) == starts[target] + local
            row += count
        assert row == len(arrived)
