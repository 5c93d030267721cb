"""The Triton kernels that sort and select by integers, against the torch references: exactly.

TRITON_INTERPRET=1 python -m pytest tests/gpu/test_sort_triton.py
"""

import pytest
import torch

from engine.ops.select_top import quotas_reference, select_top_reference
from engine.ops.sort_by_expert import sort_by_expert_reference
from tests.gpu.test_ops_triton import DEVICE, kernel

# Assignments per token, experts; 4,096 assignments are one block.
SORTS = [(0, 2, 4), (1, 1, 1), (5, 2, 3), (300, 2, 8), (700, 3, 7), (512, 8, 6), (1500, 6, 5)]


@kernel
@pytest.mark.parametrize(("tokens", "top_k", "experts"), SORTS)
def test_the_counting_sort_equals_the_stable_sort(tokens, top_k, experts):
    from engine.ops.gpu.sort_by_expert import sort_by_expert_triton

    generator = torch.Generator().manual_seed(tokens)
    # Of the assignments some are dropped, and one expert of several has none.
    ids = torch.randint(-1, max(experts - 1, 1), (tokens, top_k), generator=generator)
    got = sort_by_expert_triton(ids.to(DEVICE), experts)
    expected = sort_by_expert_reference(ids, experts)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine.cpu(), theirs)


@kernel
@pytest.mark.parametrize("tokens", [3, 5000])
@pytest.mark.parametrize("expert", [-1, 0, 2])
def test_all_assignments_of_one_expert_keep_their_order(tokens, expert):
    from engine.ops.gpu.sort_by_expert import sort_by_expert_triton

    ids = torch.full((tokens, 1), expert, device=DEVICE)
    token, slot, load = sort_by_expert_triton(ids, 3)
    assert torch.equal(token.cpu(), torch.arange(tokens))
    assert torch.equal(
        slot.cpu()[:, 0], torch.arange(tokens) if expert >= 0 else -torch.ones(tokens).long()
    )
    assert load.tolist() == [tokens if each == expert else 0 for each in range(3)]


def select_both(words, pool, need) -> None:
    from engine.ops.gpu.select_grouped import select_grouped_triton
    from engine.ops.gpu.sort_by_expert import sort_by_expert_triton

    order, _, load = sort_by_expert_triton(pool[:, None].to(DEVICE), need.numel())
    given = [word.to(DEVICE) for word in words]
    keep, tied = select_grouped_triton(order, load, need.to(DEVICE), given)
    expected, expected_tied = select_top_reference(words, pool, need)
    assert keep.dtype == torch.bool and torch.equal(keep.cpu(), expected)
    assert bool(tied) == bool(expected_tied)


@kernel
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("claims", "pools"), [(0, 2), (1, 1), (40, 3), (900, 2), (2500, 2)])
def test_the_radix_selection_equals_the_reference(claims, pools, depth):
    generator = torch.Generator().manual_seed(claims + depth)
    # Few leading words, so that the cut is tied in all but the last; extremes of both signs.
    words = [torch.randint(-2, 2, (claims,), generator=generator) for _ in range(depth - 1)]
    low, high = -(2**31), 2**31 - 1
    words.append(torch.randint(low, high, (claims,), generator=generator))
    words = [word.int() for word in words]
    words[-1][: claims // 8] = low
    words[0][claims // 2 : claims * 5 // 8] = high
    pool = torch.randint(-1, pools, (claims,), generator=generator)
    for share in (0, 0.03, 0.4, 2):
        select_both(words, pool, torch.full((pools,), int(share * claims / pools)))


@kernel
def test_a_tie_at_the_cut_keeps_none_of_its_claims_in_that_pool_alone():
    words = [torch.tensor([7, 7, 7, 9, 1, 2, 3, -5], dtype=torch.int32)]
    pool = torch.tensor([0, 0, 0, 0, 1, 1, 1, -1])
    for need in ([2, 2], [1, 2], [4, 0], [5, 3], [3, 1]):
        select_both(words, pool, torch.tensor(need))


@kernel
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_radix_selection_with_reduced_counts_equals_the_reference(depth):
    # Over several ranks: the decisions by radix in test_claims_triton.py.
    from engine.ops.gpu.select_reduced import select_reduced_triton

    generator = torch.Generator().manual_seed(depth)
    words = [torch.randint(-2, 2, (1300,), generator=generator).int() for _ in range(depth)]
    words = [word * 2**20 for word in words]
    pool = torch.randint(-1, 3, (1300,), generator=generator)
    for need in ([0, 1, 5000], [50, 200, 0], [100, 100, 100]):
        need_P = torch.tensor(need)
        expected, expected_tied = select_top_reference(words, pool, need_P)
        given = [word.to(DEVICE) for word in words]
        keep, tied = select_reduced_triton(given, pool.to(DEVICE), need_P.to(DEVICE), torch.clone)
        assert torch.equal(keep.cpu(), expected) and bool(tied) == bool(expected_tied)


@kernel
@pytest.mark.parametrize(("ranks", "pools"), [(1, 1), (3, 5), (8, 4), (12, 2)])
def test_quotas_equal_the_reference(ranks, pools):
    from engine.ops.gpu.quotas import quotas_triton

    generator = torch.Generator().manual_seed(ranks)
    for most in (1, 4, 100_000):
        claims = torch.randint(0, most, (ranks, pools), generator=generator)
        for limit in (0, 1, ranks * most // 3, 2**40 // ranks):
            limit_P = torch.full((pools,), limit)
            got = quotas_triton(claims.to(DEVICE), limit_P.to(DEVICE))
            assert torch.equal(got.cpu(), quotas_reference(claims, limit_P))
