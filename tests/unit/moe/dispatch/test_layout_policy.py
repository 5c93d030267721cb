"""Which layout a step uses, and that all ranks know enough of each other for it under every policy.

Run: pytest tests/unit/moe/dispatch/test_layout_policy.py
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import DispatchConfig, MoEConfig, OverlapConfig
from engine.distributed.collectives import COLLECTIVE_BYTES
from engine.distributed.groups import Link
from engine.moe.dispatch.chunk_layout import MIN_CHUNK_ROWS, ExpertLayout
from engine.moe.dispatch.chunk_tuner import ChunkTuner
from engine.moe.dispatch.layout_policy import CHUNK_LAUNCHES, DEDUP_LAUNCHES, LayoutPolicy
from engine.moe.dispatch.row_format import RowFormats
from tests.helpers.capacity_cases import cases, make_tokens, run_engine
from tests.helpers.in_process_ranks import call
from tests.helpers.threads import ThreadCollectives

ROWS = RowFormats.of(96, torch.float32, DispatchConfig())
SOME = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def layouts(
    sizes: list[int], top_k: int = 2, width: int = 2048, dispatch=None, link=None, **overlap
) -> LayoutPolicy:
    config = MoEConfig(
        overlap=OverlapConfig(**overlap), dispatch=DispatchConfig(**(dispatch or {}))
    )
    rows = RowFormats.of(width, torch.float32, config.dispatch)
    return LayoutPolicy([0, *np.cumsum(sizes).tolist()], top_k, rows, config, link)


# What is cut


def test_auto_cuts_experts_where_every_rank_has_one_for_each_chunk_and_tokens_elsewhere():
    for sizes, chunks, by_tokens in [([4, 4], 4, False), ([4, 3], 4, True), ([1] * 8, 2, True)]:
        found = layouts(sizes, chunks=chunks)
        assert found.num_chunks == chunks
        assert found.choose(None).by_tokens == by_tokens


def test_experts_are_cut_no_finer_than_there_are_and_tokens_as_fine_as_asked():
    assert layouts([2, 2], chunks=8, by="experts").num_chunks == 2
    assert layouts([2, 2], chunks=8, by="tokens").num_chunks == 8
    assert layouts([8], chunks=8, by="tokens").num_chunks == 1, "one rank waits for no other"


def test_a_step_of_few_tokens_is_not_cut():
    found = layouts([1, 1], top_k=2, chunks=4)
    enough = MIN_CHUNK_ROWS * 4
    assert found.choose(enough).num_chunks == 4
    assert found.choose(enough - 1).num_chunks == 1


def test_the_worked_example_of_token_chunks_holds():
    layout = ExpertLayout([0, 3, 5], 2, "tokens")
    ids = torch.tensor([[0], [4], [1], [-1], [4]])
    order = layout.sort(ids)
    assert order.load_E.tolist() == [1, 1, 0, 0, 2]
    assert order.counts_to_exchange.tolist() == [1, 0, 0, 0, 1, 0, 1, 0, 0, 1]
    assert order.token_N[:4].tolist() == [0, 1, 2, 4]
    own, other = order.counts_to_exchange, layout.sort(torch.tensor([[2]])).counts_to_exchange
    assert other.tolist() == [0] * 5 + [0, 0, 1, 0, 0], "one token is in the last chunk"
    exchanged = np.stack([own.numpy(), other.numpy()])
    assert layout.loads(exchanged).tolist() == [[1, 1, 0, 0, 2], [0, 0, 1, 0, 0]]
    first, second = layout.plans(order, exchanged, 0)
    assert (first.send_splits, first.recv_splits) == ([1, 1], [1, 0])
    assert (second.send_splits, second.recv_splits) == ([1, 1], [1, 1])
    assert second.expert_counts == [0, 1, 1] and second.order.token_N.tolist() == [2, 4]


def test_auto_tries_what_a_layer_can_cut_into_and_a_step_is_worth():
    found = layouts([2, 2], chunks="auto", by="experts")
    assert found.candidates(None) == [1, 2], "no rank has four experts"
    either = layouts([2, 2], chunks="auto")
    assert either.candidates(None) == [1, 2, 4] and either.num_chunks == 4
    assert either.candidates(MIN_CHUNK_ROWS * 4 - 1) == [1, 2]
    assert either.candidates(MIN_CHUNK_ROWS * 2 - 1) == [1]
    assert layouts([8], chunks="auto").candidates(None) == [1]


def test_without_anything_to_choose_the_tuner_is_not_used():
    for sizes, overlap in (([8], {"chunks": "auto"}), ([4, 4], {"chunks": 2})):
        found, tuner = layouts(sizes, **overlap), ChunkTuner()
        found.tune(0, tuner, ThreadCollectives(0, 1, threading.Barrier(1), [None]))
        assert found.tuner is None and found.begin_trial(10**6).chunks is None
        assert tuner.choices == {}


# What is counted


@pytest.mark.parametrize(
    ("sizes", "top_k"),
    [([1, 1, 1], 2), ([4, 4], 1), ([8], 4)],
    ids=["one expert each", "top-1", "one rank"],
)
def test_where_no_two_experts_can_share_a_rank_unique_rows_are_not_counted(sizes, top_k):
    found = layouts(sizes, top_k)
    assert not found.choose(None).deduplicates
    assert found.saved_bytes(10**9) == 0


def test_deduplication_can_be_switched_off():
    assert layouts([4, 4]).choose(None).deduplicates
    off = layouts([4, 4], dispatch={"deduplicate": False})
    assert not off.choose(None).deduplicates and not off.choose(10**6).deduplicates


def test_unique_rows_are_counted_where_the_expected_saving_is_worth_the_work():
    found = layouts([8] * 8, top_k=8, width=1024)
    # 5.43 of 8 rows of 4 KiB, 16 bytes of header; 7 of 8 ranks are remote.
    saved = 512 * 7 / 8 * (8 * 4096 - 5.432 * (4096 + 16))
    assert found.saved_bytes(4096) == pytest.approx(saved, rel=1e-3)
    least = int(COLLECTIVE_BYTES / found.saved_bytes(1)) + 1
    assert found.choose(least).deduplicates and not found.choose(least - 1).deduplicates
    assert not found.choose(least, costs_exchange=True).deduplicates, "one collective more"
    assert found.choose(2 * least, costs_exchange=True).deduplicates


# 25 us and 250 GB/s within a node, 40 us and 12.5 GB/s between nodes.
FAST, SLOW = Link(25e-6, 250e9, 5e-6), Link(40e-6, 12.5e9, 5e-6)


def test_deduplication_has_to_save_what_its_launches_take_on_the_measured_link():
    """256 KiB, a 100 Gbit/s link's bytes in 20 us, was the threshold within a node too."""
    shape = {"sizes": [16] * 8, "top_k": 8, "width": 2048}
    fast, slow = layouts(**shape, link=FAST), layouts(**shape, link=SLOW)
    assert layouts(**shape).choose(256).deduplicates, "not measured: as on the CPU"
    assert not fast.choose(256).deduplicates and slow.choose(256).deduplicates
    for found, link in ((fast, FAST), (slow, SLOW)):
        saved = DEDUP_LAUNCHES * link.launch_s * link.bytes_per_s
        least = int(saved / found.saved_bytes(1)) + 1
        assert found.choose(least).deduplicates and not found.choose(least - 1).deduplicates
        assert not found.choose(least, costs_exchange=True).deduplicates


