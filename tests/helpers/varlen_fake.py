"""A stand-in for torch's varlen_attn on any device: its signature, the result of the reference."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from engine.ops.paged_attention import paged_attention_reference


def varlen_attn(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Attend over a paged cache as the installed torch's function of that name does on CUDA."""
    from torch.nn.attention.varlen import varlen_attn as real

    given = inspect.signature(real).bind(*args, **kwargs).arguments
    q, starts, contexts = given["query"], given["cu_seq_q"], given["seqused_k"]
    k, v = given["key"].transpose(1, 2), given["value"].transpose(1, 2)
    assert given["cu_seq_k"] is None and starts.dtype == contexts.dtype == torch.int32
    assert given["enable_gqa"] == (q.shape[1] != k.shape[1]) and given["num_splits"] == 1
    query_lens, context_lens = (starts[1:] - starts[:-1]).tolist(), contexts.tolist()
    assert starts[0] == 0 and starts[-1] == q.shape[0]
    assert (max(query_lens), max(context_lens)) == (given["max_q"], given["max_k"])
    left, right = given["window_size"]
    assert right == 0
    return paged_attention_reference(
        q,
        k,
        v,
        starts,
        contexts,
        given["block_table"],
        query_lens=query_lens,
        context_lens=context_lens,
        scale=given["scale"],
        window=None if left < 0 else left + 1,
    )
