"""Expert weights in MXFP4 and FP8: packing, plain dequantisation, and the plain FFN.

Run: python -m pytest tests/unit/ops/test_low_bit_floats.py
"""

import pytest
import torch

from engine.ops.grouped_ffn import grouped_ffn_reference
from engine.ops.grouped_low_bit import low_bit_ffn
from engine.ops.low_bit_floats import (
    dequantise_floats,
    pack_fp8,
    pack_mxfp4,
    quantise_fp8,
)
from engine.weights.formats.scaled import as_float, decode
from tests.helpers.packers import mxfp4, slow_mxfp4


def random_weights(*shape: int) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator), generator


def packed_mxfp4(experts: int, outputs: int, inputs: int):
    """Weights in the layout, and what the format's slow reader makes of the same bytes."""
    stored = mxfp4(*random_weights(experts, outputs, inputs))
    blocks = next(part for suffix, part in stored.items() if "blocks" in suffix)
    scales = next(part for suffix, part in stored.items() if "scales" in suffix)
    return pack_mxfp4(blocks.flatten(2), scales), slow_mxfp4(stored)


def test_mxfp4_is_dequantised_as_the_checkpoint_format_is():
    weights, expected = packed_mxfp4(2, 50, 96)
    assert weights.packed_ePCN.shape == (2, 4, 12, 16) and weights.num_bytes == 2 * 64 * 51
    assert torch.equal(dequantise_floats(weights), expected)
    assert torch.equal(dequantise_floats(weights, 1), expected[1])
    assert torch.equal(dequantise_floats(weights, 1, torch.bfloat16), expected[1].bfloat16())


@pytest.mark.parametrize("block", [(128, 128), (1, 1000), (16, 8), (20, 12), (1000, 1000)])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_fp8_is_dequantised_as_the_checkpoint_format_is(block, as_bytes):
    values, generator = random_weights(2, 150, 139)
    values = values.to(torch.float8_e4m3fn)
    height, width = block
    shape = (2, -(-150 // height), -(-139 // width))
    scale = torch.rand(*shape, generator=generator)
    rows, columns = torch.arange(150) // height, torch.arange(139) // width
    expected = decode(values) * as_float(scale)[:, rows][:, :, columns]
    weights = pack_fp8(values.view(torch.uint8) if as_bytes else values, scale, block)
    assert weights.scale_ePGN.shape[3] == (16 if block in ((1, 1000), (20, 12)) else 1)
    assert torch.equal(dequantise_floats(weights), expected)
    assert torch.equal(dequantise_floats(weights, 0, torch.float16), expected[0].half())


def test_every_number_of_e4m3_is_read():
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    weights = pack_fp8(codes.view(1, 1, -1), torch.ones(1, 1, 1), (1, 1000))
    assert torch.equal(dequantise_floats(weights)[0, 0], decode(codes))


@pytest.mark.parametrize("block", [(128, 128), (1, 1000), (20, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_to_the_nearest_number_of_their_block(block, dtype):
    values = random_weights(2, 150, 139)[0].to(dtype)
    made = dequantise_floats(quantise_fp8(values, block))
    height, width = block
    for top in range(0, 150, height):
        for left in range(0, 139, width):
            own = (slice(None), slice(top, top + height), slice(left, left + width))
            part = values[own].float()
            scale = part.abs().amax(dim=(1, 2), keepdim=True) / 448
            codes = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(made[own], decode(codes) * scale)
    error = (made - values.float()).norm() / values.float().norm()
    assert error < 0.03  # four bits of each number are kept


def test_zeros_stay_zeros_in_fp8_and_what_is_not_finite_is_refused():
    assert not dequantise_floats(quantise_fp8(torch.zeros(1, 20, 20), (16, 16))).any()
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="not finite"):
            quantise_fp8(torch.full((1, 4, 4), value), (128, 128))


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_the_ffn_is_that_of_the_dequantised_weights(kind):
    def make(outputs: int, inputs: int):
        if kind == "mxfp4":
            return packed_mxfp4(3, outputs, inputs)[0]
        values = random_weights(3, outputs, inputs)[0].to(torch.float8_e4m3fn)
        return pack_fp8(values, torch.full((3, 1, 1), 0.25), (128, 128))

    w13, w2 = make(64, 64), make(64, 32)
    x_RD = random_weights(9, 64)[0]
    index_R = torch.tensor([8, 1, 0, 5, 3])
    plain = (dequantise_floats(w13), dequantise_floats(w2))
    for rows, index, counts in ((x_RD, None, [4, 0, 5]), (x_RD, index_R, [2, 3, 0])):
        outs = [torch.full_like(rows, 7.0) for _ in "ab"]
        got = low_bit_ffn(rows, w13, w2, counts, outs[0], index)
        assert torch.equal(got, grouped_ffn_reference(rows, *plain, counts, outs[1], index))


def test_what_does_not_fit_is_refused_with_its_shape():
    codes = torch.zeros(1, 4, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"bytes_eOB: shape \(1, 4, 16\).*\(1, 4, 32\)"):
        pack_mxfp4(codes, torch.zeros(1, 4, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="255 is not a number"):
        pack_mxfp4(codes, torch.full((1, 4, 1), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"blocks of 2 x 8 need \(1, 2, 2\)"):
        pack_fp8(codes, torch.ones(1, 4, 2), (2, 8))
    with pytest.raises(ValueError, match=r"block=\(2, 6\): columns must be a multiple of 4"):
        pack_fp8(codes, torch.ones(1, 2, 3), (2, 6))
    with pytest.raises(ValueError, match="not numbers"):
        pack_fp8(codes | 255, torch.ones(1, 1, 1), (4, 16))
