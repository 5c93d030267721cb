"""torch's varlen_attn over block tables as a backend: FlashAttention 2 or 3 as torch has them.

Torch 2.13 is the first with block tables. Its FlashAttention 2 takes blocks of a multiple of 256
tokens, FlashAttention 3, which torch has to be told to use, smaller ones. Not run on a GPU yet.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from engine.layers.attention_backends.backend import AttentionKind
from engine.layers.attention_backends.parts import Part, parts_of
from engine.layers.step_inputs import Queries

_BLOCK = 256
Plan = list[tuple[Part, torch.Tensor, int, int]]  # starts of queries, longest query and context


def is_installed() -> bool:
    """Whether this torch has varlen_attn with block tables."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "block_table" in inspect.signature(varlen_attn).parameters


def refusal(
    kind: AttentionKind, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
) -> str | None:
    """Return why varlen_attn does not serve such a layer; None: it does."""
    if kind.scale is None:
        return "transformers builds the model, whose layers name their scale only as they run"
    if dtype not in (torch.bfloat16, torch.float16):
        computes = str(dtype).removeprefix("torch.")
        return f"it computes in bfloat16 and float16, and the model in {computes}"
    if kv_dtype is not dtype:
        return "it reads no cache in float8; use scheduler.kv_dtype = auto"
    if kind.is_latent:
        return "it has no MLA, whose keys are wider than its values"
    if kind.has_sinks:
        return "it has no attention sinks"
    if kind.chunk is not None:
        return "it has no chunked attention"
    if kind.key_dim > 256 or kind.key_dim % 8:
        return f"it has heads of at most 256, in multiples of 8, and a layer {kind.key_dim}"
    if block_size % _BLOCK and not _has_flash_attention_3():
        return (
            f"its FlashAttention 2 takes blocks of multiples of {_BLOCK} tokens; set "
            f"scheduler.block_size = {_BLOCK}"
        )
    return None


def _has_flash_attention_3() -> bool:
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current is not None and current() == "FA3"


class VarlenAttention:
    """torch.nn.attention.varlen.varlen_attn; function: what is called instead of it."""

    name, has_plans = "varlen", True

    def __init__(self, function: Any = None) -> None:
        if function is None:
            from torch.nn.attention.varlen import varlen_attn as function
        self._attend = function

    def plan(self, queries: Queries, kinds: tuple[AttentionKind, ...], slot: int) -> Plan:
        """Return the step's decodes and prefills, with the starts of their queries."""
        plan = []
        for part in parts_of(queries):
            starts = queries.query_start_S1[part.first : part.last + 1]
            if part.start:
                starts = starts - part.start
            longest = max(queries.query_lens[part.first : part.last])
            plan.append((part, starts, longest, max(queries.context_lens[part.first : part.last])))
        return plan

    def run(
        self,
        kind: AttentionKind,
        q_THD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        queries: Queries,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention of every query token, [T, H, Dv], in q's dtype."""
        assert sinks_H is None and queries.plan is not None
        plan: Plan = queries.plan
        outs = [
            self._attend(
                q_THD[part.start : part.end],
                k_cache.transpose(1, 2),
                v_cache.transpose(1, 2),
                starts,
                None,
                max_q,
                max_k,
                scale=kind.scale,
                # The left end counts the keys before a query's own.
                window_size=(-1 if kind.window is None else kind.window - 1, 0),
                enable_gqa=kind.num_heads != kind.num_kv_heads,
                seqused_k=queries.context_lens_S[part.first : part.last],
                block_table=queries.block_table_SB[part.first : part.last],
                num_splits=1,  # or a sequence's result would depend on the others of its step
            )
            for part, starts, max_q, max_k in plan
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)
