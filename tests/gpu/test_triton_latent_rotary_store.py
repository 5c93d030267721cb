"""latent_rotary_store in Triton against the torch reference.

On a CUDA device, else in Triton's interpreter.
"""

import pytest
import torch

from engine.ops.latent_rotary_store import latent_rotary_store_reference
from tests.helpers.triton_cases import DEVICE, DTYPES, kernel

BOUNDS = {torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}
EPS = 1e-6

pytestmark = kernel


def case(tokens: int, heads: int, latent: int, rotary: int, rows: list[int] | None = None) -> dict:
    """Random arguments of a step, views of joint projections as the layer has them."""
    num_queries = tokens if rows is None else len(rows)
    q = torch.randn(tokens, heads, 5 + rotary)
    down = torch.randn(tokens, 7 + latent + rotary) * 2
    angle = torch.rand(tokens, rotary // 2).repeat(1, 2) * 6
    blocks = tokens // 3 + 2
    return {
        "absorbed_QHC": torch.randn(heads, num_queries, latent).transpose(0, 1),
        "q_rope_THR": q[..., 5:],
        "latent_TC": down[:, 7 : 7 + latent],
        "k_rope_TR": down[:, 7 + latent :],
        "norm_C": 1 + 0.1 * torch.randn(latent),
        "eps": EPS,
        "cos_TR": angle.cos(),
        "sin_TR": angle.sin(),
        "cache": torch.full((blocks, 1, 3, latent + rotary), 7.0),
        "slots_T": torch.randperm(blocks * 3)[:tokens],
        "rows_Q": None if rows is None else torch.tensor(rows, dtype=torch.int64),
    }


def compare(given: dict, interleaved: bool, dtype: torch.dtype = torch.float32) -> None:
    from engine.ops.gpu.latent_rotary_store import latent_rotary_store_triton

    given = {
        key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in given.items()
    }
    device = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    device["cache"] = given["cache"].to(DEVICE, copy=True)
    got = latent_rotary_store_triton(**device, interleaved=interleaved)
    # The reference in float32, on copies: it may overwrite what it rotates.
    exact = {
        key: x.float().clone() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in given.items()
    }
    expected = latent_rotary_store_reference(**exact, interleaved=interleaved)
    bound = BOUNDS[dtype]
    for mine, theirs in ((got, expected), (device["cache"], exact["cache"])):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.cpu().float(), theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("tokens", "heads", "latent", "rotary"), [(1, 1, 1, 2), (5, 3, 24, 6), (4, 16, 40, 8)]
)
def test_odd_sizes_match_the_reference(tokens, heads, latent, rotary, interleaved):
    compare(case(tokens, heads, latent, rotary), interleaved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_the_widths_of_deepseek_match_the_reference(interleaved, dtype):
    compare(case(2, 16, 512, 64), interleaved, dtype)


@pytest.mark.parametrize("rows", [[], [3], [0, 2, 4]], ids=str)
def test_only_tokens_that_attend_have_queries_and_all_are_stored(rows):
    compare(case(5, 4, 16, 8, rows), interleaved=True)


def test_no_token_writes_nothing():
    from engine.ops.gpu.latent_rotary_store import latent_rotary_store_triton

    empty = {
        key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        for key, x in case(0, 2, 16, 8).items()
    }
    out = latent_rotary_store_triton(**empty, interleaved=True)
    assert out.shape == (0, 2, 24) and bool((empty["cache"] == 7).all())
