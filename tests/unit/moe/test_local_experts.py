"""engine/moe/local_experts.py: what instances hold, in which memory, and what moves to copies."""

from __future__ import annotations

import pytest
import torch

from engine.moe.copy_weights import copy_parts, read_home
from engine.moe.local_experts import LocalExperts
from engine.moe.low_bit_experts import ExpertLayouts, LowBitExperts
from engine.moe.placement.placement import Precision
from engine.ops.grouped_ffn import grouped_ffn_reference
from engine.ops.low_bit_floats import dequantise_floats, pack_mxfp4
from engine.ops.quantised import dequantise, quantise
from engine.ops.quantised_rows import FloatLayout, IntegerLayout
from engine.weights.row_sink import fill_sink

HIDDEN, FFN = 64, 40  # 40 rows of gate end in the middle of a panel
HOMES = 3
CPU, FLOAT = torch.device("cpu"), torch.float32
WEIGHTS = 3 * FFN * HIDDEN  # of an expert
INT8, INT4 = ExpertLayouts.of_bits(8, 32), ExpertLayouts.of_bits(4, 32)
FP8, FP8_ROWS = ExpertLayouts.of_fp8(), ExpertLayouts.of_fp8_rows()


def values_of(local: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(local)
    return (
        torch.randn(2 * FFN, HIDDEN, generator=generator) * HIDDEN**-0.5,
        torch.randn(HIDDEN, FFN, generator=generator) * FFN**-0.5,
    )


def empty(
    precision: Precision,
    copies: int,
    layouts: ExpertLayouts | None,
    dtype: torch.dtype = torch.float32,
) -> LocalExperts:
    return LocalExperts(
        HOMES,
        copies,
        precision,
        hidden=HIDDEN,
        ffn=FFN,
        backend="torch",
        device=torch.device("cpu"),
        dtype=dtype,
        layouts=layouts,
    )


def filled(
    precision: Precision,
    copies: int = 2,
    layouts: ExpertLayouts | None = None,
    dtype: torch.dtype = torch.float32,
) -> LocalExperts:
    """Homes of values 0, 1, 2; copies of the values of homes 0 and on."""
    experts = empty(precision, copies, layouts, dtype)
    for local in range(HOMES + copies):
        w13_2FD, w2_DF = values_of(local % HOMES)
        if local % 2:
            experts.set_weights(local, w13_2FD, w2_DF)
            continue
        # As files have them: gate and up apart.
        for matrix, first, part in (("w13", 0, w13_2FD[:FFN]), ("w13", FFN, w13_2FD[FFN:])):
            fill(experts, local, matrix, first, part)
        fill(experts, local, "w2", 0, w2_DF)
    return experts


def fill(experts: LocalExperts, local: int, matrix, first: int, part: torch.Tensor) -> None:
    target, sink = experts.target(local, matrix, first, len(part))
    if sink is None:
        target.copy_(part)
    else:
        assert target.is_meta and target.shape == part.shape
        fill_sink(sink, target, lambda view: view.copy_(part))


def rounded(weights: torch.Tensor, *bits: int | None) -> torch.Tensor:
    for each in bits:
        if each is not None:
            weights = dequantise(quantise(weights[None], each, 32))[0]
    return weights


@pytest.mark.parametrize(
    ("layouts", "precision", "home", "copy"),
    [
        (None, "model", None, None),
        (None, "int4", None, 4),
        (INT8, "model", 8, 8),
        (INT8, "int8", 8, 8),
        (INT4, "int8", 4, 4),
        (INT8, "int4", 8, 4),
    ],
)
def test_instances_compute_on_values_of_their_precision(layouts, precision, home, copy):
    experts = filled(precision, layouts=layouts)
    experts.finalize_weights()
    counts = [3, 0, 5, 2, 9]
    rows = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(9))
    kinds: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for local in range(5):
        # A copy is made from what its home holds.
        bits = (home,) if local < HOMES or copy == home else (home, copy)
        for kind, weights in zip(kinds, values_of(local % HOMES), strict=True):
            kind.append(rounded(weights, *bits))
    expected = grouped_ffn_reference(rows, torch.stack(kinds[0]), torch.stack(kinds[1]), counts)
    torch.testing.assert_close(experts(rows, counts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
@pytest.mark.parametrize(
    "layouts",
    [None, INT8, INT4, FP8, FP8_ROWS],
    ids=["model", "int8", "int4", "fp8", "fp8 rows"],
)
def test_a_copy_that_moves_in_is_the_one_that_is_loaded(layouts, precision):
    experts = filled(precision, layouts=layouts)
    experts.finalize_weights()
    for place in range(2):
        made, loaded = read_home(experts, place), copy_parts(experts, place)
        assert len(made) == len(loaded)
        assert all(torch.equal(*pair) for pair in zip(made, loaded, strict=True))
        assert sum(part.numel() for part in made) == experts.copy_size


@pytest.mark.parametrize(
    "layouts", [INT8, INT4, FP8, FP8_ROWS], ids=["int8", "int4", "fp8", "fp8 rows"]
)
def test_homes_of_integers_have_no_memory_for_their_values(layouts):
    experts = filled("model", copies=0, layouts=layouts)
    assert sum(each.numel() for each in experts.parameters()) == 0
    assert experts.low_bit is not None
    # A scale of 32 bits for every 32 columns; 40 columns have two groups, 80 outputs 5 panels.
    most = WEIGHTS * (layouts.bits + 1.2) / 8
    assert experts.low_bit.bytes_per_expert <= most
    held = [*experts.low_bit.parts(0), *experts.low_bit.parts(1), *experts.low_bit.parts(2)]
    assert sum(part.nbytes for part in held) == HOMES * experts.low_bit.bytes_per_expert


@pytest.mark.parametrize(("precision", "bits"), [("int4", 5), ("int8", 9)])
def test_low_bit_copies_have_no_memory_for_their_values(precision, bits):
    experts = filled(precision)
    assert sum(each.numel() for each in experts.parameters()) == HOMES * WEIGHTS
    # A scale of 32 bits for every 32 columns; 40 columns have two groups, 40 + 40 rows 5 panels.
    assert 2 * WEIGHTS * bits / 8 <= experts.copy_bytes <= 2 * WEIGHTS * (bits + 0.5) / 8


def test_copies_in_the_models_precision_take_as_much_as_homes():
    experts = filled("model")
    experts.finalize_weights()
    assert experts.copy_bytes == 2 * 3 * HIDDEN * FFN * 4
    assert filled("model", copies=0).copy_bytes == filled("int4", copies=0).copy_bytes == 0


def test_integers_are_kept_with_their_zero_points_row_by_row():
    layout = IntegerLayout(4, 8, has_zero=True)
    layouts = ExpertLayouts(layout, layout, kept=True)
    experts = empty("model", 0, layouts)
    generator = torch.Generator().manual_seed(3)
    q_OI = torch.randint(0, 16, (FFN, HIDDEN), generator=generator, dtype=torch.int32)
    scale_OG = torch.rand(FFN, HIDDEN // 8, generator=generator)
    zero_OG = torch.randint(0, 16, (FFN, HIDDEN // 8), generator=generator, dtype=torch.int32)
    expected = (q_OI - zero_OG.repeat_interleave(8, 1)) * scale_OG.repeat_interleave(8, 1)
    assert experts.low_bit is not None
    before, _ = experts.low_bit.values(1)
    sink = experts.target(1, "w13", FFN, FFN)[1]
    assert sink is not None and sink.keeps_stored
    for first in (0, 6, 22):
        own = slice(first, {0: 6, 6: 22, 22: FFN}[first])
        sink.take_integers(first, q_OI[own], scale_OG[own], zero_OG[own])
    after, _ = experts.low_bit.values(1)
    assert torch.equal(after[FFN:], expected) and torch.equal(after[:FFN], before[:FFN])


@pytest.mark.parametrize("ffn", [40, 48])  # gate rows end in the middle of a panel, or at its end
@pytest.mark.parametrize("block", [(16, 32), (1, 64), (20, 64), (1000, 64)])
def test_small_floats_are_kept_with_the_scales_of_their_rows(block, ffn):
    height, width = block
    layout = FloatLayout("fp8", block)
    held = LowBitExperts(2, HIDDEN, ffn, ExpertLayouts(layout, layout, kept=True), CPU, FLOAT)
    generator = torch.Generator().manual_seed(3)
    expected = []
    for half in range(2):  # gate and up, whose blocks begin anew
        codes_OI = torch.randn(ffn, HIDDEN, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-ffn // height), -(-HIDDEN // width), generator=generator)
        rows_O, columns_I = torch.arange(ffn) // height, torch.arange(HIDDEN) // width
        expected.append(codes_OI.float() * scale[rows_O][:, columns_I])
        sink = held.rows("w13", 1, half * ffn, ffn)
        assert sink.keeps_stored
        for first, end in ((0, 6), (6, 22), (22, ffn)):
            own = slice(first, end)
            sink.take_floats(first, codes_OI[own].view(torch.uint8), scale[rows_O[own]])
    assert torch.equal(held.values(1)[0], torch.cat(expected))
    assert not held.values(0)[0].any()
    shares = height in (16, 1000) and ffn == 48
    assert held.w13_eND.scale_ePGN.shape[3] == (1 if shares else 16)


@pytest.mark.parametrize("precision", ["model", "int4"])
def test_experts_held_row_by_row_are_the_backend_scaled_mm_with_copies(precision):
    experts, counts = filled(precision, layouts=FP8_ROWS), [3, 0, 5, 2, 9]
    assert experts.name == "scaled_mm"
    rows = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(9))
    weights = [values_of(local % HOMES) for local in range(5)]
    w13, w2 = (torch.stack(each) for each in zip(*weights, strict=True))
    expected = grouped_ffn_reference(rows, w13, w2, counts)
    index = torch.randperm(len(rows))
    spread = torch.empty_like(rows).index_copy_(0, index, rows)
    got = experts(spread, counts, torch.empty_like(rows), index)[index]
    assert torch.allclose(got, experts(rows, counts), atol=1e-6)
    # FP8 weights and rows; int4 copies lose twice as much.
    error = (got - expected).norm() / expected.norm()
    assert 0.01 < error < (0.08 if precision == "model" else 0.12)


@pytest.mark.parametrize("block", [(1, HIDDEN), (1000, HIDDEN)])
def test_fp8_per_row_and_per_matrix_is_kept_row_by_row(block):
    layout = FloatLayout("fp8", (1, HIDDEN), in_rows=True)
    held = LowBitExperts(2, HIDDEN, HIDDEN, ExpertLayouts(layout, layout, kept=True), CPU, FLOAT)
    codes_OI = torch.randn(HIDDEN, HIDDEN).to(torch.float8_e4m3fn)
    scale_OG = torch.rand(-(-HIDDEN // block[0]), 1).expand(HIDDEN, 1)
    sink = held.rows("w2", 1, 0, HIDDEN)
    for first in (0, 22):
        own = slice(first, {0: 22, 22: None}[first])
        sink.take_floats(first, codes_OI[own].view(torch.uint8), scale_OG[own])
    assert torch.equal(held.values(1)[1], codes_OI.float() * scale_OG)
    assert not held.values(0)[1].any()


def test_rows_of_gate_and_up_that_alternate_are_put_apart():
    layout = FloatLayout("mxfp4")
    held = LowBitExperts(1, HIDDEN, FFN, ExpertLayouts(layout, layout, kept=True), CPU, FLOAT)
    codes_OB = torch.randint(256, (2 * FFN, HIDDEN // 2), dtype=torch.uint8)
    scale_OG = torch.randint(120, 130, (2 * FFN, HIDDEN // 32), dtype=torch.uint8)
    stored = dequantise_floats(pack_mxfp4(codes_OB[None], scale_OG[None]), 0)
    sink = held.rows("w13", 0, 0, 2 * FFN, alternate=True)
    for first in (0, 32):
        own = slice(first, {0: 32, 32: None}[first])
        sink.take_floats(first, codes_OB[own], scale_OG[own])
    assert torch.equal(held.values(0)[0], torch.cat((stored[::2], stored[1::2])))


def test_copies_of_bfloat16_weights_take_half_of_float32_ones():
    wide, narrow = filled("model"), filled("model", dtype=torch.bfloat16)
    assert narrow.copy_bytes * 2 == wide.copy_bytes and narrow.copy_size * 2 == wide.copy_size
    assert filled("int8", dtype=torch.bfloat16).copy_size == filled("int8").copy_size


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
def test_a_copy_moved_from_bfloat16_weights_is_the_one_that_was_loaded(precision):
    experts = filled(precision, 1, dtype=torch.bfloat16)
    experts.finalize_weights()
    parts = zip(read_home(experts, 0), copy_parts(experts, 0), strict=True)
    assert all(torch.equal(home, copy) for home, copy in parts)


def test_weights_of_another_owner_are_run_where_they_lie():
    w13, w2 = (torch.stack(each) for each in zip(*map(values_of, range(HOMES)), strict=True))
    rows = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(9))
    wanted = grouped_ffn_reference(rows, w13, w2, [2, 0, 3])
    experts = empty("model", 0, None)
    experts.use_weights(w13, w2)
    held = [weight.data_ptr() for weight in experts.stacked.tensors]
    experts.finalize_weights()
    assert held == [w13.data_ptr(), w2.data_ptr()]
    torch.testing.assert_close(experts(rows, [2, 0, 3]), wanted)
