"""This engine's own kernels: compiled ones on the CPU, Triton on CUDA, else plain torch.

They serve every layer in every dtype, and need no plan.
"""

from __future__ import annotations

import torch

from engine.layers.attention_backends.backend import AttentionKind
from engine.layers.step_inputs import Queries
from engine.ops.paged_attention import paged_attention


class PagedKernels:
    """`ops/paged_attention.py` as a backend."""

    name, has_plans = "triton", False

    def plan(self, queries: Queries, kinds: tuple[AttentionKind, ...], slot: int) -> None:
        """Do nothing: the kernels read lengths and block tables themselves."""

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
        assert kind.scale is not None
        return paged_attention(
            q_THD,
            k_cache,
            v_cache,
            queries.query_start_S1,
            queries.context_lens_S,
            queries.block_table_SB,
            query_lens=queries.query_lens,
            context_lens=queries.context_lens,
            scale=kind.scale,
            window=kind.window,
            sinks_H=sinks_H,
            chunk=kind.chunk,
        )


PAGED_KERNELS = PagedKernels()  # has no state
