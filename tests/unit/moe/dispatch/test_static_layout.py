"""Where rows of a static exchange are.

Run: pytest tests/unit/moe/dispatch/test_static_layout.py
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.moe.dispatch.static_layout import BUCKETS, StaticLayout, bucket_for, deal_table
from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement
from engine.ops.sort_by_expert import sort_by_expert

CPU = torch.device("cpu")


def test_the_bucket_is_the_least_that_holds_the_largest_rank():
    assert [bucket_for(most) for most in (0, 1, 2, 3, 5, 255, 256, 257)] == [
        *(1, 1, 2, 4, 8, 256, 256),
        None,
    ]


def test_home_slots_follow_the_worked_example():
    layout = StaticLayout(Instances(LayerPlacement.contiguous(4, 2), 2), 0, 2, False, CPU)
    assert layout.num_results == 2
    slots = layout.home_slots(torch.tensor([[0, 1], [3, 0]]), 2)
    assert slots.tolist() == [[0, 1], [6, 3]]


@given(
    num_ranks=st.integers(1, 4),
    per_rank=st.integers(1, 4),
    more=st.integers(0, 2),
    top_k=st.integers(1, 6),
    bucket=st.sampled_from(BUCKETS[:5]),
    sums=st.booleans(),
    some_none=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_term_is_read_where_the_rank_of_its_expert_has_put_it(
    num_ranks, per_rank, more, top_k, bucket, sums, some_none, seed
):
    num_experts = num_ranks * per_rank + min(more, num_ranks - 1)
    top_k = min(top_k, num_experts)
    instances = Instances(LayerPlacement.contiguous(num_experts, num_ranks), num_ranks)
    layouts = [
        StaticLayout(instances, rank, top_k, sums, CPU, some_none=some_none)
        for rank in range(num_ranks)
    ]
    generator = torch.Generator().manual_seed(seed)
    ids_WBK = torch.rand(num_ranks, bucket, num_experts, generator=generator).argsort(2)
    ids_WBK = ids_WBK[..., :top_k].contiguous()
    shape = ids_WBK.shape if some_none else (num_ranks, bucket)  # else of whole tokens
    ids_WBK[torch.rand(shape, generator=generator) < 0.2] = -1
    results = layouts[0].num_results
    assert results == (1 if layouts[0].sums else min(top_k, instances.most_local))
    for home, layout in enumerate(layouts):
        slots = layout.home_slots(ids_WBK[home], bucket)
        for token in range(bucket):
            seen = set()
            for k, instance in enumerate(ids_WBK[home, token].tolist()):
                slot = int(slots[token, k])
                if instance < 0:
                    assert slot == -1
                    continue
                rank = int(instances.rank_I[instance])
                if layout.sums:
                    assert slot == (-1 if rank in seen else rank * bucket + token)
                    seen.add(rank)
                    continue
                # The rank of the expert: row n is of token `token` of rank `home`.
                place = home * bucket + token
                keys = layouts[rank].key_I1[ids_WBK.view(-1, top_k)]
                # As if sorted: this rank's first, and nothing for no assignment.
                numbers = sort_by_expert(keys, instances.num_instances)[1]
                rows = layouts[rank].local_slots(numbers, keys, keys.numel())
                own = rows.view(num_ranks * bucket, results)[place]
                source, offset = divmod(slot, bucket * results)
                assert source == rank and offset // results == token
                assert own[offset % results] == numbers[place, k]


def test_each_host_takes_its_turn_by_token_and_rank():
    placement = LayerPlacement((0, 0, 0, 1, 1, 3), ((), (2,), (3,), (), (0, 2, 3), ()))
    instances = Instances(placement, 4)
    for rank in range(4):
        table = deal_table(instances, rank)
        assert table.shape == (7, 4)
        for expert, column in ((2, 0), (2, 1), (4, 0), (4, 3), (0, 2)):
            hosts = [placement.home_E[expert], *placement.copies_E[expert]]
            instance = table[expert, column]
            assert instances.expert_I[instance] == expert
            assert instances.rank_I[instance] == hosts[(column + rank) % len(hosts)]
        assert (table[-1] == -1).all()


@pytest.mark.parametrize("uses_copies", [False, True])
def test_rows_stay_at_their_homes_where_copies_take_none(uses_copies):
    placement = LayerPlacement((0, 0, 1, 1), ((1,), (), (), (0,)))
    instances = Instances(placement, 2)
    layout = StaticLayout(instances, 1, 2, False, CPU)
    ids = torch.tensor([[0, 3], [3, -1], [0, 1]])
    found = layout.instances_of(ids, 4, uses_copies)
    assert found[1, 1] == -1
    there = found >= 0
    assert instances.experts(found)[there].tolist() == ids[there].tolist()
    assert bool(instances.is_copy(found[there]).any()) == uses_copies
