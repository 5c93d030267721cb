"""place_and_round and silu_and_place in Triton against torch: bit for bit where a row lies.

On a CUDA device, else in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from engine.ops.block_scaled_ffn import (
    BLOCK,
    RowLayout,
    place_and_round_reference,
    silu_and_place_reference,
)
from tests.helpers.triton_cases import DEVICE, DTYPES, MOVED_DTYPES, kernel

pytestmark = kernel
LOADS = {
    "masked": [3, 0, 7, 1, 2],
    "contiguous": [9, 0, 4, 2, 1],
    "one has all": [0, 0, 5, 0, 0],
}


def counted(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, RowLayout]:
    counts_e = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    # Fewer places than a real layout has: the interpreter takes a millisecond for each.
    layout = RowLayout(40, 8, 0) if counts == LOADS["masked"] else RowLayout(32, 32, 4)
    return counts_e, counts_e.cumsum(0, dtype=torch.int32), layout


def of_rows(made: tuple[torch.Tensor, torch.Tensor], place_R: torch.Tensor):
    codes_PI, scale_SGM = made
    return codes_PI.view(torch.uint8)[place_R], scale_SGM.transpose(1, 2).flatten(0, 1)[place_R]


@pytest.mark.parametrize("dtype", MOVED_DTYPES, ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_rows_are_placed_and_rounded_as_torch_does_it(dtype, load):
    from engine.ops.gpu.round_blocks import place_and_round_triton

    num_rows, width = sum(LOADS[load]), {"masked": 2176}.get(load, 384)
    x = torch.randn(num_rows, width + 3) * torch.logspace(-4, 2, num_rows)[:, None]
    x[1, :BLOCK], x[2, -4] = 0, torch.nan
    x = x.to(dtype).to(DEVICE)[:, :width]
    index = torch.randint(0, num_rows, (num_rows + 4,), device=DEVICE)[4:]
    for each in (None, index):
        expected = place_and_round_reference(x, each, *counted(LOADS[load]))
        got = place_and_round_triton(x, each, *counted(LOADS[load]))
        assert torch.equal(got.owner_P, expected.owner_P)
        assert torch.equal(got.place_R, expected.place_R)
        assert got.scale_SGM.shape == expected.scale_SGM.shape
        (codes, scale), (plain, plain_scale) = (
            of_rows(made[:2], expected.place_R) for made in (got, expected)
        )
        assert torch.equal(scale.nan_to_num(7), plain_scale.nan_to_num(7))
        is_nan = plain & 0x7F == 0x7F  # with either sign
        assert torch.equal(codes & 0x7F == 0x7F, is_nan)
        assert torch.equal(codes[~is_nan], plain[~is_nan])


@pytest.mark.parametrize(("load", "width"), [("masked", 128), ("contiguous", 640)])
def test_the_activation_is_rounded_where_its_rows_lie(load, width):
    from engine.ops.gpu.round_blocks import silu_and_place_triton

    counts_e, ends_e, layout = counted(LOADS[load])
    for dtype in DTYPES:
        rows = torch.randn(sum(LOADS[load]), 2 * width, device=DEVICE).to(dtype)
        empty = torch.zeros(len(rows), BLOCK, device=DEVICE)
        *_, owner_P, place_R = place_and_round_reference(empty, None, counts_e, ends_e, layout)
        gate_up = torch.full((layout.rows, 2 * width), torch.nan, dtype=dtype, device=DEVICE)
        gate_up[place_R] = rows
        got = of_rows(silu_and_place_triton(gate_up, owner_P, layout.slab), place_R)
        expected = of_rows(silu_and_place_reference(gate_up, owner_P, layout.slab), place_R)
        # exp differs in its last bit, which may move a number to the next code.
        assert torch.allclose(got[1], expected[1], rtol=1e-3, atol=1e-37)
        mine, theirs = (each[0].view(torch.float8_e4m3fn).float() for each in (got, expected))
        assert bool(((mine - theirs).abs() <= theirs.abs() / 8 + 2**-9).all())
        assert (mine != theirs).float().mean() < 0.05
