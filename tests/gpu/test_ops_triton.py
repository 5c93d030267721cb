"""The Triton kernels against the torch references.

On a CUDA device they run there, elsewhere in Triton's interpreter on CPU tensors.
"""

import pytest
import torch

from engine.ops.paged_attention import paged_attention_reference
from engine.ops.permute import combine_rows_reference
from engine.ops.select_experts import SelectionRule, select_experts_reference
from engine.ops.silu_and_mul import silu_and_mul_reference
from engine.ops.store_kv import store_kv_reference
from tests.helpers.ops_cases import PagedCase, paged_case
from tests.helpers.triton_cases import DEVICE, DTYPES, MOVED_DTYPES, kernel


def run_attention(case: PagedCase, **arguments) -> torch.Tensor:
    from engine.ops.gpu.paged_attention import paged_attention_triton

    return paged_attention_triton(*(x.to(DEVICE) for x in case.tensors), **case.lens, **arguments)


def compare(
    case: PagedCase,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    sinks_H: torch.Tensor | None = None,
    chunk: int | None = None,
) -> None:
    case.q_THD, case.k_cache = case.q_THD.to(dtype), case.k_cache.to(dtype)
    shared = case.v_cache.shape[3] < case.k_cache.shape[3]
    case.v_cache = case.k_cache[..., : case.v_cache.shape[3]] if shared else case.v_cache.to(dtype)
    scale = case.q_THD.shape[-1] ** -0.5
    on_device = None if sinks_H is None else sinks_H.to(DEVICE)
    masks = {"scale": scale, "window": window, "chunk": chunk}
    got = run_attention(case, sinks_H=on_device, **masks).cpu()
    expected = paged_attention_reference(*case.tensors, **case.lens, sinks_H=sinks_H, **masks)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [7, 16, 24, 80])
def test_head_dims_match_the_reference(dim, dtype):
    lens = [(1, 20), (5, 5), (3, 40), (1, 1)]
    compare(paged_case(lens, heads=4, kv_heads=2, key_dim=dim, value_dim=dim), dtype=dtype)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lens", [[(1, 33)], [(40, 40), (1, 7)], [(0, 4), (2, 2)]])
def test_dtypes_match_the_reference(dtype, lens):
    compare(paged_case(lens, heads=2, kv_heads=1, key_dim=32, value_dim=32), dtype=dtype)


@kernel
@pytest.mark.parametrize("masks", [{}, {"window": 5}, {"chunk": 8}, {"sinks_H": torch.ones(4)}])
def test_a_row_without_a_context_is_zero_and_leaves_the_others_as_they_are(masks):
    # As idle rows of a decode step of fixed shape, alone and behind others.
    for lens in ([(1, 0)], [(1, 20), (1, 0), (1, 9), (1, 0)]):
        case = paged_case(lens, heads=4, kv_heads=2, key_dim=16, value_dim=16)
        compare(case, **masks)
        on_device = {
            name: getattr(value, "to", lambda _, v=value: v)(DEVICE)
            for name, value in masks.items()
        }
        arguments = {"scale": 1.0, "window": None} | on_device
        out_THD = run_attention(case, **arguments)
        assert all(out_THD[row].any() == (context > 0) for row, (_, context) in enumerate(lens))


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 5, 32, 100])
def test_sliding_windows_match_the_reference(window, dtype):
    case = paged_case([(1, 70), (20, 60)], heads=2, kv_heads=2, key_dim=16, value_dim=16)
    compare(case, window, dtype=dtype)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 32, 100])
@pytest.mark.parametrize("window", [None, 20])
def test_chunks_match_the_reference(chunk, window, dtype):
    lens = [(1, 70), (1, 64), (1, 65), (20, 60)]
    case = paged_case(lens, heads=2, kv_heads=2, key_dim=16, value_dim=16)
    compare(case, window, dtype, chunk=chunk)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["near the scores", "far from them"])
def test_sinks_match_the_reference(window, dtype, scale):
    case = paged_case([(1, 70), (20, 60), (1, 1)], heads=10, kv_heads=2, key_dim=16, value_dim=16)
    sinks_H = torch.randn(10, generator=torch.Generator().manual_seed(1)) * scale
    compare(case, window, dtype, sinks_H)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "block_size"), [(3, 16), (20, 4), (1, 7)])
def test_groups_and_block_sizes_match_the_reference(heads, block_size, dtype):
    case = paged_case(
        [(1, 19), (9, 11)], heads=heads, kv_heads=1, key_dim=16, value_dim=8, block_size=block_size
    )
    compare(case, dtype=dtype)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_latent_cache_with_values_as_a_strided_prefix_matches_the_reference(dtype):
    compare(paged_case([(1, 17), (2, 5)], heads=16, kv_heads=1, key_dim=576), dtype=dtype)


