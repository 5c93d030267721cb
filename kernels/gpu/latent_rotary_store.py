"""latent_rotary_store on CUDA: one Triton program a (token, head), and one a key.

`latent_rotary_store` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.float8_cache import as_bytes, is_float8
from engine.ops.gpu.pack_rows import to_saturated_float8
from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit
def _rotated(row, cos, sin, ROTARY: tl.constexpr, PAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    # The rotary numbers at `row` in float32 and in split order.
    half = ROTARY // 2
    dim = tl.arange(0, PAD)
    first = dim < half
    if INTERLEAVED:
        source = tl.where(first, 2 * dim, 2 * (dim - half) + 1)
        partner = tl.where(first, source + 1, source - 1)
    else:
        source = dim
        partner = tl.where(first, dim + half, dim - half)
    exists = dim < ROTARY
    x = tl.load(row + source, mask=exists, other=0.0).to(tl.float32)
    y = tl.load(row + partner, mask=exists, other=0.0).to(tl.float32)
    cosine = tl.load(cos + dim, mask=exists, other=0.0).to(tl.float32)
    sine = tl.load(sin + dim, mask=exists, other=0.0).to(tl.float32)
    return x * cosine + tl.where(first, -y, y) * sine


@triton.jit(do_not_specialize=["num_queries"])
def _latent_rotary_store_kernel(
    absorbed,
    q_rope,
    latent,
    k_rope,
    norm_C,
    cos,
    sin,
    cache,
    slots_T,
    rows_Q,
    out,
    num_queries,
    absorbed_token,
    absorbed_head,
    rope_token,
    rope_head,
    latent_token,
    key_token,
    angle_token,
    cache_block,
    cache_slot,
    block_size,
    eps,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    LATENT_PAD: tl.constexpr,
    ROTARY_PAD: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    latent_C, dim_R = tl.arange(0, LATENT_PAD), tl.arange(0, ROTARY_PAD)
    if part == 0:
        row_C = tl.load(latent + index * latent_token + latent_C, mask=latent_C < LATENT, other=0.0)
        weight_C = tl.load(norm_C + latent_C, mask=latent_C < LATENT, other=0.0)
        wide_C = row_C.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(wide_C * wide_C, axis=0) / LATENT + eps)
        normed_C = (wide_C * scale).to(row_C.dtype) * weight_C  # rounded where torch rounds
        angle = index * angle_token
        key_R = _rotated(
            k_rope + index * key_token, cos + angle, sin + angle, ROTARY, ROTARY_PAD, INTERLEAVED
        )
        slot = tl.load(slots_T + index)
        to = cache + slot // block_size * cache_block + slot % block_size * cache_slot
        if FLOAT8:
            normed_C = to_saturated_float8(normed_C)
            key_R = to_saturated_float8(key_R.to(out.dtype.element_ty))
        tl.store(to + latent_C, normed_C, mask=latent_C < LATENT)
        tl.store(to + LATENT + dim_R, key_R.to(cache.dtype.element_ty), mask=dim_R < ROTARY)
    elif index < num_queries:
        token = index
        if HAS_ROWS:
            token = tl.load(rows_Q + index)
        head = part - 1
        from_C = absorbed + index * absorbed_token + head * absorbed_head + latent_C
        absorbed_C = tl.load(from_C, mask=latent_C < LATENT, other=0.0)
        angle = token * angle_token
        row = q_rope + token * rope_token + head * rope_head
        q_R = _rotated(row, cos + angle, sin + angle, ROTARY, ROTARY_PAD, INTERLEAVED)
        to = out + (index * HEADS + head) * (LATENT + ROTARY)
        tl.store(to + latent_C, absorbed_C, mask=latent_C < LATENT)
        tl.store(to + LATENT + dim_R, q_R.to(out.dtype.element_ty), mask=dim_R < ROTARY)


def latent_rotary_store_triton(
    absorbed_QHC: torch.Tensor,
    q_rope_THR: torch.Tensor,
    latent_TC: torch.Tensor,
    k_rope_TR: torch.Tensor,
    norm_C: torch.Tensor,
    eps: float,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    cache: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    interleaved: bool,
    rows_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Triton form of `latent_rotary_store`: same arguments and result; q_rope and k_rope stay."""
    num_queries, heads, latent = absorbed_QHC.shape
    num_tokens, rotary = k_rope_TR.shape
    out_QHL = absorbed_QHC.new_empty(num_queries, heads, latent + rotary)
    if num_tokens == 0:
        return out_QHL
    absorbed_QHC, q_rope_THR, latent_TC, k_rope_TR = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (absorbed_QHC, q_rope_THR, latent_TC, k_rope_TR)
    )
    assert cos_TR.stride() == sin_TR.stride() and cos_TR.stride(1) == 1 and cache.stride(3) == 1
    latent_pad, rotary_pad, num_warps = _tile(latent, rotary)
    _latent_rotary_store_kernel[(num_tokens, 1 + heads)](
        absorbed_QHC,
        q_rope_THR,
        latent_TC,
        k_rope_TR,
        norm_C,
        cos_TR,
        sin_TR,
        as_bytes(cache),
        slots_T,
        slots_T if rows_Q is None else rows_Q,
        out_QHL,
        num_queries,
        absorbed_QHC.stride(0),
        absorbed_QHC.stride(1),
        q_rope_THR.stride(0),
        q_rope_THR.stride(1),
        latent_TC.stride(0),
        k_rope_TR.stride(0),
        cos_TR.stride(0),
        cache.stride(0),
        cache.stride(2),
        cache.shape[2],
        eps,
        HEADS=heads,
        LATENT=latent,
        ROTARY=rotary,
        INTERLEAVED=interleaved,
        HAS_ROWS=rows_Q is not None,
        LATENT_PAD=latent_pad,
        ROTARY_PAD=rotary_pad,
        FLOAT8=is_float8(cache),
        num_warps=num_warps,
    )
    return out_QHL


def _tile(latent: int, rotary: int) -> tuple[int, int, int]:
    """Returns the padded dims and the warps: 8 numbers of a latent a thread, 16 bytes in bf16."""
    latent_pad, rotary_pad = triton.next_power_of_2(latent), triton.next_power_of_2(rotary)
    return latent_pad, rotary_pad, max(1, latent_pad // 256)


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: DeepSeek's latent of 512 + 64, all tokens or a few attending."""

    def variant(name: str, heads: int, reads: bool) -> Variant:
        dtype = DTYPES[name]

        def call(tokens: int) -> None:
            queries = tokens // 2 + 1 if reads else tokens
            q_THD = meta(tokens, heads, 192, dtype=dtype)
            down_TO = meta(tokens, 1536 + 576, dtype=dtype)
            angles = meta(tokens, 64, dtype=dtype)
            latent_rotary_store_triton(
                meta(heads, queries, 512, dtype=dtype).transpose(0, 1),
                q_THD[..., 128:],
                down_TO[:, 1536:2048],
                down_TO[:, 2048:],
                meta(512, dtype=dtype),
                1e-6,
                angles,
                angles,
                meta(256, 1, 16, 576, dtype=dtype),
                meta(tokens, dtype=torch.int64),
                interleaved=True,
                rows_Q=meta(queries, dtype=torch.int64) if reads else None,
            )

        return Variant(f"{name} {heads} heads{', rows read' if reads else ''}", call)

    for name in DTYPES:
        yield variant(name, 16, reads=False)
    yield variant("bf16", 128, reads=False)
    yield variant("bf16", 16, reads=True)
