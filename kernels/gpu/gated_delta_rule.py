"""gated_delta_rule on CUDA: one Triton program per (sequence, value head, run of the value dim).

A program keeps its part of the state in registers over all tokens of its sequence, in float32, and
loads the next token while it computes one. `gated_delta_rule` imports this file only where Triton
and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit
def decay_of(a, log_rate, bias):
    """Return exp of minus the rate times softplus, in float32 as torch computes it."""
    x = a.to(tl.float32) + bias
    grown = tl.exp(tl.minimum(x, 20.0))
    # log(1 + grown) without what 1 + grown rounds away.
    one_more = 1.0 + grown
    below = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    log_C = tl.where(one_more == 1.0, grown, tl.log(one_more) * (grown / below))
    return tl.exp(-tl.exp(log_rate) * tl.where(x > 20.0, x, log_C))


@triton.jit
def unit(x_K, EPS: tl.constexpr):
    """Return a key or query of length 1, in float32."""
    wide_K = x_K.to(tl.float32)
    return wide_K * (1.0 / tl.sqrt(tl.sum(wide_K * wide_K, axis=0) + EPS))


@triton.jit(
    do_not_specialize_on_alignment=["states_S", "query_start_S1", "context_lens_S"],
)
def _gated_delta_rule_kernel(
    q,
    k,
    v,
    a,
    b,
    log_rate_H,
    rate_bias_H,
    state,
    out,
    states_S,
    query_start_S1,
    context_lens_S,
    q_token,
    k_token,
    v_token,
    a_token,
    b_token,
    state_row,
    scale,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    EPS: tl.constexpr,
    PAD_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head = tl.program_id(1)
    # Longer ones come last in a step and take longest: their programs start first.
    sequence = tl.num_programs(2) - 1 - tl.program_id(2)
    start = tl.load(query_start_S1 + sequence)
    length = tl.load(query_start_S1 + sequence + 1) - start
    key_K = tl.arange(0, PAD_K)
    value_V = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    exists_K, exists_V = key_K < KEY_DIM, value_V < VALUE_DIM
    exists_KV = exists_K[:, None] & exists_V[None, :]

    first = start.to(tl.int64)
    q += first * q_token + head // SHARED * KEY_DIM + key_K
    k += first * k_token + head // SHARED * KEY_DIM + key_K
    v += first * v_token + head * VALUE_DIM + value_V
    a += first * a_token + head
    b += first * b_token + head
    out += (first * HEADS + head) * VALUE_DIM + value_V
    state += tl.load(states_S + sequence) * state_row + head * KEY_DIM * VALUE_DIM
    state_at_KV = state + key_K[:, None] * VALUE_DIM + value_V[None, :]
    has_past = tl.load(context_lens_S + sequence) > length
    state_KV = tl.load(state_at_KV, mask=exists_KV & has_past, other=0.0)
    log_rate = tl.load(log_rate_H + head)
    rate_bias = tl.load(rate_bias_H + head)

    next_q_K = tl.load(q, mask=exists_K, other=0.0)
    next_k_K = tl.load(k, mask=exists_K, other=0.0)
    next_v_V = tl.load(v, mask=exists_V, other=0.0)
    next_a, next_b = tl.load(a), tl.load(b)
    for token in range(length):
        q_K, k_K = unit(next_q_K, EPS) * scale, unit(next_k_K, EPS)
        v_V = next_v_V.to(tl.float32)
        decay = decay_of(next_a, log_rate, rate_bias)
        # Rounded where torch rounds, to the dtype of the projection.
        beta = (1.0 / (1.0 + tl.exp(-next_b.to(tl.float32)))).to(next_b.dtype).to(tl.float32)
        # The last token loads itself once more.
        step = (token + 1 < length).to(tl.int64)
        q += step * q_token
        k += step * k_token
        v += step * v_token
        a += step * a_token
        b += step * b_token
        next_q_K = tl.load(q, mask=exists_K, other=0.0)
        next_k_K = tl.load(k, mask=exists_K, other=0.0)
        next_v_V = tl.load(v, mask=exists_V, other=0.0)
        next_a, next_b = tl.load(a), tl.load(b)

        state_KV *= decay
        known_V = tl.sum(k_K[:, None] * state_KV, axis=0)
        d_V = (v_V - known_V) * beta
        state_KV += k_K[:, None] * d_V[None, :]
        out_V = tl.sum(q_K[:, None] * state_KV, axis=0)
        tl.store(out, out_V.to(out.dtype.element_ty), mask=exists_V)
        out += HEADS * VALUE_DIM
    tl.store(state_at_KV, state_KV, mask=exists_KV)


def gated_delta_rule_triton(
    q_TGK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_THV: torch.Tensor,
    a_TH: torch.Tensor,
    b_TH: torch.Tensor,
    log_rate_H: torch.Tensor,
    rate_bias_H: torch.Tensor,
    state_NHKV: torch.Tensor,
    states_S: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
    query_lens: list[int],
    context_lens: list[int],
) -> torch.Tensor:
    """Triton form of `gated_delta_rule`: same arguments and result."""
    num_tokens, heads, value_dim = v_THV.shape
    key_heads, key_dim = q_TGK.shape[1:]
    out_THV = v_THV.new_empty(num_tokens, heads, value_dim)
    if num_tokens == 0:
        return out_THV
    for x_THD in (q_TGK, k_TGK, v_THV):
        assert x_THD.stride(2) == 1 and x_THD.stride(1) == x_THD.shape[2]
    assert a_TH.stride(1) == 1 and b_TH.stride(1) == 1 and state_NHKV[0].is_contiguous()
    pad_k, block_v, num_warps = _tile(key_dim, value_dim)
    _gated_delta_rule_kernel[triton.cdiv(value_dim, block_v), heads, len(query_lens)](
        q_TGK,
        k_TGK,
        v_THV,
        a_TH,
        b_TH,
        log_rate_H,
        rate_bias_H,
        state_NHKV,
        out_THV,
        states_S,
        query_start_S1,
        context_lens_S,
        q_TGK.stride(0),
        k_TGK.stride(0),
        v_THV.stride(0),
        a_TH.stride(0),
        b_TH.stride(0),
        state_NHKV.stride(0),
        key_dim**-0.5,
        HEADS=heads,
        SHARED=heads // key_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        EPS=1e-6,
        PAD_K=pad_k,
        BLOCK_V=block_v,
        num_warps=num_warps,
    )
    return out_THV


def _tile(key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """Returns the padded key dim, the values of a program and its warps: 32 numbers a thread.

    Few warps, because each token sums over the keys twice, one after the other.
    """
    pad_k = triton.next_power_of_2(key_dim)
    return pad_k, min(8, triton.next_power_of_2(value_dim)), max(1, pad_k // 128)


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: the heads of Qwen3-Next-80B."""

    def variant(name: str, dtype: torch.dtype, key_dim: int, value_dim: int) -> Variant:
        groups, heads = 16, 32
        keys, values = groups * key_dim, heads * value_dim

        def call(tokens: int) -> None:
            lens = [1] * (tokens // 2) + [tokens - tokens // 2]
            mixed_TC = meta(tokens, 2 * keys + values, dtype=dtype)
            q_TO, k_TO, v_TO = mixed_TC.split_with_sizes((keys, keys, values), dim=1)
            joint_TO = meta(tokens, 2 * keys + 2 * values + 2 * heads, dtype=dtype)
            b_TH, a_TH = joint_TO[:, -2 * heads :].split(heads, dim=1)
            gated_delta_rule_triton(
                q_TO.unflatten(1, (groups, -1)),
                k_TO.unflatten(1, (groups, -1)),
                v_TO.unflatten(1, (heads, -1)),
                a_TH,
                b_TH,
                meta(heads, dtype=torch.float32),
                meta(heads, dtype=torch.float32),
                meta(64, heads, key_dim, value_dim, dtype=torch.float32),
                meta(len(lens), dtype=torch.int64),
                meta(len(lens) + 1, dtype=torch.int32),
                meta(len(lens), dtype=torch.int32),
                lens,
                lens,
            )

        return Variant(f"{name} {heads} heads of {key_dim} by {value_dim}", call)

    for name, dtype in DTYPES.items():
        yield variant(name, dtype, 128, 128)
    yield variant("bf16", torch.bfloat16, 256, 256)