def test_a_chunk_has_to_take_as_long_as_its_calls_on_the_measured_link():
    sizes = [4, 4]
    for link in (None, FAST, SLOW):
        found = layouts(sizes, chunks=2, link=link)
        rows = MIN_CHUNK_ROWS
        if link is not None:
            seconds = 2 * link.latency_s + CHUNK_LAUNCHES * link.launch_s
            rows = max(rows, seconds * link.bytes_per_s / (2 * 2048 * 4))
        least = int(np.ceil(rows * 2 * len(sizes) / 2))  # top-2
        assert found.choose(least).num_chunks == 2
        assert found.choose(least - 1).num_chunks == 1
    assert layouts(sizes, chunks="auto", link=FAST).candidates(2048) == [1]
    assert layouts(sizes, chunks="auto").candidates(2048) == [1, 2, 4]
    pairs = layouts(sizes, two_batch=True, link=FAST), layouts(sizes, two_batch=True)
    assert [each.splits_batch(2048) for each in pairs] == [False, True]


def test_partial_sums_save_on_the_way_home_too():
    plain = layouts([8, 8], top_k=8)
    partial = layouts([8, 8], top_k=8, dispatch={"partial_sums": True})
    assert partial.saved_bytes(1000) > 1.9 * plain.saved_bytes(1000)


def test_rows_go_once_only_where_the_counts_say_that_moves_less():
    layout = ExpertLayout([0, 4, 8], 1, "experts", ROWS, deduplicate=True)
    apart = torch.tensor([[0, 4], [5, 1]]).repeat(9, 1)  # a row for each rank
    shared = torch.tensor([[4, 5], [6, 4]]).repeat(9, 1)
    for ids, once in ((apart, False), (shared, True)):
        x, w = torch.randn(18, 96), torch.rand(18, 2)
        found = call(layout, [ids, ids], [x, x], [w, w])
        for plans in found.plans:
            assert (plans[0].unique is not None) == once


def test_extras_that_only_their_own_rank_counts_do_not_change_the_choice():
    layout = ExpertLayout([0, 4, 8], 1, "experts", ROWS, deduplicate=True)
    with_extras = torch.tensor([[4, 0, 1, 2, 3]] * 9)  # one remote expert, four local ones
    none = torch.full((9, 5), -1)
    orders = [layout.sort(with_extras), layout.sort(none)]
    known = [np.stack([order.counts_to_exchange.numpy() for order in orders])] * 2
    known[1] = known[1].copy()
    known[1][0, :4] = known[1][0, -2] = 0  # what rank 0 keeps for itself
    plans = [layout.plans(order, known[rank], rank) for rank, order in enumerate(orders)]
    assert [plan[0].unique for plan in plans] == [None, None]
    assert plans[0][0].send_splits == [36, 9] and plans[1][0].recv_splits == [9, 0]


# What ranks know of each other


@SOME
@given(
    case=cases(),
    chunks=st.integers(1, 4),
    by=st.sampled_from(["experts", "tokens"]),
    deduplicate=st.booleans(),
)
def test_under_every_policy_ranks_know_enough_to_plan_alike(case, chunks, by, deduplicate):
    tokens = make_tokens(case)
    layout = ExpertLayout(case.bounds, chunks, by, ROWS, deduplicate=deduplicate)
    decisions = run_engine(case, tokens, layout)
    if any(decision is None for decision in decisions):
        return
    ids = [decision.ids_TM for decision in decisions]
    ws = [decision.weights_TM for decision in decisions]
    xs = [torch.randn(len(part), 96) for part in ids]
    for rank, decision in enumerate(decisions):
        assert torch.equal(decision.order.load_E, layout.sort(ids[rank]).load_E)
    known = [decision.exchanged_Wn for decision in decisions]
    found = call(layout, ids, xs, ws, known=known)
    plain = call(ExpertLayout(case.bounds, 1), ids, xs, ws)
    for out, expected in zip(found.outs, plain.outs, strict=True):
        assert torch.equal(out, expected)
    assert len({plans[0].unique is None for plans in found.plans}) == 1
