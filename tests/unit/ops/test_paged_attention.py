"""paged_attention: compiled kernels against the torch reference, independence of the batch.

Run: python -m pytest tests/unit/ops/test_paged_attention.py
"""

import pytest
import torch
import torch.nn.functional as F

from engine.ops.paged_attention import paged_attention, paged_attention_reference
from tests.helpers.ops_cases import each_isa, needs_native, on_isa, paged_case

DECODE = [(1, 1), (1, 17), (1, 64), (1, 65), (1, 200)]
PREFILL = [(5, 5), (33, 33), (64, 64), (100, 100)]
MIXED = [(1, 40), (1, 129), (7, 90), (70, 70), (2, 2)]


def compare(
    case,
    isa: str,
    window: int | None = None,
    sinks_H: torch.Tensor | None = None,
    chunk: int | None = None,
) -> None:
    options = {"scale": case.q_THD.shape[-1] ** -0.5, "window": window, "sinks_H": sinks_H}
    options["chunk"] = chunk
    expected = paged_attention_reference(*case.tensors, **case.lens, **options)
    with on_isa(isa):
        got = paged_attention(*case.tensors, **case.lens, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_reference_equals_torch_attention_on_one_sequence():
    case = paged_case([(9, 9)], heads=4, kv_heads=2, key_dim=24, value_dim=24)
    got = paged_attention_reference(*case.tensors, **case.lens, scale=24**-0.5, window=None)
    blocks = case.block_table_SB[0, :1].long()
    k, v = (x[blocks].transpose(0, 1).flatten(1, 2)[:, :9] for x in (case.k_cache, case.v_cache))
    q = case.q_THD.transpose(0, 1)
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
    torch.testing.assert_close(got, expected)


def test_reference_window_of_one_returns_the_own_value():
    case = paged_case([(6, 6)], heads=2, kv_heads=2, key_dim=16, value_dim=16)
    got = paged_attention_reference(*case.tensors, **case.lens, scale=0.25, window=1)
    block = int(case.block_table_SB[0, 0])
    torch.testing.assert_close(got, case.v_cache[block, :, :6].transpose(0, 1))


def test_reference_sink_shrinks_the_output_by_its_share_of_the_softmax():
    case = paged_case([(1, 3)], heads=2, kv_heads=2, key_dim=16, value_dim=16)
    case.q_THD[:] = 0.0  # three scores of 0, so weights of 1/3
    plain = paged_attention_reference(*case.tensors, **case.lens, scale=1.0, window=None)
    sinks_H = torch.tensor([0.0, 3.0]).log()  # weighs as much as one key, as three keys
    got = paged_attention_reference(
        *case.tensors, **case.lens, scale=1.0, window=None, sinks_H=sinks_H.clamp(min=-1e4)
    )
    torch.testing.assert_close(got[:, 0], plain[:, 0])  # log(0): no weight
    torch.testing.assert_close(got[:, 1], plain[:, 1] / 2)


@each_isa
@pytest.mark.parametrize("lens", [DECODE, PREFILL, MIXED, [(1, 2500), (3, 1030)]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (14, 2), (40, 2)])
@pytest.mark.parametrize("window", [None, 20])
def test_sinks_match_the_reference(isa, lens, heads, kv_heads, window):
    case = paged_case(lens, heads=heads, kv_heads=kv_heads, key_dim=24, value_dim=24)
    compare(case, isa, window, torch.randn(heads, generator=torch.Generator().manual_seed(1)) * 3)


@each_isa
@pytest.mark.parametrize("sink", [-1e4, -100.0, 100.0, 1e4])
def test_sinks_far_from_every_score_neither_overflow_nor_hide_keys(isa, sink):
    case = paged_case(MIXED, heads=4, kv_heads=2, key_dim=16, value_dim=16)
    compare(case, isa, None, torch.full((4,), sink))


@each_isa
def test_a_sink_that_is_not_a_number_stays_visible(isa):
    case = paged_case([(2, 9)], heads=2, kv_heads=1, key_dim=16, value_dim=16)
    sinks_H = torch.tensor([0.0, float("nan")])
    with on_isa(isa):
        got = paged_attention(*case.tensors, **case.lens, scale=1.0, window=None, sinks_H=sinks_H)
    assert got[:, 0].isfinite().all() and got[:, 1].isnan().all()


@each_isa
@pytest.mark.parametrize("lens", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128, 7])
def test_head_dims_match_the_reference(isa, lens, dim):
    compare(paged_case(lens, heads=4, kv_heads=2, key_dim=dim, value_dim=dim), isa)


