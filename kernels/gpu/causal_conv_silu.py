"""causal_conv_silu on CUDA: one Triton program per (run of tokens of a sequence, run of channels).

The program of a sequence's first tokens is the only one that reads its state, and replaces it at
its end. `causal_conv` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.paged_attention import sequence_of
from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit(
    do_not_specialize=["num_sequences"],
    do_not_specialize_on_alignment=["states_S", "query_start_S1", "context_lens_S"],
)
def _causal_conv_silu_kernel(
    x,
    weight,
    state,
    out,
    states_S,
    query_start_S1,
    context_lens_S,
    num_sequences,
    channels,
    x_token,
    state_row,
    PAST: tl.constexpr,
    PAST_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    sequence = sequence_of(query_start_S1, 0, num_sequences, block, 1, TOKENS)
    start = tl.load(query_start_S1 + sequence)
    length = tl.load(query_start_S1 + sequence + 1) - start
    first = (block - (start // TOKENS + sequence)) * TOKENS
    if first >= length:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < channels
    token_C = x + (start + first).to(tl.int64) * x_token + column  # of the token at `offset`
    out_C = out + (start + first).to(tl.int64) * channels + column
    weight += column * (PAST + 1)
    state += tl.load(states_S + sequence) * state_row
    has_past = tl.load(context_lens_S + sequence) > length
    for offset in range(first, tl.minimum(first + TOKENS, length)):
        x_C = tl.load(token_C, mask=exists, other=0.0).to(tl.float32)
        sum_C = x_C * tl.load(weight + PAST, mask=exists, other=0.0).to(tl.float32)
        for back in tl.static_range(1, PAST + 1):
            here = offset >= back
            here_C = tl.load(token_C - back * x_token, mask=exists & here, other=0.0)
            from_C = state + (offset + (PAST - back)) * channels + column
            old_C = tl.load(from_C, mask=exists & has_past & (offset < back), other=0.0)
            input_C = tl.where(here, here_C.to(tl.float32), old_C.to(tl.float32))
            tap_C = tl.load(weight + (PAST - back), mask=exists, other=0.0)
            sum_C += input_C * tap_C.to(tl.float32)
        silu_C = sum_C / (1.0 + tl.exp(-sum_C))
        tl.store(out_C, silu_C.to(out.dtype.element_ty), mask=exists)
        token_C += x_token
        out_C += channels
    if PAST > 0:
        if first == 0:
            # Row r of the new state is place length + r of the old one followed by the tokens.
            row_P1 = tl.arange(0, PAST_PAD)[:, None]
            place_P1, exists_PC = length + row_P1, (row_P1 < PAST) & exists[None, :]
            is_new_P1 = place_P1 >= PAST
            old_PC = tl.load(
                state + place_P1 * channels + column[None, :],
                mask=exists_PC & has_past & (place_P1 < PAST),
                other=0.0,
            )
            new_PC = tl.load(
                x + (start + place_P1 - PAST).to(tl.int64) * x_token + column[None, :],
                mask=exists_PC & is_new_P1,
                other=0.0,
            )
            state_PC = tl.where(is_new_P1, new_PC.to(old_PC.dtype), old_PC)
            tl.debug_barrier()  # no warp writes what another has yet to read
            tl.store(state + row_P1 * channels + column[None, :], state_PC, mask=exists_PC)


def causal_conv_silu_triton(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    state_NVC: torch.Tensor,
    states_S: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
) -> torch.Tensor:
    """Triton form of `causal_conv_silu`: same arguments and result."""
    (num_tokens, channels), past = x_TC.shape, weight_CW.shape[1] - 1
    out_TC = x_TC.new_empty(num_tokens, channels)
    if num_tokens == 0:
        return out_TC
    x_TC = x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()
    assert weight_CW.is_contiguous() and state_NVC[0].is_contiguous()
    num_sequences, past_pad = states_S.shape[0], triton.next_power_of_2(max(past, 1))
    tokens = max(16, past_pad)  # at least the past: only the first program reads the state
    block, num_warps = _tile(channels)
    grid = (num_tokens // tokens + num_sequences, triton.cdiv(channels, block))
    _causal_conv_silu_kernel[grid](
        x_TC,
        weight_CW,
        state_NVC,
        out_TC,
        states_S,
        query_start_S1,
        context_lens_S,
        num_sequences,
        channels,
        x_TC.stride(0),
        state_NVC.stride(0),
        PAST=past,
        PAST_PAD=past_pad,
        TOKENS=tokens,
        BLOCK=block,
        num_warps=num_warps,
    )
    return out_TC


def _tile(channels: int) -> tuple[int, int]:
    """Returns the channels of a program and its warps: 8 channels a thread, 16 bytes in bf16."""
    block = min(512, triton.next_power_of_2(channels))
    return block, max(1, block // 256)


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: the channels of Qwen3-Next-80B on one rank and on four."""

    def variant(name: str, channels: int, rest: int) -> Variant:
        dtype = DTYPES[name]

        def call(tokens: int) -> None:
            sequences = -(-tokens // 2)
            causal_conv_silu_triton(
                meta(tokens, channels + rest, dtype=dtype)[:, :channels],
                meta(channels, 4, dtype=dtype),
                meta(64, 3, channels, dtype=dtype),
                meta(sequences, dtype=torch.int64),
                meta(sequences + 1, dtype=torch.int32),
                meta(sequences, dtype=torch.int32),
            )

        return Variant(f"{name} {channels} channels, 4 taps", call)

    for name in DTYPES:
        yield variant(name, 8192, 4160)
    yield variant("bf16", 2048, 1040)
