"""place_and_round and silu_and_place on CUDA: a Triton program rounds groups of 128 columns of one
place of the layout, and finds the row that belongs there.

An expert's first place follows from the counts of those before it, which every program adds up: it
saves a launch, and the counts are in cache.

`block_scaled_ffn` imports this file only where Triton and a CUDA tensor are at hand.

Legend: R rows, P rows of a layout, I input columns, F hidden dim of the FFN, G groups of 128
columns, S slabs of M rows, e experts.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.block_scaled_ffn import BLOCK, PlacedRows, RowLayout
from engine.ops.gpu.pack_rows import to_float8
from engine.ops.gpu.variants import DTYPES, Variant, meta

_GROUPS = 16  # of a program, at most


@triton.jit
def _group_scale(part):
    """Return the largest magnitude of each row of a float32 tile / 448, [rows, 1]."""
    scale = tl.div_rn(tl.max(tl.abs(part), axis=1), tl.full([part.shape[0]], 448.0, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    # A maximum may pass over NaN.
    is_nan = tl.max((part != part).to(tl.int32), axis=1) > 0
    return tl.where(is_nan, float("nan"), scale)[:, None]


@triton.jit(do_not_specialize_on_alignment=["index"])
def _round_blocks_kernel(
    x,
    index,
    counts,
    ends,
    owners,
    places,
    codes,
    scales,
    num_experts,
    num_groups,
    slab,
    x_stride,
    ALIGNMENT: tl.constexpr,
    GATHER: tl.constexpr,
    SILU: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    source = place
    if SILU:
        owner = tl.load(owners + place)
    else:
        expert = tl.arange(0, EXPERTS)
        count = tl.load(counts + expert, mask=expert < num_experts, other=0)
        end = tl.load(ends + expert, mask=expert < num_experts, other=0)
        if ALIGNMENT > 0:
            padded = (count + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
            begin = tl.cumsum(padded, axis=0) - padded
        else:
            begin = expert * slab
        mine = (begin <= place) & (place < begin + count)  # of one expert at most
        owner = tl.max(tl.where(mine, expert, -1), axis=0)
        source = place + tl.sum(tl.where(mine, end - count - begin, 0), axis=0)
        tl.store(owners + place, owner, mask=tile == 0)
        tl.store(places + source, place, mask=(tile == 0) & (owner >= 0))
        if GATHER:
            source = tl.load(index + source, mask=owner >= 0, other=0)
    group = tile * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists = (group < num_groups) & (owner >= 0)
    read = exists[:, None] & (column >= 0)
    width = num_groups * BLOCK
    part = tl.load(x + source * x_stride + column, mask=read, other=0.0)
    if SILU:
        up = tl.load(x + source * x_stride + width + column, mask=read, other=0.0)
        gate = part.to(tl.float32)
        # Rounded where torch rounds: silu is an operator of its own there.
        part = (gate / (1.0 + tl.exp(-gate))).to(x.dtype.element_ty) * up
    part = part.to(tl.float32)
    scale = _group_scale(part)
    code = to_float8(tl.div_rn(part, scale + tl.zeros([GROUPS, BLOCK], tl.float32)))
    tl.store(codes + place * width + column, code, mask=read)
    at = scales + ((place // slab) * num_groups + group[:, None]) * slab + place % slab
    tl.store(at, scale, mask=exists[:, None])


def _launch(
    x: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_e: torch.Tensor | None,
    ends_e: torch.Tensor | None,
    owner_P: torch.Tensor,
    place_R: torch.Tensor | None,
    slab: int,
    alignment: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, groups = len(owner_P), width // BLOCK
    codes_PI = torch.empty(rows, width, dtype=torch.uint8, device=x.device)
    scale_SGM = torch.empty(rows // slab, groups, slab, dtype=torch.float32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    tile = min(_GROUPS, triton.next_power_of_2(groups))
    num_experts = 1 if counts_e is None else len(counts_e)
    _round_blocks_kernel[(rows, triton.cdiv(groups, tile))](
        x,
        owner_P if index_R is None else index_R,
        owner_P if counts_e is None else counts_e,
        owner_P if ends_e is None else ends_e,
        owner_P,
        owner_P if place_R is None else place_R,
        codes_PI,
        scale_SGM,
        num_experts,
        groups,
        slab,
        x.stride(0),
        ALIGNMENT=alignment,
        GATHER=index_R is not None,
        SILU=counts_e is None,
        EXPERTS=triton.next_power_of_2(num_experts),
        GROUPS=tile,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return codes_PI.view(torch.float8_e4m3fn), scale_SGM


def place_and_round_triton(
    x_RI: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_e: torch.Tensor,
    ends_e: torch.Tensor,
    layout: RowLayout,
) -> PlacedRows:
    """Triton form of `place_and_round`: same arguments and results."""
    num_rows, device = len(x_RI) if index_R is None else len(index_R), x_RI.device
    owner_P = torch.empty(layout.rows, dtype=torch.int32, device=device)
    place_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    made = _launch(
        x_RI,
        index_R,
        counts_e,
        ends_e,
        owner_P,
        place_R,
        layout.slab,
        layout.alignment,
        x_RI.shape[1],
    )
    return PlacedRows(*made, owner_P, place_R)


def silu_and_place_triton(
    gate_up_P2F: torch.Tensor, owner_P: torch.Tensor, slab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of `silu_and_place`: same arguments and results."""
    width = gate_up_P2F.shape[1] // 2
    return _launch(gate_up_P2F, None, None, None, owner_P, None, slab, 0, width)


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: both layouts, rows in place and gathered, and the activation."""

    def rows(name: str, dtype: torch.dtype, width: int, experts: int, alignment: int) -> Variant:
        def call(num: int) -> None:
            places = 128 * experts * num
            layout = RowLayout(places, places if alignment else 128, alignment)
            counts, ends = meta(2, experts, dtype=torch.int32)
            index_R = meta(3 * num, dtype=torch.int64)[num:] if alignment else None
            place_and_round_triton(meta(2 * num, width, dtype=dtype), index_R, counts, ends, layout)

        kind = "contiguous, gathered" if alignment else "masked"
        return Variant(f"{name} rows, {kind}, dim {width}", call)

    for name, dtype in DTYPES.items():
        yield rows(name, dtype, 7168, 32, 128)
    yield rows("bf16", torch.bfloat16, 2048, 16, 0)
    yield Variant(
        "bf16 silu, dim 2048",
        lambda num: silu_and_place_triton(
            meta(128 * num, 4096), meta(128 * num, dtype=torch.int32), 128 * num
        ),
    )