@each_isa
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (6, 2), (14, 2), (20, 1)])
def test_group_sizes_match_the_reference(isa, heads, kv_heads):
    compare(paged_case(MIXED, heads=heads, kv_heads=kv_heads, key_dim=32, value_dim=32), isa)


@each_isa
@pytest.mark.parametrize("window", [1, 3, 16, 64, 65, 100, 1000])
def test_sliding_windows_match_the_reference(isa, window):
    case = paged_case(
        [(1, 300), (130, 130), (40, 200)], heads=4, kv_heads=2, key_dim=16, value_dim=16
    )
    compare(case, isa, window)


def test_reference_chunks_are_those_of_masked_attention():
    case = paged_case([(9, 9)], heads=2, kv_heads=2, key_dim=16, value_dim=16)
    got = paged_attention_reference(*case.tensors, **case.lens, scale=0.25, window=None, chunk=4)
    block = int(case.block_table_SB[0, 0])
    k, v = case.k_cache[block, :, :9], case.v_cache[block, :, :9]
    number = torch.arange(9)
    seen = (number[:, None] // 4 == number // 4) & (number[:, None] >= number)
    expected = F.scaled_dot_product_attention(case.q_THD.transpose(0, 1), k, v, seen)
    torch.testing.assert_close(got, expected.transpose(0, 1))


@each_isa
@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 65, 130, 1000])
@pytest.mark.parametrize("window", [None, 20])
def test_chunks_match_the_reference(isa, chunk, window):
    case = paged_case(
        [(1, 300), (1, 256), (1, 257), (130, 130), (40, 200)],
        heads=4, kv_heads=2, key_dim=16, value_dim=16,
    )  # fmt: skip
    compare(case, isa, window, chunk=chunk)


@each_isa
@pytest.mark.parametrize("lens", [[(1, 2500)], [(60, 1030)], [(1, 3000), (3, 20)]])
def test_chunks_of_long_contexts_match_the_reference(isa, lens):
    case = paged_case(lens, heads=2, kv_heads=1, key_dim=16, value_dim=16)
    compare(case, isa, chunk=1027)


@each_isa
@pytest.mark.parametrize("block_size", [1, 4, 10, 16, 32, 100])
def test_block_sizes_match_the_reference(isa, block_size):
    case = paged_case(MIXED, heads=4, kv_heads=2, key_dim=16, value_dim=48, block_size=block_size)
    compare(case, isa)


@each_isa
@pytest.mark.parametrize("key_dim", [576, 36])
def test_a_latent_cache_with_values_as_a_strided_prefix_matches_the_reference(isa, key_dim):
    case = paged_case([(1, 70), (30, 50)], heads=16, kv_heads=1, key_dim=key_dim)
    assert case.v_cache.data_ptr() == case.k_cache.data_ptr()
    compare(case, isa)


@each_isa
@pytest.mark.parametrize("lens", [[(1, 2500)], [(60, 1030)], [(1, 3000), (3, 20)]])
@pytest.mark.parametrize("window", [None, 1500])
def test_contexts_of_several_chunks_match_the_reference(isa, lens, window):
    compare(paged_case(lens, heads=2, kv_heads=1, key_dim=16, value_dim=16), isa, window)


@each_isa
def test_strided_queries_match_the_reference(isa):
    case = paged_case(MIXED, heads=4, kv_heads=2, key_dim=16, value_dim=16)
    wide = torch.randn(case.q_THD.shape[0], 8, 20)
    case.q_THD = wide[:, 2:6, 4:]
    compare(case, isa)