@kernel
def test_decodes_have_tiles_of_their_own_beside_a_prefill(monkeypatch):
    from engine.ops.gpu import paged_attention

    launches, run = [], paged_attention._paged_attention_kernel

    class Noting:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                launches.append((*args[7:9], constants["BLOCK_M"]))
                run[grid](*args, **constants)

            return launch

    monkeypatch.setattr(paged_attention, "_paged_attention_kernel", Noting())
    lens = [(1, 20), (3, 40), (1, 7), (50, 60), (1, 30)]
    case = paged_case(lens, heads=8, kv_heads=2, key_dim=16, value_dim=16)
    compare(case, dtype=torch.float16)
    # First sequence, how many, rows of a tile. A decode behind a prefill stays with it.
    assert launches == [(0, 3, 16), (3, 2, 64)]
    alone = paged_case([(1, 20)], heads=8, kv_heads=2, key_dim=576)
    compare(alone, dtype=torch.float16)
    assert launches[2:] == [(0, 1, 16)]


@kernel
def test_an_empty_step_returns_an_empty_result():
    case = paged_case([], heads=2, kv_heads=1, key_dim=16, value_dim=16)
    assert run_attention(case, scale=1.0, window=None).shape == (0, 2, 16)


@kernel
def test_a_sequence_gives_the_same_result_alone_and_in_any_batch():
    case = paged_case([(1, 50), (6, 30), (1, 3)], heads=4, kv_heads=2, key_dim=16, value_dim=16)
    whole = run_attention(case, scale=0.25, window=None)
    alone = [run_attention(case.only(s), scale=0.25, window=None) for s in range(3)]
    # Alone a decode step may take smaller blocks of rows: the same sums, so equal up to rounding.
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-6, atol=1e-6)


@kernel
@pytest.mark.parametrize("dtype", MOVED_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_store_kv_matches_the_reference(tokens, dtype):
    from engine.ops.gpu.store_kv import store_kv_triton

    k, v = torch.randn(tokens, 2, 34).to(dtype).split([24, 10], dim=-1)
    slots = torch.randperm(4 * 6)[:tokens]
    expected = [torch.zeros(4, 2, 6, dim, dtype=dtype) for dim in (24, 10)]
    caches = [cache.to(DEVICE) for cache in expected]
    store_kv_reference(k, v, *expected, slots)
    store_kv_triton(k.to(DEVICE), v.to(DEVICE), caches[0], caches[1], slots.to(DEVICE))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(caches, expected, strict=True))


@kernel
@pytest.mark.parametrize("dtype", MOVED_DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "dim"), [(0, 2, 8), (5, 3, 37), (2, 1, 1500)])
def test_combine_rows_matches_the_reference(dtype, tokens, top_k, dim):
    from engine.ops.gpu.combine_rows import combine_rows_triton

    rows = torch.randn(tokens * top_k + 2, dim).to(dtype)
    slot = torch.randint(-1, rows.shape[0], (tokens, top_k))
    weights = torch.rand(tokens, top_k)
    rows[0], weights[slot < 0] = 1.0, float("nan")
    got = combine_rows_triton(rows.to(DEVICE), slot.to(DEVICE), weights.to(DEVICE)).cpu()
    expected = combine_rows_reference(rows, slot, weights)
    rtol = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-3)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (3, 30), (2, 2, 2100)])
def test_silu_and_mul_matches_the_reference(dtype, shape):
    from engine.ops.gpu.silu_and_mul import silu_and_mul_triton

    x = (torch.randn(shape) * 4).to(dtype)
    got = silu_and_mul_triton(x.to(DEVICE)).cpu()
    expected = silu_and_mul_reference(x)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@kernel
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("least", [0.0, 1.5])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(0, 4, 2), (3, 8, 2), (5, 60, 4), (1, 1, 1), (2, 6, 6)]
)
def test_select_experts_matches_the_reference(tokens, experts, top_k, least, score):
    from engine.ops.gpu.select_experts import select_experts_triton

    logits = torch.randn(tokens, experts + 3)[:, :experts]
    bias = torch.rand(experts) if score == "sigmoid" or least else None
    rule = SelectionRule(top_k, score, True, 1e-3, 2.5, normalize_min=least)
    given = [logits.to(DEVICE), None if bias is None else bias.to(DEVICE)]
    got = select_experts_triton(*given, rule)
    expected = select_experts_reference(logits, bias, rule)
    assert torch.equal(got[1].cpu(), expected[1])
    for mine, theirs in ((got[0], expected[0]), (got[2], expected[2])):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-6)


@kernel
def test_selected_experts_differ_and_exist_whatever_the_logits():
    from engine.ops.gpu.select_experts import select_experts_triton

    logits = torch.tensor([[float("nan")] * 5, [1.0] * 5, [0.0, float("nan"), 3.0, 3.0, -1e30]])
    _, ids, _ = select_experts_triton(logits.to(DEVICE), None, SelectionRule(3, "sigmoid"))
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 3]]
