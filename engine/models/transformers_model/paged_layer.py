"""Paged layer: the attention of one layer of transformers' model, over the paged cache.

Legend: T tokens of the step, H and G query and key/value heads, Dk and Dv head dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from engine.models.transformers_model.routed_experts import RunningStep
from engine.ops.paged_attention import paged_attention
from engine.ops.store_kv import store_kv


class PagedLayer:
    """Stores a step's keys and values and attends over the cache.

    Args:
        layer: index.
        window: keys that a query attends to; None: all.
        running: shared by the layers of a model.
    """

    def __init__(self, layer: int, window: int | None, running: RunningStep) -> None:
        self._layer, self._window, self._running = layer, window, running

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        scaling: float,
        arguments: Mapping[str, Any],
    ) -> torch.Tensor:
        """Return the attention's output, [1, T, H, Dv].

        Args:
            query: [1, H, T, Dk].
            key: [1, G, T, Dk].
            value: [1, G, T, Dv].
            mask: None: the window is known.
            scaling: of the products of queries and keys.
            arguments: of the call; s_aux is read, a logit per head.
        """
        step, kv = self._running.step, self._running.kv
        assert step is not None and kv is not None and mask is None
        k_cache, v_cache = kv.keys[self._layer], kv.values[self._layer]
        if key.shape[1] < k_cache.shape[1]:  # the cache has the heads of the layer with most
            k_cache, v_cache = k_cache[:, : key.shape[1]], v_cache[:, : key.shape[1]]
        k_TGD, v_TGD = (each[0].transpose(0, 1).contiguous() for each in (key, value))
        store_kv(k_TGD, v_TGD, k_cache, v_cache, step.slots_T)
        sinks_H = arguments.get("s_aux")
        queries = step.queries
        out_THD = paged_attention(
            query[0].transpose(0, 1).contiguous(),
            k_cache,
            v_cache,
            queries.query_start_S1,
            queries.context_lens_S,
            queries.block_table_SB,
            query_lens=queries.query_lens,
            context_lens=queries.context_lens,
            scale=scaling,
            window=self._window,
            sinks_H=None if sinks_H is None else sinks_H.float(),
        )
        return out_THD[None]
