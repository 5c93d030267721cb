"""store_kv on CUDA: one Triton program a (token, kv head).

`store_kv` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.float8_cache import as_bytes, is_float8
from engine.ops.gpu.pack_rows import to_saturated_float8
from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit
def _store_kv_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slots_T,
    block_size,
    k_token,
    k_row,
    v_token,
    v_row,
    k_block,
    k_head,
    k_slot,
    v_block,
    v_head,
    v_slot,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.load(slots_T + token)
    block, slot = at // block_size, at % block_size
    key_D, value_D = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    key = tl.load(k + token * k_token + head * k_row + key_D, mask=key_D < KEY_DIM)
    value = tl.load(v + token * v_token + head * v_row + value_D, mask=value_D < VALUE_DIM)
    k_at = k_cache + block * k_block + head * k_head + slot * k_slot
    v_at = v_cache + block * v_block + head * v_head + slot * v_slot
    if FLOAT8:
        key, value = to_saturated_float8(key), to_saturated_float8(value)
    tl.store(k_at + key_D, key, mask=key_D < KEY_DIM)
    tl.store(v_at + value_D, value, mask=value_D < VALUE_DIM)


def store_kv_triton(
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Triton form of `store_kv`: same arguments."""
    num_tokens, num_heads, key_dim = k_TGD.shape
    if num_tokens == 0:
        return
    k_TGD = k_TGD if k_TGD.stride(2) == 1 else k_TGD.contiguous()
    v_TGD = v_TGD if v_TGD.stride(2) == 1 else v_TGD.contiguous()
    assert k_cache.stride(3) == 1 and v_cache.stride(3) == 1
    _store_kv_kernel[(num_tokens, num_heads)](
        k_TGD,
        v_TGD,
        as_bytes(k_cache),
        as_bytes(v_cache),
        slots_T,
        k_cache.shape[2],
        k_TGD.stride(0),
        k_TGD.stride(1),
        v_TGD.stride(0),
        v_TGD.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        v_cache.stride(0),
        v_cache.stride(1),
        v_cache.stride(2),
        KEY_DIM=key_dim,
        VALUE_DIM=v_TGD.shape[2],
        KEY_PAD=triton.next_power_of_2(key_dim),
        VALUE_PAD=triton.next_power_of_2(v_TGD.shape[2]),
        FLOAT8=is_float8(k_cache),
    )


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: heads of 128, and a latent cache."""

    def heads(tokens: int, dtype: torch.dtype) -> None:
        # Of one projection with 32 query, 8 key and 8 value heads: strided views.
        qkv_TGD = meta(tokens, 48, 128, dtype=dtype)
        k_cache, v_cache = meta(256, 8, 16, 128, dtype=dtype), meta(256, 8, 16, 128, dtype=dtype)
        slots_T = meta(tokens, dtype=torch.int64)
        store_kv_triton(qkv_TGD[:, 32:40], qkv_TGD[:, 40:], k_cache, v_cache, slots_T)

    def latent(tokens: int) -> None:
        key_T1L, cache = meta(tokens, 1, 576), meta(256, 1, 16, 576)
        slots_T = meta(tokens, dtype=torch.int64)
        store_kv_triton(key_T1L, meta(tokens, 1, 512), cache, cache[..., :512], slots_T)

    for name, dtype in DTYPES.items():
        yield Variant(f"{name} head 128", lambda tokens, dtype=dtype: heads(tokens, dtype))
    yield Variant("bf16 latent 576", latent)
