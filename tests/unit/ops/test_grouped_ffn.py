"""grouped_ffn: the compiled kernels against the torch reference, and independence of the rows.

Run: python -m pytest tests/unit/ops/test_grouped_ffn.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.ops.grouped_ffn import grouped_ffn, grouped_ffn_reference
from tests.helpers.ops_cases import ISAS_HERE, each_isa, needs_native, on_isa


def weights(experts: int, dim: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(experts, 2 * width, dim, generator=generator) / dim**0.5
    w2 = torch.randn(experts, dim, width, generator=generator) / width**0.5
    return w13, w2


def test_reference_is_the_gated_ffn_of_each_row():
    w13, w2 = weights(2, 5, 3)
    x = torch.randn(3, 5)
    got = grouped_ffn_reference(x, w13, w2, [2, 1])
    for row, expert in enumerate([0, 0, 1]):
        gate, up = w13[expert, :3] @ x[row], w13[expert, 3:] @ x[row]
        torch.testing.assert_close(got[row], w2[expert] @ (gate * gate.sigmoid() * up))


@each_isa
@pytest.mark.parametrize(("dim", "width"), [(64, 96), (50, 21), (17, 130), (1, 1), (128, 16)])
@pytest.mark.parametrize(
    "counts", [[1, 1, 1], [0, 5, 0], [16, 17, 33], [48, 49, 0], [200, 0, 3], [0, 0, 0]]
)
def test_ragged_counts_match_the_reference(isa, dim, width, counts):
    w13, w2 = weights(3, dim, width)
    x = torch.randn(sum(counts), dim)
    with on_isa(isa):
        got = grouped_ffn(x, w13, w2, counts)
    torch.testing.assert_close(got, grouped_ffn_reference(x, w13, w2, counts), rtol=1e-4, atol=2e-6)


@each_isa
def test_more_rows_than_one_wave_holds_match_the_reference(isa):
    # 8 MiB of packed and hidden rows is 2048 rows of 1024 floats: the largest expert spans waves.
    w13, w2 = weights(3, 512, 512)
    counts = [900, 4000, 10]
    x = torch.randn(sum(counts), 512)
    with on_isa(isa):
        got = grouped_ffn(x, w13, w2, counts)
    torch.testing.assert_close(got, grouped_ffn_reference(x, w13, w2, counts), rtol=1e-4, atol=1e-5)


@needs_native
@given(counts=st.lists(st.integers(0, 70), min_size=4, max_size=4), seed=st.integers(0, 9))
def test_a_row_gives_the_same_bits_whatever_else_is_in_the_batch(counts, seed):
    w13, w2 = weights(4, 33, 20)
    x = torch.randn(sum(counts), 33, generator=torch.Generator().manual_seed(seed))
    with on_isa(ISAS_HERE[0]):
        whole = grouped_ffn(x, w13, w2, counts)
        row = 0
        for expert, count in enumerate(counts):
            for at in {row, row + count - 1} if count else ():
                alone = [int(e == expert) for e in range(4)]
                assert torch.equal(whole[at : at + 1], grouped_ffn(x[at : at + 1], w13, w2, alone))
            row += count


@each_isa
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_does_not_change_a_bit(isa, threads):
    w13, w2 = weights(3, 100, 300)
    counts = [1, 150, 20]
    x = torch.randn(sum(counts), 100)
    before = torch.get_num_threads()
    with on_isa(isa):
        expected = grouped_ffn(x, w13, w2, counts)
        torch.set_num_threads(threads)
        try:
            got = grouped_ffn(x, w13, w2, counts)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(got, expected)


@each_isa
def test_extreme_gates_saturate_instead_of_overflowing(isa):
    w13 = torch.tensor([[[1.0], [1.0]]])
    w2 = torch.tensor([[[1.0]]])
    x = torch.tensor([[-1e4], [-100.0], [0.0], [100.0], [float("nan")]])
    with on_isa(isa):
        got = grouped_ffn(x, w13, w2, [5])
    torch.testing.assert_close(got[:4], torch.tensor([[0.0], [0.0], [0.0], [1e4]]))
    assert got[4].isnan()


@needs_native
def test_counts_that_do_not_sum_to_the_rows_are_refused():
    w13, w2 = weights(2, 8, 8)
    with pytest.raises(RuntimeError, match="counts sum to 3 of 4 rows"):
        grouped_ffn(torch.randn(4, 8), w13, w2, [1, 2])


@pytest.mark.parametrize("run", [grouped_ffn, grouped_ffn_reference])
def test_the_result_goes_where_it_is_asked_to(run):
    w13, w2 = weights(2, 8, 4)
    x, buffer = torch.randn(3, 8), torch.full((5, 8), 9.0)
    got = run(x, w13, w2, [1, 2], buffer[:3])
    assert got.data_ptr() == buffer.data_ptr() and (buffer[3:] == 9.0).all()
    torch.testing.assert_close(got, grouped_ffn_reference(x, w13, w2, [1, 2]))


@each_isa
@pytest.mark.parametrize("counts", [[1, 1, 0], [7, 60, 130]])
def test_rows_that_lie_anywhere_give_the_same_bits_in_their_places(isa, counts):
    w13, w2 = weights(3, 50, 21)
    x = torch.randn(sum(counts), 50)
    index = torch.randperm(sum(counts))
    with on_isa(isa):
        expected = grouped_ffn(x[index], w13, w2, counts)
        got = grouped_ffn(x, w13, w2, counts, index_R=index)
    assert torch.equal(got[index], expected)
    reference = grouped_ffn_reference(x, w13, w2, counts, index_R=index)
    torch.testing.assert_close(got, reference, rtol=1e-4, atol=2e-6)


@needs_native
@pytest.mark.parametrize("index", [[0, 1, 3], [0, -1, 2], [0, 1], [0, 1, 2, 0]])
def test_an_index_that_names_no_row_or_not_as_many_as_the_counts_is_refused(index):
    w13, w2 = weights(1, 8, 8)
    with pytest.raises(RuntimeError, match="grouped_ffn: (index|counts sum to 3 of 2 rows)"):
        grouped_ffn(torch.randn(3, 8), w13, w2, [3], index_R=torch.tensor(index))
