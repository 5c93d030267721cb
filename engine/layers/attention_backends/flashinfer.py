"""FlashInfer's kernels as a backend: its paged wrappers of decode, prefill and MLA.

A wrapper is planned on the host once per step and layer kind, and run once per layer. Layers of one
kind share a wrapper; queries that are in use at once have their own. Call arguments are those of
flashinfer-python 0.7.4, kept in tests/helpers/flashinfer_signatures.json. Not run on a GPU yet.

FlashInfer splits long sequences by what the whole step holds, so the last bits of a sequence's
result may depend on the others in its step.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from engine.layers.attention_backends.backend import AttentionKind
from engine.layers.attention_backends.parts import Part, pages_of, parts_of
from engine.layers.step_inputs import Queries

_WORKSPACE = 128 << 20  # bytes, what FlashInfer's documentation recommends
_HEAD_DIMS = (64, 128, 256)
_LATENT = (512, 64)  # latent and rotary dims of its MLA kernels
Plan = dict[AttentionKind, list[tuple[Part, Any]]]  # the wrappers of a layer kind, by part


def is_installed() -> bool:
    """Whether FlashInfer is there; it is imported only where it is used."""
    return importlib.util.find_spec("flashinfer") is not None


def refusal(kind: AttentionKind, dtype: torch.dtype, kv_dtype: torch.dtype) -> str | None:
    """Return why FlashInfer does not serve such a layer; None: it does."""
    if kind.scale is None:
        return "transformers builds the model, whose layers name their scale only as they run"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, and the model in {_name(dtype)}"
    if kind.has_sinks:
        return "its paged kernels are called without attention sinks"
    if kind.chunk is not None:
        return "it has no chunked attention"
    if kind.is_latent:
        rotary = kind.key_dim - kind.value_dim
        if kv_dtype is not dtype:
            return f"its MLA kernels are called with a cache in {_name(dtype)}"
        if (kind.value_dim, rotary) != _LATENT:
            own = f"{kind.value_dim} + {rotary}"
            return f"its MLA kernels have a latent of 512 + 64, and a layer {own}"
        return None
    if kind.key_dim != kind.value_dim or kind.key_dim not in _HEAD_DIMS:
        return f"it has heads of 64, 128 and 256, and a layer {kind.key_dim}"
    return None


class FlashInferAttention:
    """FlashInfer's paged wrappers.

    Args:
        device: of the cache.
        dtype, kv_dtype: of the queries, and of the cache.
        block_size: of the cache.
        library: FlashInfer's module; None: import it.
    """

    name, has_plans = "flashinfer", True

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        block_size: int,
        library: Any = None,
    ) -> None:
        self._library = library or importlib.import_module("flashinfer")
        self._mla = self._library.mla if library else importlib.import_module("flashinfer.mla")
        self._dtype, self._kv_dtype, self._block_size = dtype, kv_dtype, block_size
        # Zeroed: FlashInfer keeps counters of its split products there.
        self._workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
        self._wrappers: dict[tuple[AttentionKind, int, bool], Any] = {}

    def plan(self, queries: Queries, kinds: tuple[AttentionKind, ...], slot: int) -> Plan:
        """Plan the wrappers of every layer kind for a step's decodes and prefills."""
        plans: Plan = {kind: [] for kind in kinds}
        for part in parts_of(queries):
            pages = pages_of(queries, part, self._block_size)
            lens = [0, *queries.query_lens[part.first : part.last]]
            starts_S1 = torch.tensor(lens, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            for kind, planned in plans.items():
                wrapper = self._wrapper(kind, slot, part.is_decode)
                shared = {
                    "sm_scale": kind.scale,
                    "q_data_type": self._dtype,
                    "kv_data_type": self._kv_dtype,
                }
                if kind.is_latent:
                    wrapper.plan(
                        qo_indptr=starts_S1,
                        kv_indptr=pages.indptr_S1,
                        kv_indices=pages.indices,
                        kv_len_arr=pages.context_lens_S,
                        num_heads=kind.num_heads,
                        head_dim_ckv=kind.value_dim,
                        head_dim_kpe=kind.key_dim - kind.value_dim,
                        page_size=self._block_size,
                        causal=True,
                        **shared,
                    )
                    planned.append((part, wrapper))
                    continue
                # The left end of a window counts the keys before a query's own.
                shared["window_left"] = -1 if kind.window is None else kind.window - 1
                layout = (pages.indptr_S1, pages.indices, pages.last_len_S)
                heads = (kind.num_heads, kind.num_kv_heads, kind.key_dim, self._block_size)
                if part.is_decode:
                    wrapper.plan(*layout, *heads, **shared)
                else:
                    wrapper.plan(starts_S1, *layout, *heads, causal=True, **shared)
                planned.append((part, wrapper))
        return plans

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
        out_THD = q_THD.new_empty(q_THD.shape[0], kind.num_heads, kind.value_dim)
        plan: Plan = queries.plan
        for part, wrapper in plan[kind]:
            q, out = q_THD[part.start : part.end], out_THD[part.start : part.end]
            if kind.is_latent:
                split = kind.value_dim
                wrapper.run(
                    q_nope=q[..., :split],
                    q_pe=q[..., split:],
                    ckv_cache=k_cache[:, 0, :, :split],
                    kpe_cache=k_cache[:, 0, :, split:],
                    out=out,
                )
            else:
                wrapper.run(q, (k_cache, v_cache), out=out)
        return out_THD

    def _wrapper(self, kind: AttentionKind, slot: int, is_decode: bool) -> Any:
        """Return the wrapper of a layer kind, made at its first use."""
        key = (kind, slot, is_decode)
        if key not in self._wrappers:
            workspace = self._workspace
            if kind.is_latent:
                made = self._mla.BatchMLAPagedAttentionWrapper(workspace)
            elif is_decode:
                # Tensor cores pay where several query heads share a key head.
                made = self._library.BatchDecodeWithPagedKVCacheWrapper(
                    workspace,
                    kv_layout="HND",
                    use_tensor_cores=kind.num_heads // kind.num_kv_heads >= 4,
                    backend="fa2",
                )
            else:  # a cache in float8 under queries of 16 bits: its FlashAttention 2 kernels alone
                backend = "auto" if self._kv_dtype is self._dtype else "fa2"
                made = self._library.BatchPrefillWithPagedKVCacheWrapper(
                    workspace, kv_layout="HND", backend=backend
                )
            self._wrappers[key] = made
        return self._wrappers[key]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
