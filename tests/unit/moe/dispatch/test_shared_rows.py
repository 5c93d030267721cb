"""Which shared rows may move, how many do, and what that writes into the rows.

Run: pytest tests/unit/moe/dispatch/test_shared_rows.py
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import DispatchConfig, MoEConfig
from engine.layers.mlp import DenseMLP
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.row_format import RowFormats
from engine.moe.dispatch.shared_plan import plan_moves
from engine.moe.dispatch.shared_rows import SharedRows, choose_candidates, shared_rows
from tests.helpers.bounds import bounds

costs = st.builds(Fraction, st.integers(1, 40), st.integers(1, 40))


def loads(rows_W: np.ndarray, tokens_W: np.ndarray, moved_WW: np.ndarray, cost: Fraction):
    """The load of every rank, exactly."""
    held_W = tokens_W + moved_WW.sum(0) - moved_WW.sum(1)
    return [int(rows) + cost * int(held) for rows, held in zip(rows_W, held_W, strict=True)]


def draw_plan(num_ranks: int, most: int, seed: int):
    generator = np.random.default_rng(seed)
    rows_W = generator.integers(0, 8 * most + 1, num_ranks)
    tokens_W = generator.integers(0, most + 1, num_ranks)
    # Each token has at most one candidate, on another rank.
    target = [generator.integers(-1, num_ranks, count) for count in tokens_W]
    candidates_WW = np.array([np.bincount(each[each >= 0], minlength=num_ranks) for each in target])
    np.fill_diagonal(candidates_WW, 0)
    return rows_W, tokens_W, candidates_WW


def test_the_plan_follows_the_worked_example():
    rows_W, tokens_W = np.array([20, 4]), np.array([6, 6])
    candidates_WW = np.array([[0, 6], [3, 0]])
    moved_WW = plan_moves(rows_W, tokens_W, candidates_WW, Fraction(1))
    assert moved_WW.tolist() == [[0, 6], [0, 0]]
    assert loads(rows_W, tokens_W, moved_WW, Fraction(1)) == [20, 16]
    more = plan_moves(rows_W, tokens_W * 2, candidates_WW * 2, Fraction(1))
    assert more.tolist() == [[0, 8], [0, 0]], "no more than makes the loads equal"


@given(num_ranks=st.integers(2, 7), most=st.integers(0, 40), cost=costs, seed=st.integers(0, 2**16))
def test_a_plan_moves_candidates_alone_and_lowers_the_most_loaded_rank_or_moves_none(
    num_ranks, most, cost, seed
):
    rows_W, tokens_W, candidates_WW = draw_plan(num_ranks, most, seed)
    moved_WW = plan_moves(rows_W, tokens_W, candidates_WW, cost)
    assert moved_WW.dtype == np.int64
    assert (moved_WW >= 0).all() and (moved_WW <= candidates_WW).all()
    before = loads(rows_W, tokens_W, np.zeros_like(moved_WW), cost)
    after = loads(rows_W, tokens_W, moved_WW, cost)
    if not moved_WW.any():
        return
    assert max(after) < max(before)
    assert not ((moved_WW.sum(0) > 0) & (moved_WW.sum(1) > 0)).any(), "no rank sends and receives"
    # What need not move does not: one row back would make its rank at least the most loaded one.
    for source in np.flatnonzero(moved_WW.sum(1)):
        assert after[source] + cost > max(after) - cost
    assert (rows_W + moved_WW.sum(0) <= rows_W.max() + tokens_W.max()).all(), "buffers hold them"


@given(most=st.integers(1, 60), cost=costs, seed=st.integers(0, 2**16))
def test_on_two_ranks_no_plan_is_better(most, cost, seed):
    rows_W, tokens_W, candidates_WW = draw_plan(2, most, seed)
    moved_WW = plan_moves(rows_W, tokens_W, candidates_WW, cost)
    found = max(loads(rows_W, tokens_W, moved_WW, cost))
    limit_W = rows_W.max() + tokens_W.max() - rows_W
    for source, target in ((0, 1), (1, 0)):
        for count in range(min(candidates_WW[source, target], limit_W[target]) + 1):
            other_WW = np.zeros_like(moved_WW)
            other_WW[source, target] = count
            # The line is a whole number of row costs and rows move whole: within one row.
            assert found <= max(loads(rows_W, tokens_W, other_WW, cost)) + cost


def test_equal_loads_and_a_group_without_tokens_move_nothing():
    candidates_WW = np.array([[0, 5], [5, 0]])
    for rows, tokens in (([12, 12], [5, 5]), ([0, 0], [0, 0])):
        assert not plan_moves(np.array(rows), np.array(tokens), candidates_WW, Fraction(1)).any()


def test_rows_spread_over_the_ranks_with_room_where_one_cannot_take_all():
    rows_W, tokens_W = np.array([120, 20, 20, 30]), np.array([20, 20, 20, 20])
    candidates_WW = np.zeros((4, 4), dtype=np.int64)
    candidates_WW[0] = [0, 7, 7, 6]
    moved_WW = plan_moves(rows_W, tokens_W, candidates_WW, Fraction(3))
    assert moved_WW[0].tolist() == [0, 7, 7, 6], "all candidates of a rank that stays slowest"


def ids_of(num_ranks: int, num_experts: int, columns: int, tokens: list[int], seed: int):
    """Padded ids of every rank, int64 [W, T, M], -1 where dropped or padded."""
    generator = torch.Generator().manual_seed(seed)
    most = max(tokens[:num_ranks])
    ids = torch.rand(num_ranks, most, num_experts, generator=generator).argsort(2)[..., :columns]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -1)
    for rank, count in enumerate(tokens[:num_ranks]):
        ids[rank, count:] = -1
    return ids


@given(
    num_ranks=st.integers(2, 5),
    num_experts=st.integers(10, 21),
    columns=st.integers(1, 5),
    chunks=st.integers(1, 3),
    by=st.sampled_from(["experts", "tokens"]),
    tokens=st.lists(st.integers(0, 9), min_size=5, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_every_rank_counts_the_candidates_that_each_rank_names(
    num_ranks, num_experts, columns, chunks, by, tokens, seed
):
    ids_WTM = ids_of(num_ranks, num_experts, columns, tokens, seed)
    rows = RowFormats.of(8, torch.float32, DispatchConfig(partial_sums=True))

    def layout(rank: int) -> ExpertLayout:
        starts, shared = bounds(num_experts, num_ranks), SharedRows(rank, Fraction(1))
        return ExpertLayout(starts, chunks, by, rows, deduplicate=True, shared=shared)

    orders = [layout(rank).sort(ids_WTM[rank, : tokens[rank]]) for rank in range(num_ranks)]
    own = [order.counts_to_exchange for order in orders if order.counts_to_exchange is not None]
    own_Wn = torch.stack(own)
    # Another order of the columns, as a consensus may have it.
    counted = layout(0).counts_to_exchange(ids_WTM.flip(2), tokens[:num_ranks])
    assert torch.equal(counted, own_Wn)
    exchanged = own_Wn.numpy()
    plans = [layout(rank).plans(order, exchanged, rank) for rank, order in enumerate(orders)]
    for rank, (plan, order) in enumerate(zip(plans, orders, strict=True)):
        if (moves := plan[0].shared_moves) is None:
            assert all(each[0].shared_moves is None for each in plans), "all ranks plan alike"
            continue
        assert moves.num_moved == int((moves.group_T >= 0).sum())
        staying = moves.staying()
        assert staying.tolist() == (moves.group_T < 0).nonzero()[:, 0].tolist()
        assert order.unique is not None and plan[0].unique is not None
        bits, groups = order.unique.bits_TGB, plan[0].unique.groups
        for token, group in enumerate(moves.group_T.tolist()):
            if group >= 0:
                assert group % num_ranks != rank, "another rank"
                assert bits[token, group].any(), "where a row of the token is"
        assert int((moves.bits(bits) != bits).sum()) == moves.num_moved, "one bit each"
        none = torch.zeros(len(moves.group_T), groups.num_groups, groups.most_experts)
        assert float(moves.weights(none).sum()) == moves.num_moved
    received = sum(each.unique.num_shared for plan in plans for each in plan if each.unique)
    sent = sum(plan[0].shared_moves.num_moved for plan in plans if plan[0].shared_moves)
    assert received == sent


def test_candidates_avoid_ranks_that_have_many_rows_and_take_turns_among_the_others():
    # Four ranks of one group each, this is rank 0: every token has rows on all ranks, and ranks 1
    # and 2 have one row per token, rank 3 three.
    group_TM = torch.tensor([[0, 1, 2, 3, 3, 3]]).repeat(6, 1)
    chosen = choose_candidates(group_TM[None], torch.tensor([0]), 4, 4)[0]
    assert set(chosen.tolist()) == {1, 2}
    only_heavy = torch.tensor([[0, 3, 4], [4, 4, 4], [0, 0, 4]])
    together = torch.cat((torch.nn.functional.pad(only_heavy, (0, 3), value=4), group_TM))
    chosen = choose_candidates(together[None], torch.tensor([0]), 4, 4)[0]
    assert chosen[:3].tolist() == [3, -1, -1], "a heavy rank is better than none, its own is none"


def test_a_model_without_shared_expert_is_refused_in_words():
    balanced = MoEConfig(shared_expert="balanced")
    with pytest.raises(ValueError, match="the model has no shared expert; use replicated"):
        shared_rows(balanced, None, 24, 0)
    assert shared_rows(MoEConfig(), None, 24, 0) is None
    shared = DenseMLP(16, 24, torch.device("cpu"), torch.float32)
    assert shared_rows(balanced, shared, 24, 0) is not None
