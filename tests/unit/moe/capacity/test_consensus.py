"""Which algorithm global consensus takes, and what a round costs. Run: pytest
tests/unit/moe/capacity/test_consensus.py
"""

from __future__ import annotations

import torch

from engine.distributed.collectives import COLLECTIVE_BYTES
from engine.moe.capacity.consensus import Claims, Consensus
from engine.moe.capacity.consensus_global import gather_bytes, radix_bytes
from engine.moe.capacity.consensus_registry import make_consensus
from engine.moe.capacity.limits import Pools
from tests.helpers.threads import ThreadCollectives, run_threads


def claims_of(num_claims: int, num_experts: int, padded: int, limit: int = 1) -> Claims:
    pools = list(range(num_experts))
    codes = [*pools, *([-1] * num_experts), *pools, -1]
    word = torch.arange(num_claims, dtype=torch.int32)
    return Claims(
        keys=[word, ~word],
        num_primary=1,
        code_N=torch.arange(num_claims) % num_experts,
        pool_of_code=torch.tensor(codes),
        limit_P=torch.full((num_experts,), limit),
        non_finite=torch.zeros(1, dtype=torch.int64),
        padded=padded,
    )


def test_gathered_bytes_are_six_per_claim_and_radix_bytes_do_not_depend_on_claims():
    claims = claims_of(8, 4, 1000)
    assert gather_bytes(claims, 5) == 4 * (1000 * 6 + 4)
    assert radix_bytes(claims, 2) == 4 * 4 * 256 * 4
    assert radix_bytes(claims_of(8, 4, 10**9), 2) == radix_bytes(claims, 2)


def selection_of(collectives: ThreadCollectives, consensus_name: str, selection: str, padded: int):
    pools = Pools.make("expert", [0, 2, 4] if collectives.size == 2 else [0, 4])
    consensus: Consensus = make_consensus(consensus_name, selection, pools, collectives)
    pending = consensus.begin(claims_of(6 + collectives.rank, 4, padded))
    pending.wait()
    found = pending.select(exact=False)
    names = [name for name, _ in collectives.log]
    return names, found.keep_N.tolist(), found.rows_WE2 is not None, pending.complete


def test_auto_gathers_few_claims_and_counts_many_in_histograms():
    few = run_threads(lambda c: selection_of(c, "global", "auto", 8), 2)
    assert all(names == ["all_gather"] for names, *_ in few)
    # Beyond five collectives' worth of bytes the histograms are cheaper.
    many = 6 * COLLECTIVE_BYTES // 4
    assert gather_bytes(claims_of(1, 4, many), 2) > radix_bytes(claims_of(1, 4, 1), 2)
    lots = run_threads(lambda c: selection_of(c, "global", "auto", many), 2)
    assert all(names == ["all_reduce"] * 5 for names, *_ in lots)
    assert [kept for _, kept, *_ in few] == [kept for _, kept, *_ in lots]


def test_a_selection_is_complete_where_all_ranks_rows_are_known():
    for name, selection, complete, calls in (
        ("global", "gather", True, 1),
        ("global", "radix", False, 5),
        ("quota", "auto", True, 1),
        ("local", "auto", False, 0),
    ):
        for names, _, known, claimed in run_threads(
            lambda c, name=name, selection=selection: selection_of(c, name, selection, 8), 2
        ):
            assert (known, claimed, len(names)) == (complete, complete, calls)


def test_a_quota_of_pools_of_several_experts_leaves_the_rows_open():
    def run(collectives: ThreadCollectives) -> bool:
        consensus = make_consensus("quota", "auto", Pools.make("rank", [0, 2, 4]), collectives)
        claims = claims_of(6, 4, 6)
        pools = [0, 0, 1, 1]
        table = torch.tensor([*pools, -1, -1, -1, -1, *pools, -1])
        claims = Claims(
            claims.keys,
            claims.num_primary,
            claims.code_N,
            table,
            torch.tensor([4, 2]),
            claims.non_finite,
            claims.padded,
        )
        pending = consensus.begin(claims)
        pending.wait()
        found = pending.select(exact=False)
        assert found.keep_N.sum() == 2 + 1, "half of each pool's slots: 4 of 8 and 2 of 4 claims"
        return pending.complete

    assert run_threads(run, 2) == [False, False]
