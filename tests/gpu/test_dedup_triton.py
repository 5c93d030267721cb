"""The Triton kernels of deduplication, against torch: bit for bit.

TRITON_INTERPRET=1 python -m pytest tests/gpu/test_dedup_triton.py
"""

import pytest
import torch

from engine.moe.dispatch.dedup import Deduplicator
from engine.ops import unique_rows
from tests.helpers.triton_cases import DEVICE, kernel

# Experts of each group, and columns of the ids.
CASES = [([3, 2], 2), ([1] * 5, 3), ([10, 0, 23, 1], 8), ([9], 5), ([16] * 8, 8), ([2] * 70, 1)]


def positions(sizes: list[int], columns: int, *shape: int) -> torch.Tensor:
    """Distinct positions per token, a third of them dropped."""
    found = torch.rand(*shape, sum(sizes)).argsort(-1)[..., :columns]
    return found.masked_fill(torch.rand(found.shape) < 0.3, -1)


def table_of(sizes: list[int]) -> torch.Tensor:
    return Deduplicator(sizes)._table(torch.device("cpu"))


@kernel
@pytest.mark.parametrize(("sizes", "columns"), CASES)
@pytest.mark.parametrize("tokens", [0, 1, 33, 70])
def test_groups_bitmaps_and_places_of_weights_equal_the_reference(sizes, columns, tokens):
    from engine.ops.gpu.unique_rows import mark_groups_triton

    groups = Deduplicator(sizes)
    table, position = table_of(sizes), positions(sizes, columns, tokens)
    options = (groups.num_groups, groups.num_bytes)
    expected = unique_rows.mark_groups_reference(position, table, *options)
    got = mark_groups_triton(position.to(DEVICE), table.to(DEVICE), *options)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine.cpu(), theirs)


@kernel
@pytest.mark.parametrize(("sizes", "columns"), CASES)
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_the_unique_rows_of_every_rank_are_counted(sizes, columns, tokens):
    from engine.ops.gpu.unique_rows import count_groups_triton

    table, position = table_of(sizes), positions(sizes, columns, 3, tokens)
    expected = unique_rows.count_groups_reference(position, table, len(sizes))
    got = count_groups_triton(position.to(DEVICE), table.to(DEVICE), len(sizes))
    assert got.dtype == expected.dtype and torch.equal(got.cpu(), expected)


@kernel
@pytest.mark.parametrize(("sizes", "columns"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_spread_over_a_tokens_groups_and_zero_elsewhere(sizes, columns, dtype):
    from engine.ops.gpu.row_headers import spread_weights_triton

    groups = Deduplicator(sizes)
    size = groups.num_groups * groups.most_experts
    place = table_of(sizes)[3][positions(sizes, columns, 37)]
    weights = torch.randn(37, columns).to(dtype)
    expected = unique_rows.spread_weights_reference(place, weights, size)
    got = spread_weights_triton(place.to(DEVICE), weights.to(DEVICE), size)
    assert torch.equal(got.cpu(), expected)
    empty = spread_weights_triton(place[:0].to(DEVICE), weights[:0].to(DEVICE), size)
    assert empty.shape == (0, size)


@kernel
@pytest.mark.parametrize("load", [[0], [5], [0, 3, 0, 0, 40, 1, 0], [2] * 70, [0, 0]])
def test_the_cell_of_a_row_is_its_token_and_group(load):
    from engine.ops.gpu.row_headers import cells_of_rows_triton

    load_G, token = torch.tensor(load), torch.randint(0, 1000, (sum(load),))
    expected = unique_rows.cells_of_rows_reference(token, load_G)
    assert torch.equal(cells_of_rows_triton(token.to(DEVICE), load_G.to(DEVICE)).cpu(), expected)


@kernel
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(("num_bytes", "experts"), [(1, 1), (1, 8), (3, 23), (16, 128)])
def test_packed_headers_equal_the_reference_and_no_other_byte_changes(
    with_weights, num_bytes, experts
):
    from engine.ops.gpu.row_headers import pack_headers_triton

    bits = torch.randint(0, 256, (19, num_bytes), dtype=torch.uint8)
    weights = torch.randn(19, experts) if with_weights else None
    cell = torch.randint(0, 19, (41,))
    weights_at, bits_at = 20, 20 + 4 * experts
    expected = torch.full((41, (bits_at + num_bytes + 15) // 16 * 16), 7, dtype=torch.uint8)
    got = expected.to(DEVICE)
    unique_rows.pack_headers_reference(cell, bits, weights, expected, bits_at, weights_at)
    on_device = None if weights is None else weights.to(DEVICE)
    pack_headers_triton(cell.to(DEVICE), bits.to(DEVICE), on_device, got, bits_at, weights_at)
    assert torch.equal(got.cpu(), expected)
    pack_headers_triton(cell[:0].to(DEVICE), bits.to(DEVICE), None, got[:0], bits_at, weights_at)


@kernel
@pytest.mark.parametrize("experts", [0, 1, 8, 11, 24])
@pytest.mark.parametrize("received", [0, 1, 40, 1024, 2500])
@pytest.mark.parametrize("with_slots", [False, True])
def test_rows_of_experts_are_found_in_bitmaps_between_other_bytes(experts, received, with_slots):
    from engine.ops.gpu.rows_by_expert import rows_by_expert_triton

    rows = torch.randint(0, 256, (received, 48), dtype=torch.uint8)
    bits = rows[:, 21:24]
    total = int(unique_rows.read_bits(bits, experts).sum())
    # More and fewer rows than the bitmaps say, too.
    for num_rows in {total, total + 3, max(0, total - 3)}:
        options = (experts, num_rows)
        expected = unique_rows.rows_by_expert_reference(bits, *options, with_slots=with_slots)
        got = rows_by_expert_triton(rows.to(DEVICE)[:, 21:24], *options, with_slots=with_slots)
        assert torch.equal(got[0].cpu(), expected[0])
        if not with_slots:
            assert got[1] is None and expected[1] is None
        else:
            assert torch.equal(got[1].cpu(), expected[1])
