"""Calls in rounds: no rank receives more than its limit, and results are those of one call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import DispatchConfig
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.payload import make_payload
from engine.moe.dispatch.rounds import most_received, num_rounds, plan_rounds, split_rows
from engine.moe.dispatch.row_format import RowFormats
from engine.ops.permute import combine_rows
from tests.helpers.bounds import bounds
from tests.helpers.in_process_ranks import Scaled, call, exchange


def test_the_worked_example_of_the_module_holds():
    counts = np.array([[3, 0], [4, 1]])  # two ranks with one expert each
    assert most_received(counts, [0, 1, 2]) == 7 and num_rounds(7, 4, 2) == 4
    parts = split_rows(counts, [0, 1, 2], 0, 4)
    assert [part.counts_WP[:, 0].tolist() for part in parts] == [[0, 1], [1, 1], [1, 1], [1, 1]]
    assert [part.places_S.tolist() for part in parts] == [[], [0], [1], [2]]


def test_a_call_within_the_limit_has_no_rounds():
    layout = ExpertLayout([0, 1, 2], 1)
    order = layout.sort(torch.tensor([[0, 1], [1, 0]]))
    assert plan_rounds(layout, order, np.array([[2, 2], [3, 1]]), 0, 5) == []
    assert len(plan_rounds(layout, order, np.array([[2, 2], [4, 1]]), 0, 5)) == 2


@pytest.mark.parametrize("by", ["experts", "tokens"])
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
@given(
    num_ranks=st.integers(1, 4),
    num_chunks=st.integers(1, 3),
    tokens=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    limit=st.integers(9, 20),
    seed=st.integers(0, 2**16),
)
def test_rounds_give_the_results_of_one_call_bit_for_bit(
    by, dtype, num_ranks, num_chunks, tokens, limit, seed
):
    generator = torch.Generator().manual_seed(seed)
    num_experts = 5
    rows = RowFormats.of(6, torch.float32, DispatchConfig(dtype=dtype))
    layout = ExpertLayout(bounds(num_experts, num_ranks), num_chunks, by, rows)
    ids, xs, ws = [], [], []
    for count in tokens[:num_ranks]:
        part = torch.rand(count, num_experts, generator=generator).argsort(1)[:, :3]
        ids.append(part.masked_fill(torch.rand(part.shape, generator=generator) < 0.2, -1))
        xs.append(torch.randn(count, 6, generator=generator))
        ws.append(torch.rand(count, 3, generator=generator))
    orders = [layout.sort(part) for part in ids]
    known = np.stack([order.counts_to_exchange.numpy() for order in orders])
    rounds = [plan_rounds(layout, each, known, rank, limit) for rank, each in enumerate(orders)]
    assert len({len(each) for each in rounds}) == 1, "all ranks call as many collectives"
    expected = call(layout, ids, xs, ws)
    if not rounds[0]:
        assert all(sum(p.num_received for p in plans) <= limit for plans in expected.plans)
        return
    outs = [torch.full((sum(r.places_S.numel() for r in each), 6), torch.nan) for each in rounds]
    experts = [Scaled(first) for first in layout.first_experts[:-1]]
    for turn in zip(*rounds, strict=True):
        assert all(each.plan.num_received <= limit for each in turn)
        payloads = [
            make_payload(x, w, [each.plan], RowBuffers(), single_rank=False)
            for x, w, each in zip(xs, ws, turn, strict=True)
        ]
        dispatches = [payload.pack_dispatch(0) for payload in payloads]
        exchange(dispatches)
        combines = [
            payload.pack_combine(0, run(*payload.unpack(0, sent.recv)))
            for payload, run, sent in zip(payloads, experts, dispatches, strict=True)
        ]
        exchange(combines)
        for out, payload, each in zip(outs, payloads, turn, strict=True):
            out[each.places_S] = payload.combined_SD
    for out, order, w, whole in zip(outs, orders, ws, expected.outs, strict=True):
        assert torch.equal(combine_rows(out, order.slot_TK, w), whole)
