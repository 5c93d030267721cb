"""paged_attention on CUDA: one Triton kernel, launched for a step's decodes and for its prefills.

Where a step's block table is wider than SPLIT_KEYS tokens, programs of decodes have that many keys
each, and `merge_splits.py` merges them: few long sequences would leave most of a GPU idle. The cuts
are multiples of SPLIT_KEYS in every sequence, so its result does not depend on the others.

A program takes BLOCK_M rows of one sequence and one kv head, a row being a (query, head of the
group) pair, and walks the keys that those rows see with an online softmax. `paged_attention`
imports this file only where Triton and a CUDA tensor are at hand.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.float8_cache import FLOAT8, as_bytes, is_float8
from engine.ops.gpu.merge_splits import merge_splits
from engine.ops.gpu.unpack_rows import from_float8
from engine.ops.gpu.variants import DTYPES, Variant, meta
from engine.ops.paged_attention import SPLIT_KEYS


@triton.jit
def sequence_of(
    query_start_S1, base, num_sequences, block, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return the sequence of a block of BLOCK_M rows; a token is GROUP rows.

    Blocks of sequence s start at (rows before s) // BLOCK_M + s: room for every partial block
    without a table from the host. Finds the last sequence that starts at or before `block`; the
    first one starts at token `base`.
    """
    low, high = 0, num_sequences
    while low < high:
        middle = (low + high) // 2
        rows_before = (tl.load(query_start_S1 + middle) - base) * GROUP
        if rows_before // BLOCK_M + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