@pytest.mark.parametrize("lens", [[], [(0, 5), (2, 6)]])
def test_steps_without_tokens_for_a_sequence_are_fine(lens):
    case = paged_case(lens, heads=2, kv_heads=1, key_dim=8, value_dim=8)
    got = paged_attention(*case.tensors, **case.lens, scale=1.0, window=None)
    expected = paged_attention_reference(*case.tensors, **case.lens, scale=1.0, window=None)
    torch.testing.assert_close(got, expected)


@each_isa
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_a_sequence_gives_the_same_bits_alone_and_in_any_batch(isa, threads, window, sinks):
    options = {"scale": 0.2, "window": window, "sinks_H": torch.randn(6) if sinks else None}
    lens = [(1, 2600), (1, 3), (90, 90), (4, 1100)]
    case = paged_case(lens, heads=6, kv_heads=2, key_dim=24, value_dim=24)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with on_isa(isa):
            whole = paged_attention(*case.tensors, **case.lens, **options)
            alone = [
                paged_attention(*one.tensors, **one.lens, **options)
                for one in map(case.only, range(len(lens)))
            ]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, torch.cat(alone))


@each_isa
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (40, None), (None, 40)])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_prefill_in_chunks_and_token_by_token_gives_the_same_bits(isa, window, chunk, sinks):
    options = {"scale": 0.2, "window": window, "sinks_H": torch.randn(4) if sinks else None}
    options["chunk"] = chunk
    case = paged_case([(150, 150)], heads=4, kv_heads=2, key_dim=32, value_dim=32)

    def run(first: int, last: int) -> torch.Tensor:
        part = paged_case([], heads=4, kv_heads=2, key_dim=32, value_dim=32)
        part.q_THD, part.k_cache, part.v_cache = case.q_THD[first:last], case.k_cache, case.v_cache
        part.block_table_SB, part.query_lens = case.block_table_SB, [last - first]
        part.context_lens = [last]
        return paged_attention(*part.tensors, **part.lens, **options)

    with on_isa(isa):
        whole = run(0, 150)
        chunked = torch.cat([run(0, 37), run(37, 101), run(101, 150)])
        stepped = torch.cat([run(i, i + 1) for i in range(150)])
    assert torch.equal(whole, chunked)
    assert torch.equal(whole, stepped)


@each_isa
def test_large_scores_do_not_overflow(isa):
    case = paged_case([(40, 40)], heads=2, kv_heads=1, key_dim=16, value_dim=16)
    case.q_THD = case.q_THD * 1000
    expected = paged_attention_reference(*case.tensors, **case.lens, scale=1.0, window=None)
    with on_isa(isa):
        got = paged_attention(*case.tensors, **case.lens, scale=1.0, window=None)
    # Scores of some thousands round to 2^-11 or so: weights agree to about a thousandth.
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    assert got.isfinite().all()


@each_isa
def test_not_a_number_in_a_query_stays_visible(isa):
    case = paged_case([(3, 3)], heads=1, kv_heads=1, key_dim=8, value_dim=8)
    case.q_THD[1, 0, 2] = float("nan")
    with on_isa(isa):
        got = paged_attention(*case.tensors, **case.lens, scale=1.0, window=None)
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


@needs_native
def test_a_block_outside_the_cache_is_refused_before_anything_is_read():
    case = paged_case([(1, 20)], heads=1, kv_heads=1, key_dim=8, value_dim=8)
    case.block_table_SB[0, 1] = 10_000
    with pytest.raises(RuntimeError, match="names block 10000"):
        paged_attention(*case.tensors, **case.lens, scale=1.0, window=None)


@needs_native
def test_sinks_that_are_not_one_per_head_are_refused():
    case = paged_case([(1, 4)], heads=2, kv_heads=1, key_dim=8, value_dim=8)
    with pytest.raises(RuntimeError, match="sinks must be 2"):
        paged_attention(*case.tensors, **case.lens, scale=1.0, window=None, sinks_H=torch.zeros(3))
