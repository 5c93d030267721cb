"""qk_rotary_store on CUDA: one Triton program a (token, run of heads of the queries or the keys).

Nothing but the cache is overwritten: a program that normalises a whole projection reads the heads
of all others. `qk_rotary_store` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.float8_cache import as_bytes, is_float8
from engine.ops.gpu.pack_rows import to_saturated_float8
from engine.ops.gpu.variants import DTYPES, Variant, meta
from engine.ops.qk_rotary_store import QKRule


@triton.jit
def _row_scale(row, width, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(row + start + column, mask=start + column < width, other=0.0).to(tl.float32)
        squares += x * x
    return 1.0 / tl.sqrt(tl.sum(squares, axis=0) / width + eps)


@triton.jit
def _bounded(x, bound):
    # Comparisons, not min and max: NaN stays NaN, as in torch.
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x)).to(x.dtype)


@triton.jit
def _heads(
    row,
    weight,
    cos,
    sin,
    head_H1,
    num_heads,
    bound,
    eps,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    WHOLE_NORM: tl.constexpr,
    CLIP: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Heads of `row` [heads * DIM], normalised and rotated, in float32: the head and, a second time,
    # every number's partner in the rotation, which is half the rotated dims away.
    dim_1D = tl.arange(0, PAD)[None, :]
    first_1D, turns_1D = dim_1D < ROTARY // 2, dim_1D < ROTARY
    step_1D = tl.where(first_1D, ROTARY // 2, tl.where(turns_1D, -(ROTARY // 2), 0))
    partner_1D = dim_1D + step_1D
    if ROTARY % 16 == 0:
        # Which the compiler does not see: eight in a row have eight partners in a row.
        partner_1D = tl.max_contiguous(tl.multiple_of(partner_1D, [1, 8]), [1, 8])
    exists_HD = (head_H1 < num_heads) & (dim_1D < DIM)
    x_HD = tl.load(row + head_H1 * DIM + dim_1D, mask=exists_HD, other=0.0)
    y_HD = tl.load(row + head_H1 * DIM + partner_1D, mask=exists_HD, other=0.0)
    # Rounded where torch rounds: behind a norm, and behind its weight.
    if WHOLE_NORM:
        scale = _row_scale(row, num_heads * DIM, eps, BLOCK)
        x_HD = (x_HD.to(tl.float32) * scale).to(x_HD.dtype)
        x_HD *= tl.load(weight + head_H1 * DIM + dim_1D, mask=exists_HD, other=0.0)
        y_HD = (y_HD.to(tl.float32) * scale).to(y_HD.dtype)
        y_HD *= tl.load(weight + head_H1 * DIM + partner_1D, mask=exists_HD, other=0.0)
    if CLIP:
        x_HD, y_HD = _bounded(x_HD, bound), _bounded(y_HD, bound)
    if HEAD_NORM:
        wide_HD = x_HD.to(tl.float32)
        scale_H1 = 1.0 / tl.sqrt(tl.sum(wide_HD * wide_HD, axis=1) / DIM + eps)[:, None]
        exists_1D = dim_1D < DIM
        x_HD = (wide_HD * scale_H1).to(x_HD.dtype)
        x_HD *= tl.load(weight + dim_1D, mask=exists_1D, other=0.0)
        y_HD = (y_HD.to(tl.float32) * scale_H1).to(y_HD.dtype)
        y_HD *= tl.load(weight + partner_1D, mask=exists_1D, other=0.0)
    cos_1D = tl.load(cos + dim_1D, mask=turns_1D, other=1.0).to(tl.float32)
    sin_1D = tl.load(sin + dim_1D, mask=turns_1D, other=0.0).to(tl.float32)
    wide_HD, partner_HD = x_HD.to(tl.float32), y_HD.to(tl.float32)
    turned_HD = wide_HD * cos_1D + tl.where(first_1D, -partner_HD, partner_HD) * sin_1D
    return tl.where(turns_1D, turned_HD, wide_HD), exists_HD


@triton.jit
def _qk_rotary_store_kernel(
    q,
    k,
    v,
    q_norm,
    k_norm,
    cos,
    sin,
    k_cache,
    v_cache,
    slots_T,
    out,
    q_token,
    k_token,
    v_token,
    angle_token,
    k_block,
    k_head,
    k_slot,
    v_block,
    v_head,
    v_slot,
    block_size,
    bound,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    WHOLE_NORM: tl.constexpr,
    CLIP: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts = (HEADS + BLOCK_H - 1) // BLOCK_H
    cos += token * angle_token
    sin += token * angle_token
    run_H1 = tl.arange(0, BLOCK_H)[:, None]
    dim_1D = tl.arange(0, PAD)[None, :]
    if part < q_parts:
        head_H1 = part * BLOCK_H + run_H1
        q_HD, exists_HD = _heads(
            q + token * q_token, q_norm, cos, sin, head_H1, HEADS, bound, eps,
            DIM, ROTARY, HEAD_NORM, WHOLE_NORM, CLIP, PAD, BLOCK,
        )  # fmt: skip
        at_HD = out + (token * HEADS + head_H1) * DIM + dim_1D
        tl.store(at_HD, q_HD.to(out.dtype.element_ty), mask=exists_HD)
    else:
        head_H1 = (part - q_parts) * BLOCK_H + run_H1
        k_HD, exists_HD = _heads(
            k + token * k_token, k_norm, cos, sin, head_H1, KV_HEADS, bound, eps,
            DIM, ROTARY, HEAD_NORM, WHOLE_NORM, CLIP, PAD, BLOCK,
        )  # fmt: skip
        v_HD = tl.load(v + token * v_token + head_H1 * DIM + dim_1D, mask=exists_HD, other=0.0)
        if CLIP:
            v_HD = _bounded(v_HD, bound)
        to = tl.load(slots_T + token)
        block, slot = to // block_size, to % block_size
        k_HD_to = k_cache + block * k_block + slot * k_slot + head_H1 * k_head + dim_1D
        v_HD_to = v_cache + block * v_block + slot * v_slot + head_H1 * v_head + dim_1D
        if FLOAT8:
            # Rounded to the model's dtype first, as where norm and rotation are ops of their own.
            k_HD = to_saturated_float8(k_HD.to(out.dtype.element_ty))
            v_HD = to_saturated_float8(v_HD)
        tl.store(k_HD_to, k_HD.to(k_cache.dtype.element_ty), mask=exists_HD)
        tl.store(v_HD_to, v_HD, mask=exists_HD)


def qk_rotary_store_triton(
    q_TO: torch.Tensor,
    k_TO: torch.Tensor,
    v_TO: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_T: torch.Tensor,
    rule: QKRule,
) -> torch.Tensor:
    """Triton form of `qk_rotary_store`: same arguments and result; q and k stay as they are."""
    num_tokens, width = q_TO.shape
    kv_heads, block_size, dim = k_cache.shape[1:]
    heads = width // dim
    out_THD = q_TO.new_empty(num_tokens, heads, dim)
    if num_tokens == 0:
        return out_THD
    q_TO, k_TO, v_TO = (x if x.stride(1) == 1 else x.contiguous() for x in (q_TO, k_TO, v_TO))
    assert k_cache.stride(3) == 1 and v_cache.stride(3) == 1
    assert cos_TR.stride() == sin_TR.stride() and cos_TR.stride(1) == 1
    pad, block_h, num_warps = _tile(dim, max(heads, kv_heads))
    parts = triton.cdiv(heads, block_h) + triton.cdiv(kv_heads, block_h)
    _qk_rotary_store_kernel[(num_tokens, parts)](
        q_TO,
        k_TO,
        v_TO,
        q_TO if q_norm is None else q_norm,
        k_TO if k_norm is None else k_norm,
        cos_TR,
        sin_TR,
        as_bytes(k_cache),
        as_bytes(v_cache),
        slots_T,
        out_THD,
        q_TO.stride(0),
        k_TO.stride(0),
        v_TO.stride(0),
        cos_TR.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        v_cache.stride(0),
        v_cache.stride(1),
        v_cache.stride(2),
        block_size,
        0.0 if rule.clip is None else float(rule.clip),
        rule.eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        ROTARY=cos_TR.shape[1],
        HEAD_NORM=rule.norm == "head",
        WHOLE_NORM=rule.norm == "projection",
        CLIP=rule.clip is not None,
        PAD=pad,
        BLOCK_H=block_h,
        BLOCK=1024,
        FLOAT8=is_float8(k_cache),
        num_warps=num_warps,
    )
    return out_THD


def _tile(dim: int, heads: int) -> tuple[int, int, int]:
    """Returns the padded dim, heads of a program and warps: 8 numbers a thread, 16 bytes."""
    pad = triton.next_power_of_2(dim)
    block_h = min(triton.next_power_of_2(heads), max(1, 1024 // pad))
    return pad, block_h, max(1, block_h * pad // 256)


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: heads and norms of Mixtral, Qwen3, OLMoE, and one of dim 80."""

    def variant(name: str, rule: QKRule, heads: int, kv_heads: int, dim: int = 128) -> Variant:
        dtype = DTYPES[name]

        def call(tokens: int) -> None:
            widths = (heads * dim, kv_heads * dim)
            qkv_TO = meta(tokens, widths[0] + 2 * widths[1], dtype=dtype)
            q_TO, k_TO, v_TO = qkv_TO.split_with_sizes((*widths, widths[1]), dim=1)
            norms: list[torch.Tensor | None] = [None, None]
            if rule.norm != "none":
                sizes = (dim, dim) if rule.norm == "head" else widths
                norms = [meta(size, dtype=dtype) for size in sizes]
            angles, slots = meta(tokens, dim, dtype=dtype), meta(tokens, dtype=torch.int64)
            cache = meta(256, kv_heads, 16, dim, dtype=dtype)
            qk_rotary_store_triton(
                q_TO, k_TO, v_TO, *norms, angles, angles, cache, cache, slots, rule
            )

        return Variant(f"{name} norm {rule.norm}, {heads} and {kv_heads} heads of {dim}", call)

    for name in DTYPES:
        yield variant(name, QKRule("none"), 32, 8)
        yield variant(name, QKRule("head"), 32, 4)
    yield variant("bf16", QKRule("projection", clip=8.0), 16, 16)
    yield variant("bf16", QKRule("none"), 5, 1, 80)
