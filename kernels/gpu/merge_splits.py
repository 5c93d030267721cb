"""The second half of attention over split keys: one Triton program merges the parts of a (token,
head) and divides.

Source: Dao, Haziza, Massa and Sizov, Flash-Decoding for long-context inference, 2023.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta


@triton.jit(
    do_not_specialize=["num_sequences", "num_tokens", "window", "chunk"],
    do_not_specialize_on_alignment=["query_start_S1", "context_lens_S", "sinks_H"],
)
def _merge_splits_kernel(
    parts,
    states,
    out,
    query_start_S1,
    context_lens_S,
    sinks_H,
    num_sequences,
    num_tokens,
    window,
    chunk,
    out_token,
    out_head,
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    low, high = 0, num_sequences
    while low < high:  # the last sequence that starts at or before the token
        middle = (low + high) // 2
        if tl.load(query_start_S1 + middle) <= token:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1
    after = tl.load(query_start_S1 + sequence + 1) - token
    position = (tl.load(context_lens_S + sequence) - after).to(tl.int32)
    first = tl.maximum(tl.maximum(position - window + 1, position // chunk * chunk), 0)
    value_D = tl.arange(0, VALUE_PAD)
    peak = float("-inf")
    total = 0.0
    acc_D = tl.zeros([VALUE_PAD], tl.float32)
    # The parts that hold keys of this token, in order: the same ones whatever the step holds.
    for split in range(first // SPLIT_KEYS, position // SPLIT_KEYS + 1):
        at = (split * num_tokens + token) * NUM_HEADS + head
        own_peak, own_total = tl.load(states + 2 * at), tl.load(states + 2 * at + 1)
        own_D = tl.load(parts + at * VALUE_DIM + value_D, mask=value_D < VALUE_DIM, other=0.0)
        new_peak = tl.maximum(peak, own_peak)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink, own_shrink = tl.exp2(peak - base), tl.exp2(own_peak - base)
        acc_D = acc_D * shrink + own_D * own_shrink
        total = total * shrink + own_total * own_shrink
        peak = new_peak
    if HAS_SINKS:  # as in `_paged_attention_kernel`
        above = tl.load(sinks_H + head) * 1.4426950408889634
        above -= tl.where(peak == float("-inf"), 0.0, peak)
        total += tl.exp2(tl.where(above > 126.0, 126.0, above))
    result_D = (acc_D / tl.where(total == 0.0, 1.0, total)).to(out.dtype.element_ty)
    tl.store(
        out + token * out_token + head * out_head + value_D, result_D, mask=value_D < VALUE_DIM
    )


def merge_splits(
    parts: torch.Tensor,
    states: torch.Tensor,
    out_THD: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
    sinks_H: torch.Tensor | None,
    num_sequences: int,
    window: int | None,
    chunk: int | None,
    split_keys: int,
) -> None:
    """Write the attention of the step's first tokens.

    Args:
        parts: float32 [splits, T, H, Dv], sums of values by weight; those of parts without keys of
            a token are not read.
        states: float32 [splits, T, H, 2], largest score and sum of weights.
        out_THD: its first T rows are written.
        num_sequences: those of the T tokens.
        split_keys: keys per part.
    """
    _, tokens, heads, value_dim = parts.shape
    _merge_splits_kernel[tokens, heads](
        parts,
        states,
        out_THD,
        query_start_S1,
        context_lens_S,
        query_start_S1 if sinks_H is None else sinks_H,
        num_sequences,
        tokens,
        window if window is not None else 2**30,
        chunk if chunk is not None else 2**30,
        out_THD.stride(0),
        out_THD.stride(1),
        NUM_HEADS=heads,
        VALUE_DIM=value_dim,
        VALUE_PAD=triton.next_power_of_2(value_dim),
        HAS_SINKS=sinks_H is not None,
        SPLIT_KEYS=split_keys,
    )


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: heads of 128, and a latent of 512."""

    def variant(heads: int, dim: int, sinks: bool) -> Variant:
        def call(num: int) -> None:
            merge_splits(
                meta(2 + num, num, heads, dim, dtype=torch.float32),
                meta(2 + num, num, heads, 2, dtype=torch.float32),
                meta(num, heads, dim),
                meta(num + 1, dtype=torch.int32),
                meta(num, dtype=torch.int32),
                meta(heads, dtype=torch.float32) if sinks else None,
                num,
                None,
                None,
                2048,
            )

        return Variant(f"bf16 {heads} heads of {dim}" + (", sinks" if sinks else ""), call)

    yield variant(32, 128, False)
    yield variant(64, 64, True)
    yield variant(128, 512, False)
