"""A stand-in for FlashInfer in one process: its signatures, and results of the plain reference.

Every call is bound to the signature that the library's wheel has (flashinfer_signatures.json:
version and date), so an argument that it would not take fails here. Lengths and pages are taken
from what was planned, as the library takes them.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from engine.ops.paged_attention import paged_attention_reference

RECORD = json.loads(Path(__file__).with_name("flashinfer_signatures.json").read_text())


def bound(method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name.

    Raises:
        TypeError: the method does not take them.
    """
    parameters = [
        inspect.Parameter(
            each["name"],
            getattr(inspect.Parameter, each["kind"]),
            default=None if each["has_default"] else inspect.Parameter.empty,
        )
        for each in RECORD["signatures"][method]
    ]
    return inspect.Signature(parameters).bind(*args, **kwargs).arguments


class _Wrapper:
    name = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.made = bound(f"{self.name}.__init__", *args, **kwargs)
        assert self.made["float_workspace_buffer"].dtype == torch.uint8
        self.planned: dict[str, Any] = {}
        self.plans = 0

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """Keep what is planned; lengths have to be on the host, pages on the device."""
        self.planned = bound(f"{self.name}.plan", *args, **kwargs)
        self.plans += 1
        for name, value in self.planned.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == torch.int32, name
                assert "indices" in name or value.device.type == "cpu", name

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lens: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Return the reference's result; lens: starts of queries and pages, pages, contexts."""
        starts, indptr, indices, contexts = lens
        counts = (indptr[1:] - indptr[:-1]).tolist()
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=q.device)
        for row, (first, count) in enumerate(zip(indptr.tolist(), counts, strict=False)):
            table[row, :count] = indices[first : first + count]
        window = self.planned.get("window_left", -1)
        return paged_attention_reference(
            q,
            k,
            v,
            starts,
            contexts,
            table,
            query_lens=(starts[1:] - starts[:-1]).tolist(),
            context_lens=contexts.tolist(),
            scale=self.planned["sm_scale"],
            window=None if window < 0 else window + 1,
        )

    def _check(self, q: torch.Tensor, k: torch.Tensor, page_size: int) -> None:
        assert q.dtype == self.planned["q_data_type"] and k.dtype == self.planned["kv_data_type"]
        assert self.planned["page_size"] == page_size


class _Paged(_Wrapper):
    prefix = ""  # of the names of pages
    head_dim = "head_dim"

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend with what was planned."""
        given, planned = bound(f"{self.name}.run", *args, **kwargs), self.planned
        q, (k, v) = given["q"], given["paged_kv_cache"]
        assert self.made["kv_layout"] == "HND"
        self._check(q, k, k.shape[2])
        shape = (planned["num_qo_heads"], planned[self.head_dim], planned["num_kv_heads"])
        assert shape == (*q.shape[1:], k.shape[1]) and k.shape == v.shape
        indptr, last = planned[f"{self.prefix}indptr"], planned[f"{self.prefix}last_page_len"]
        contexts = (indptr[1:] - indptr[:-1] - 1) * k.shape[2] + last
        starts = planned.get("qo_indptr")
        if starts is None:
            starts = torch.arange(len(contexts) + 1, dtype=torch.int32)
        else:
            assert planned["causal"]
        lens = (starts, indptr, planned[f"{self.prefix}indices"], contexts)
        return given["out"].copy_(self._attend(q, k, v, lens))


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    """One query per sequence."""

    name = "BatchDecodeWithPagedKVCacheWrapper"


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    """Any number of queries per sequence."""

    name, prefix, head_dim = "BatchPrefillWithPagedKVCacheWrapper", "paged_kv_", "head_dim_qk"


class BatchMLAPagedAttentionWrapper(_Wrapper):
    """Queries over a latent cache."""

    name = "BatchMLAPagedAttentionWrapper"

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend with what was planned."""
        given, planned = bound(f"{self.name}.run", *args, **kwargs), self.planned
        q = torch.cat((given["q_nope"], given["q_pe"]), dim=2)
        ckv, kpe = given["ckv_cache"], given["kpe_cache"]
        self._check(q, ckv, ckv.shape[1])
        assert (planned["head_dim_ckv"], planned["head_dim_kpe"]) == (ckv.shape[2], kpe.shape[2])
        assert planned["num_heads"] == q.shape[1] and planned["causal"]
        k = torch.cat((ckv, kpe), dim=2).unsqueeze(1)
        lens = [planned[each] for each in ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")]
        return given["out"].copy_(self._attend(q, k, ckv.unsqueeze(1), tuple(lens)))


class mla:
    """FlashInfer's module of MLA wrappers."""

    BatchMLAPagedAttentionWrapper = BatchMLAPagedAttentionWrapper
