"""Causal attention of a ragged step (decode and prefill together) over the paged KV cache.

The keys and values of this step's own tokens are already in the cache (store_kv runs first), so a
sequence is one query range and one block table, whatever mixture of decode and prefill it is. With
the compiled CPU kernel a token's output is the same bits in prefill, chunked prefill and decode.

Legend: T query tokens of the step, S sequences, H query heads, G kv heads (H = G * n), Dk/Dv head
dims, B columns of the block table.
"""

import torch

from engine.ops import native, triton_support
from engine.ops.float8_cache import is_float8, widened

# Keys of a program on CUDA where a step's block table is wider; a multiple of every tile.
SPLIT_KEYS = 2048


def paged_attention(
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
    """Returns softmax(q k^T * scale) v for every query token: [T, H, Dv], in q's dtype.

    q_THD [T, H, Dk] holds sequence s in rows query_start_S1[s] .. query_start_S1[s + 1] (int32);
    they are the last query_lens[s] positions of a context of context_lens[s] tokens. k_cache is
    [num_blocks, G, block_size, Dk], v_cache [num_blocks, G, block_size, Dv], either may be a
    strided view; block_table_SB (int32) lists each context's blocks in order. A query at position
    p sees keys 0 .. p, or p - window + 1 .. p with a window; with a chunk, of these only the ones
    of its own chunk, p - p % chunk .. p (chunked attention). The two lists are the host copies of
    the two tensors. T and S may be 0. sinks_H (float32) are logits that take part in their head's
    softmax as a key without a value would, in every window. Caches may be in float8.
    """
    on_triton = triton_support.serves(q_THD)
    if is_float8(k_cache) and not on_triton:
        k_cache, v_cache, block_table_SB = widened(k_cache, v_cache, block_table_SB, q_THD.dtype)
    if native.serves(q_THD, k_cache, v_cache):
        return torch.ops.lockstep_cpu.paged_attention(
            q_THD,
            k_cache,
            v_cache,
            block_table_SB,
            query_lens,
            context_lens,
            scale,
            window or 0,
            sinks_H,
            chunk or 0,
        )
    attend = paged_attention_reference
    if on_triton:
        from engine.ops.gpu.paged_attention import paged_attention_triton as attend
    return attend(
        q_THD,
        k_cache,
        v_cache,
        query_start_S1,
        context_lens_S,
        block_table_SB,
        query_lens=query_lens,
        context_lens=context_lens,
        scale=scale,
        window=window,
        sinks_H=sinks_H,
        chunk=chunk,
    )


def paged_attention_reference(
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
    """Plain torch form of `paged_attention`: one dense masked softmax a sequence."""
    if is_float8(k_cache):
        k_cache, v_cache, block_table_SB = widened(k_cache, v_cache, block_table_SB, q_THD.dtype)
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    group = q_THD.shape[1] // num_kv_heads
    out_THD = q_THD.new_empty(q_THD.shape[0], q_THD.shape[1], v_cache.shape[3])
    start = 0
    for sequence, (queries, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        blocks = block_table_SB[sequence, : -(-context // block_size)].long()
        # [blocks, G, block_size, D] -> [G, context, D] -> [H, context, D]
        k_HCD = k_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
        v_HCD = v_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
        k_HCD, v_HCD = k_HCD.repeat_interleave(group, 0), v_HCD.repeat_interleave(group, 0)
        q_HQD = q_THD[start : start + queries].transpose(0, 1)
        scores_HQC = torch.matmul(q_HQD.float(), k_HCD.float().transpose(1, 2)) * scale
        position_Q1 = torch.arange(context - queries, context, device=q_THD.device)[:, None]
        key_1C = torch.arange(context, device=q_THD.device)[None]
        hidden_QC = key_1C > position_Q1
        if window is not None:
            hidden_QC |= key_1C <= position_Q1 - window
        if chunk is not None:
            hidden_QC |= key_1C < position_Q1 - position_Q1 % chunk
        scores_HQC = scores_HQC.masked_fill(hidden_QC, float("-inf"))
        if sinks_H is not None:
            sinks_HQ1 = sinks_H.float()[:, None, None].expand(-1, queries, 1)
            scores_HQC = torch.cat((scores_HQC, sinks_HQ1), dim=-1)
        weights_HQC = scores_HQC.softmax(-1)[..., :context]
        out_HQD = torch.matmul(weights_HQC, v_HCD.float())
        out_THD[start : start + queries] = out_HQD.transpose(0, 1).to(q_THD.dtype)
        start += queries
    return out_THD
