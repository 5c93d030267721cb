"""The Triton kernels that order claims and deal rows to instances, against the torch references.

TRITON_INTERPRET=1 python -m pytest tests/gpu/test_deal_triton.py
"""

import pytest
import torch

from engine.ops import deal
from engine.ops.order_claims import sort_key_reference
from tests.gpu.test_ops_triton import DEVICE
from tests.helpers.deal_cases import EXPERTS, claims_of, tables_of
from tests.helpers.triton_cases import kernel


def equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and torch.equal(got.cpu(), expected)


@kernel
@pytest.mark.parametrize("hosts", [1, 2, 5])
@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_dealt_rows_equal_the_reference(tokens, hosts):
    from engine.ops.gpu.deal_rows import deal_rows_triton

    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, EXPERTS, (tokens, 3), generator=generator)
    place = torch.randint(0, 30, (tokens, 3), generator=generator)
    arguments = [ids, place, *tables_of(hosts)]
    got = deal_rows_triton(*(each.to(DEVICE) for each in arguments))
    equal(got, deal.deal_rows_reference(*arguments))


@kernel
@pytest.mark.parametrize("size", [0, 2, 1500])
def test_listed_claims_equal_the_reference(size):
    from engine.ops.gpu.list_claims import list_claims_triton

    code, order, _ = claims_of(size)
    flags = torch.tensor([[0], [1], [0]])
    arguments = [each.to(DEVICE) for each in (code, order, flags)]
    got = list_claims_triton(*arguments, EXPERTS)
    start = deal.list_start(3, EXPERTS)
    expected = deal.list_claims_reference(code, order, flags, EXPERTS)
    for mine, theirs in zip(
        deal.parts_of_list(got, 3, EXPERTS), deal.parts_of_list(expected, 3, EXPERTS), strict=True
    ):
        equal(mine, theirs)
    assert start % 2 == 0 and got.numel() == start + 3 * size


@kernel
@pytest.mark.parametrize("hosts", [1, 3])
@pytest.mark.parametrize("size", [0, 2, 1500])
def test_dealt_claims_equal_the_reference(size, hosts):
    from engine.ops.gpu.deal_claims import deal_claims_triton

    ends, instances = tables_of(hosts)
    code, order, slot = claims_of(size)
    arguments = [code, order, slot, ends * 20, instances]
    got = deal_claims_triton(*(each.to(DEVICE) for each in arguments), EXPERTS * hosts)
    expected = deal.deal_claims_reference(*arguments, EXPERTS * hosts)
    for mine, theirs in zip(got, expected, strict=True):
        equal(mine, theirs)


@kernel
@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("num_words", [1, 2])
@pytest.mark.parametrize("claims", [0, 1, 700])
def test_sort_keys_equal_the_reference(claims, num_words, is_ordered):
    from engine.ops.gpu.sort_key import sort_key_triton

    generator = torch.Generator().manual_seed(claims)
    low, high = -(2**31), 2**31
    gathered = torch.randint(low, high, (2, 3 * claims), generator=generator).int()
    gathered[:, :1], gathered[:, 1:2] = low, high - 1
    order = torch.randperm(2 * claims, generator=generator) if is_ordered else None
    on_device = None if order is None else order.to(DEVICE)
    words = list(gathered.view(2, 3, claims).unbind(1)[:num_words])
    moved = list(gathered.to(DEVICE).view(2, 3, claims).unbind(1)[:num_words])
    equal(sort_key_triton(moved, on_device), sort_key_reference(words, order))
    flat = [word.flatten() for word in words]
    equal(
        sort_key_triton([word.to(DEVICE) for word in flat], on_device),
        sort_key_reference(flat, order),
    )
