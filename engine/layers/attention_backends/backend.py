"""Attention backend: the interface between a layer and the kernels that attend over its cache.

A backend is planned once per step, before the first layer runs (`plan_step`), and run once per
layer. Queries and cache are those of `ops/paged_attention.py`, whatever the kernels: keys and
values are [blocks, G, block_size, D], and a step's own are in the cache before a backend runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from engine.layers.step_inputs import Queries, StepTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """How a layer attends on this rank; layers of one kind share plans."""

    num_heads: int  # H, of the queries
    num_kv_heads: int  # G
    key_dim: int
    value_dim: int
    scale: float | None  # on the products of queries and keys; None: known when it runs
    window: int | None = None  # keys that a query attends to, its own included; None: all
    chunk: int | None = None  # of chunked attention; None: all keys
    has_sinks: bool = False
    is_latent: bool = False  # values are the first `value_dim` numbers of the keys (MLA)


class AttentionBackend(Protocol):
    """Kernels that attend over the paged cache."""

    name: str  # of attention.backend
    has_plans: bool  # whether `plan` does anything

    def plan(self, queries: Queries, kinds: tuple[AttentionKind, ...], slot: int) -> Any:
        """Prepare the kernels of a step; return what `run` finds in `Queries.plan`.

        Args:
            kinds: of the layers that attend with these queries, each once.
            slot: number of the queries among those that are in use at once.
        """
        ...

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
        ...


def plan_step(
    backend: AttentionBackend,
    kinds: tuple[AttentionKind, ...],
    step: StepTensors,
    micro_batch: int = 0,
) -> StepTensors:
    """Return the step with the backend's plans for its queries.

    Args:
        kinds: of the model's layers, in order.
        micro_batch: 0 or 1; both of a two-batch step are in use at once.
    """
    if not backend.has_plans or not step.token_ids_T.shape[0]:
        return step
    unique, slot = tuple(dict.fromkeys(kinds)), 2 * micro_batch
    queries = replace(step.queries, plan=backend.plan(step.queries, unique, slot))
    read = step.read
    if read is not None:  # only the last layer attends with these
        plan = backend.plan(read.queries, kinds[-1:], slot + 1)
        read = replace(read, queries=replace(read.queries, plan=plan))
    return replace(step, queries=queries, read=read)
