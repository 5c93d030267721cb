"""Chunks of experts: the order of dispatch, and that every row reaches its expert and its token.

Run: pytest tests/unit/moe/dispatch/test_chunk_layout.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.moe.dispatch.chunk_layout import ExpertLayout
from tests.helpers.bounds import bounds


def test_the_worked_example_of_the_module_holds():
    layout = ExpertLayout([0, 3, 5], 2)
    assert layout.num_chunks == 2
    assert [chunk.bounds for chunk in layout.chunks] == [[0, 1, 2], [0, 2, 3]]
    assert [chunk.local_starts for chunk in layout.chunks] == [[0, 0], [1, 1]]
    ids = torch.tensor([[4, 0], [1, -1], [3, 2]])
    order = layout.sort(ids)
    # Travel order 0 3 | 1 2 4: t0 (e0), t2 (e3), then t1 (e1), t2 (e2), t0 (e4).
    assert order.token_N[:5].tolist() == [0, 2, 1, 2, 0]
    assert order.slot_TK.tolist() == [[4, 0], [2, -1], [1, 3]]
    assert order.load_E.tolist() == [1, 1, 1, 1, 1], "loads are by expert"
    first, second = layout.plans(order, np.array([[1, 1, 1, 1, 1], [0, 2, 0, 3, 0]]), 0)
    assert (first.send_splits, first.recv_splits) == ([1, 1], [1, 0])
    assert (second.send_splits, second.recv_splits) == ([2, 1], [2, 2])
    assert (first.expert_counts, second.expert_counts) == ([1, 0, 0], [0, 3, 1])
    assert second.order.token_N.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("experts", "ranks", "asked", "made"),
    [(8, 8, 4, 1), (8, 2, 3, 3), (8, 2, 99, 4), (5, 3, 2, 2), (8, 1, 4, 1), (7, 2, 1, 1)],
)
def test_there_are_no_more_chunks_than_experts_on_a_rank(experts, ranks, asked, made):
    layout = ExpertLayout(bounds(experts, ranks), asked)
    assert layout.num_chunks == len(layout.chunks) == made


@given(
    num_ranks=st.integers(1, 5),
    num_experts=st.integers(5, 11),
    num_chunks=st.integers(1, 6),
    tokens=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_every_row_reaches_its_expert_in_some_chunk_and_comes_home(
    num_ranks, num_experts, num_chunks, tokens, seed
):
    """Simulates all chunks' all-to-alls with Python lists over all ranks' plans."""
    generator = torch.Generator().manual_seed(seed)
    starts = bounds(num_experts, num_ranks)
    ids = []
    for rank in range(num_ranks):
        part = torch.rand(tokens[rank], num_experts, generator=generator).argsort(1)[:, :3]
        dropped = torch.rand(part.shape, generator=generator) < 0.3
        ids.append(part.masked_fill(dropped, -1))
    layout = ExpertLayout(starts, num_chunks)
    orders = [layout.sort(part) for part in ids]
    counts = np.stack([order.load_E.numpy() for order in orders])
    plans = [layout.plans(order, counts, rank) for rank, order in enumerate(orders)]
    homes: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for index in range(layout.num_chunks):
        chunk = [plans[rank][index] for rank in range(num_ranks)]
        sends = []
        for rank, plan in enumerate(chunk):
            rows = [(rank, token) for token in plan.order.token_N.tolist()]
            assert len(rows) == sum(plan.send_splits)
            cuts = np.cumsum([0, *plan.send_splits])
            sends.append([rows[a:b] for a, b in zip(cuts, cuts[1:], strict=False)])
        answers: list[list[list]] = [[[] for _ in range(num_ranks)] for _ in range(num_ranks)]
        for target, plan in enumerate(chunk):
            arrived = [row for source in range(num_ranks) for row in sends[source][target]]
            assert [len(sends[source][target]) for source in range(num_ranks)] == plan.recv_splits
            places = (
                range(len(arrived)) if plan.recv_index_R is None else plan.recv_index_R.tolist()
            )
            assert len(plan.expert_counts) == starts[target + 1] - starts[target]
            work = [e for e, count in enumerate(plan.expert_counts) for _ in range(count)]
            results = [None] * len(arrived)
            for place, local in zip(places, work, strict=True):
                source, token = arrived[place]
                expert = starts[target] + local
                assert expert in ids[source][token].tolist()
                results[place] = (token, expert)
            cuts = np.cumsum([0, *plan.recv_splits])
            for source, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
                answers[source][target] = results[a:b]
        for rank in range(num_ranks):
            homes[rank] += [row for part in answers[rank] for row in part]
    for rank in range(num_ranks):
        slots = orders[rank].slot_TK
        for token, row in enumerate(ids[rank].tolist()):
            for column, expert in enumerate(row):
                slot = int(slots[token, column])
                assert (slot == -1) == (expert == -1)
                assert expert == -1 or homes[rank][slot] == (token, expert)