# What changes from step to step must not choose a kernel: compiling one stops every rank.
@triton.jit(
    do_not_specialize=[
        "first_sequence",
        "num_sequences",
        "window",
        "chunk",
        "table_row",
        "num_tokens",
    ],
    do_not_specialize_on_alignment=[
        "query_start_S1",
        "context_lens_S",
        "block_table_SB",
        "sinks_H",
    ],
)
def _paged_attention_kernel(
    q,
    k_cache,
    v_cache,
    out,
    query_start_S1,
    context_lens_S,
    block_table_SB,
    first_sequence,
    num_sequences,
    scale_log2,
    window,
    chunk,
    q_token,
    q_head,
    k_block,
    k_head,
    k_slot,
    v_block,
    v_head,
    v_slot,
    out_token,
    out_head,
    table_row,
    sinks_H,
    states,
    num_tokens,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_MAIN: tl.constexpr,
    KEY_REST: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
):
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    query_start_S1 += first_sequence
    base = tl.load(query_start_S1)
    sequence = sequence_of(query_start_S1, base, num_sequences, block, GROUP, BLOCK_M)
    start = tl.load(query_start_S1 + sequence)
    queries = tl.load(query_start_S1 + sequence + 1) - start
    first_row = (block - ((start - base) * GROUP // BLOCK_M + sequence)) * BLOCK_M
    rows = queries * GROUP
    if first_row >= rows:
        return
    sequence += first_sequence
    computed = tl.load(context_lens_S + sequence) - queries

    row_M = first_row + tl.arange(0, BLOCK_M)
    token_M = (start + row_M // GROUP).to(tl.int64)
    head_M = kv_head * GROUP + row_M % GROUP
    position_M = computed + row_M // GROUP
    exists_M1 = (row_M < rows)[:, None]
    # The head dimension in two powers of two: 576 = 512 + 64, not 1024.
    main_D = tl.arange(0, KEY_MAIN)
    q_M1 = q + (token_M * q_token + head_M * q_head)[:, None]
    q_main_MD = tl.load(
        q_M1 + main_D[None, :], mask=exists_M1 & (main_D < KEY_DIM)[None, :], other=0.0
    )
    if KEY_REST:
        rest_D = KEY_MAIN + tl.arange(0, KEY_REST)
        rest_1D = (rest_D < KEY_DIM)[None, :]
        q_rest_MD = tl.load(q_M1 + rest_D[None, :], mask=exists_M1 & rest_1D, other=0.0)
    value_D = tl.arange(0, VALUE_PAD)
    value_1D = (value_D < VALUE_DIM)[None, :]

    peak_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    last_row = tl.minimum(first_row + BLOCK_M, rows) - 1
    end = computed + last_row // GROUP + 1
    # The first key that a row sees; a window or chunk that reaches past position 0 hides none.
    first_M = tl.maximum(position_M - window + 1, position_M // chunk * chunk)
    top = computed + first_row // GROUP
    begin = tl.maximum(top - window + 1, top // chunk * chunk) // BLOCK_N * BLOCK_N
    if SPLIT_KEYS:
        split = tl.program_id(2)
        begin = tl.maximum(begin, split * SPLIT_KEYS)
        end = tl.minimum(end, (split + 1) * SPLIT_KEYS)
        if begin >= end:
            return
    for key in range(begin, end, BLOCK_N):
        key_N = key + tl.arange(0, BLOCK_N)
        loaded_N = key_N < end
        table_N = block_table_SB + sequence.to(tl.int64) * table_row + key_N // BLOCK_SIZE
        block_N = tl.load(table_N, mask=loaded_N, other=0).to(tl.int64)
        slot_N = key_N % BLOCK_SIZE
        k_1N = k_cache + (block_N * k_block + kv_head * k_head + slot_N * k_slot)[None, :]
        main_D1 = (main_D < KEY_DIM)[:, None]
        k_DN = tl.load(k_1N + main_D[:, None], mask=main_D1 & loaded_N[None, :], other=0)
        if IS_FLOAT8:
            k_DN = from_float8(k_DN).to(q_main_MD.dtype)
        scores_MN = tl.dot(q_main_MD, k_DN, input_precision="ieee")
        if KEY_REST:
            rest_D1 = (rest_D < KEY_DIM)[:, None]
            k_DN = tl.load(k_1N + rest_D[:, None], mask=rest_D1 & loaded_N[None, :], other=0)
            if IS_FLOAT8:
                k_DN = from_float8(k_DN).to(q_rest_MD.dtype)
            scores_MN += tl.dot(q_rest_MD, k_DN, input_precision="ieee")
        seen_MN = (key_N[None, :] <= position_M[:, None]) & (key_N[None, :] >= first_M[:, None])
        scores_MN = tl.where(seen_MN, scores_MN * scale_log2, float("-inf"))

        new_peak_M = tl.maximum(peak_M, tl.max(scores_MN, 1))
        # A row that has seen no key yet keeps -inf; its weights are taken against 0 and come out 0.
        base_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
        weights_MN = tl.exp2(scores_MN - base_M[:, None])
        shrink_M = tl.exp2(peak_M - base_M)
        sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
        v_N1 = v_cache + (block_N * v_block + kv_head * v_head + slot_N * v_slot)[:, None]
        v_ND = tl.load(v_N1 + value_D[None, :], mask=loaded_N[:, None] & value_1D, other=0)
        if IS_FLOAT8:
            v_ND = from_float8(v_ND).to(q_main_MD.dtype)
        acc_MD = acc_MD * shrink_M[:, None]
        acc_MD += tl.dot(weights_MN.to(v_ND.dtype), v_ND, input_precision="ieee")
        peak_M = new_peak_M

    if SPLIT_KEYS:
        # Sums of this part of the keys; `merge_splits.py` divides by those of all parts.
        at_M = (split.to(tl.int64) * num_tokens + token_M) * (tl.num_programs(1) * GROUP) + head_M
        parts_MD = out + at_M[:, None] * VALUE_DIM + value_D[None, :]
        tl.store(parts_MD, acc_MD, mask=exists_M1 & value_1D)
        tl.store(states + 2 * at_M, peak_M, mask=row_M < rows)
        tl.store(states + 2 * at_M + 1, sum_M, mask=row_M < rows)
        return
    if HAS_SINKS:
        # A sink far above every score leaves a sum of 2^126: quotients of 0, and no overflow.
        sink_M = tl.load(sinks_H + head_M) * 1.4426950408889634
        above_M = sink_M - tl.where(peak_M == float("-inf"), 0.0, peak_M)
        sum_M += tl.exp2(tl.where(above_M > 126.0, 126.0, above_M))
    out_MD = out + (token_M * out_token + head_M * out_head)[:, None] + value_D[None, :]
    # Rows past the last one saw no key: their sum is 0 and they are not stored.
    result_MD = acc_MD / tl.where(sum_M == 0.0, 1.0, sum_M)[:, None]
    tl.store(out_MD, result_MD.to(out.dtype.element_ty), mask=exists_M1 & value_1D)


def paged_attention_triton(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
    block_table_SB: torch.Tensor,
    *,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
    window: int | None,
    sinks_H: torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Triton form of `paged_attention`: same arguments and result; needs no copy to the host."""
    num_tokens, num_heads, key_dim = q_THD.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    value_dim = v_cache.shape[3]
    out_THD = q_THD.new_empty(num_tokens, num_heads, value_dim)
    if num_tokens == 0:
        return out_THD
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    assert k_cache.stride(3) == 1 and v_cache.stride(3) == 1 and block_table_SB.stride(1) == 1
    group = num_heads // num_kv_heads
    # tl.dot wants at least 16 of everything; wide heads and float32 leave room for fewer.
    wide, single = max(key_dim, value_dim) > 256, q_THD.dtype == torch.float32
    prefill_m = 16 if wide else 32 if single else 64
    block_n = 32 if wide or single else 64
    main = max(16, 1 << (key_dim.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(key_dim - main)) if key_dim > main else 0
    # Decodes come first in a step. With the tiles of a prefill few of their programs fit on a GPU.
    splits = -(-block_table_SB.shape[1] * block_size // SPLIT_KEYS)
    if splits > 1:
        decodes = _leading_decodes(query_lens, max(1, 16 // group))
    elif prefill_m == 16:
        decodes = len(query_lens)
    else:
        decodes = _leading_decodes(query_lens, 16 // group)
    for first, last, block_m in ((0, decodes, 16), (decodes, len(query_lens), prefill_m)):
        if first == last:
            continue
        tokens = sum(query_lens[first:last])
        is_split = splits > 1 and last == decodes
        grid = (tokens * group // block_m + last - first, num_kv_heads, splits if is_split else 1)
        to, states = out_THD, out_THD
        if is_split:
            shape = (splits, tokens, num_heads)
            to = q_THD.new_empty((*shape, value_dim), dtype=torch.float32)
            states = q_THD.new_empty((*shape, 2), dtype=torch.float32)
        value_pad = max(16, triton.next_power_of_2(value_dim))
        _paged_attention_kernel[grid](
            q_THD,
            as_bytes(k_cache),
            as_bytes(v_cache),
            to,
            query_start_S1,
            context_lens_S,
            block_table_SB,
            first,
            last - first,
            scale * 1.4426950408889634,
            window if window is not None else 2**30,
            chunk if chunk is not None else 2**30,
            q_THD.stride(0),
            q_THD.stride(1),
            k_cache.stride(0),
            k_cache.stride(1),
            k_cache.stride(2),
            v_cache.stride(0),
            v_cache.stride(1),
            v_cache.stride(2),
            out_THD.stride(0),
            out_THD.stride(1),
            block_table_SB.stride(0),
            query_start_S1 if sinks_H is None else sinks_H,
            states,
            tokens,
            GROUP=group,
            BLOCK_SIZE=block_size,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            KEY_MAIN=main,
            KEY_REST=rest,
            VALUE_PAD=value_pad,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            HAS_SINKS=sinks_H is not None,
            IS_FLOAT8=is_float8(k_cache),
            SPLIT_KEYS=SPLIT_KEYS if is_split else 0,
            num_warps=8 if wide else 4,
            num_stages=1 if wide else 2,
        )
        if is_split:
            merge_splits(
                to,
                states,
                out_THD,
                query_start_S1,
                context_lens_S,
                sinks_H,
                last,
                window,
                chunk,
                SPLIT_KEYS,
            )
    return out_THD


def _leading_decodes(query_lens: list[int], most: int) -> int:
    """Return how many of the first sequences have at most `most` queries each."""
    for index, queries in enumerate(query_lens):
        if queries > most:
            return index
    return len(query_lens)


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: decode and prefill with the usual heads, a latent cache, both."""

    def variant(
        label: str,
        dtype: str,
        queries: list[int],
        heads: int,
        kv_heads: int,
        dim: int,
        sinks: bool = False,
        float8: bool = False,
        context: int = 0,
    ) -> Variant:
        def call(num: int) -> None:
            query_lens = queries[:1] * num + queries[1:]
            sequences = len(query_lens)
            longest = context + min(16 * num, 1024) + max(queries)
            kind = DTYPES[dtype]
            held = FLOAT8 if float8 else kind
            cache = meta(256, kv_heads, 16, dim, dtype=held)
            latent = dim == 576
            paged_attention_triton(
                meta(sum(query_lens), heads, dim, dtype=kind),
                cache,
                cache[..., :512] if latent else meta(256, kv_heads, 16, dim, dtype=held),
                meta(sequences + 1, dtype=torch.int32),
                meta(sequences, dtype=torch.int32),
                meta(sequences, -(-longest // 16), dtype=torch.int32),
                query_lens=query_lens,
                context_lens=[longest] * sequences,
                scale=dim**-0.5,
                window=None,
                sinks_H=meta(heads, dtype=torch.float32) if sinks else None,
            )

        return Variant(f"{dtype} {label}", call)

    for dtype in DTYPES:
        yield variant("decode, group 4, head 128", dtype, [1], 32, 8, 128)
        yield variant("prefill, group 4, head 128", dtype, [300], 32, 8, 128)
        yield variant("latent 576, 16 heads", dtype, [1], 16, 1, 576)
    yield variant("decode and prefill, group 8, head 128", "bf16", [1, 300], 32, 4, 128)
    yield variant("decode, group 20, head 128", "bf16", [1], 20, 1, 128)
    yield variant("latent 576, 128 heads", "bf16", [1], 128, 1, 576)
    yield variant("decode and prefill, group 8, head 64, sinks", "bf16", [1, 300], 64, 8, 64, True)
    for dim, heads in ((128, 8), (576, 1)):
        name = f"decode, split keys, head {dim}"
        yield variant(name, "bf16", [1], 32, heads, dim, context=2 * SPLIT_KEYS)
    for label, queries in (("decode", [1]), ("prefill", [300])):
        name = f"{label}, group 4, head 128, cache in float8"
        yield variant(name, "bf16", queries, 32, 8, 128, float8=True)
    yield variant("latent 576, 16 heads, cache in float8", "bf16", [1], 16, 1, 576, float8=True)
    for head in (64, 80, 256):
        yield variant(f"prefill, group 1, head {head}", "bf16", [300], 16, 16, head)
