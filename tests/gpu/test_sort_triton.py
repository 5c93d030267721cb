"""The Triton kernels that sort and select by integers, against the torch references: exactly.

TRITON_INTERPRET=1 python -m pytest tests/gpu/test_sort_triton.py
"""

import pytest
import torch

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
