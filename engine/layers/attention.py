"""Grouped-query attention on flattened tokens over the paged cache.

One call per layer and step for decode and prefill together: project, normalise, rotate, store the
step's keys and values, attend over the cache, project out. DeepSeek's variant is `mla.py`.

Legend: T tokens of the step, S sequences, B columns of the block table, D model dim, H and G query
and key/value heads on this rank, Dh head dim, R rotated dims.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from engine.distributed.groups import Group
from engine.layers.attention_backends.backend import AttentionBackend, AttentionKind
from engine.layers.attention_backends.paged_kernels import PAGED_KERNELS
from engine.layers.kv_cache import KVSpec
from engine.layers.parallel import TensorSum, empty_parameter, out_slots, project_out, share_heads
from engine.layers.precision import compute_dtype
from engine.layers.query_scale import QueryScale
from engine.layers.step_inputs import ReadRows, StepTensors
from engine.ops.linear import linear
from engine.ops.panels import to_panels
from engine.ops.qk_rotary_store import QKRule, qk_rotary_store
from engine.ops.sigmoid import sigmoid_by_row
from engine.weights.slot import WeightSlot


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One attention layer as the checkpoint has it, before any sharding."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    # "head" normalises each head (Qwen3), "unit" too, but without weights (Llama 4), "projection"
    # all queries and all keys as one (OLMoE).
    qk_norm: Literal["none", "head", "unit", "projection"] = "none"
    norm_eps: float = 1e-6  # of qk_norm
    norm_offset: float = 0.0  # added to the weights of qk_norm as they are read
    clip_qkv: float | None = None  # bound on the absolute value of queries, keys and values
    interleaved: bool = False  # rotary pairs are (2i, 2i + 1); otherwise (i, i + Dh / 2)
    rotary: bool = True  # False: queries and keys are not rotated (NoPE)
    window: int | None = None  # keys that a query attends to, its own included; None: all
    # Positions are cut into chunks of that many, and a query attends to keys of its own; None: all.
    chunk: int | None = None
    query_scale: QueryScale | None = None
    # The query projection has as many numbers more per head: their sigmoid multiplies its output.
    output_gate: bool = False
    sinks: bool = False  # a learned logit per head takes part in its softmax, without a value


class Attention(nn.Module):
    """This tensor rank's heads of one layer; dtype: of the matrices.

    Raises:
        ValueError: when the tensor ranks do not divide the heads.
    """

    def __init__(
        self, spec: AttentionSpec, tensor: Group, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        share = share_heads(spec.num_heads, spec.num_kv_heads, tensor)
        self.spec, self.share = spec, share
        self.sums = TensorSum(tensor, calls=2 if spec.qk_norm == "projection" else 1)
        self.backend: AttentionBackend = PAGED_KERNELS
        self.kind = AttentionKind(
            num_heads=share.num_heads,
            num_kv_heads=share.num_kv_heads,
            key_dim=spec.head_dim,
            value_dim=spec.head_dim,
            scale=spec.head_dim**-0.5,
            window=spec.window,
            chunk=spec.chunk,
            has_sinks=spec.sinks,
        )
        # The norm of a projection that tensor ranks share needs a sum over them.
        self.splits_norm = spec.qk_norm == "projection" and tensor.size > 1
        norm = "none" if self.splits_norm else "head" if spec.qk_norm == "unit" else spec.qk_norm
        self.qk_rule = QKRule(norm, spec.norm_eps, spec.clip_qkv)
        self.q_width = share.num_heads * spec.head_dim
        self.kv_width = share.num_kv_heads * spec.head_dim
        gates = (self.q_width,) if spec.output_gate else ()
        self.widths = (self.q_width, *gates, self.kv_width, self.kv_width)
        rows = sum(self.widths)
        # Query, key and value rows in one matrix, O = (H + 2 G) * Dh, behind the queries those of
        # output gates, H * Dh more; of the output projection the columns of this rank's heads.
        self.qkv_OD = empty_parameter(rows, spec.hidden, device=device, dtype=dtype)
        self.out_DO = empty_parameter(spec.hidden, self.q_width, device=device, dtype=dtype)
        dtype = compute_dtype(dtype, device)  # of all but the matrices
        self.qkv_bias_O = self.out_bias_D = self.q_norm = self.k_norm = None
        if spec.qkv_bias:
            self.qkv_bias_O = empty_parameter(rows, device=device, dtype=dtype)
        if spec.out_bias:
            self.out_bias_D = empty_parameter(spec.hidden, device=device, dtype=dtype)
        self.sinks_H = None
        if spec.sinks:  # float32, as the softmax is
            self.sinks_H = empty_parameter(share.num_heads, device=device, dtype=torch.float32)
        if spec.qk_norm == "unit":  # no parameters: no checkpoint fills them
            self.q_norm = self.k_norm = torch.ones(spec.head_dim, device=device, dtype=dtype)
        elif spec.qk_norm != "none":
            whole = spec.qk_norm == "projection"
            q_dim, k_dim = (self.q_width, self.kv_width) if whole else (spec.head_dim,) * 2
            self.q_norm = empty_parameter(q_dim, device=device, dtype=dtype)
            self.k_norm = empty_parameter(k_dim, device=device, dtype=dtype)
        # Float32 [P], by position, where the queries are scaled; shared by layers (`CausalLM`).
        self.query_scale_P: torch.Tensor | None = None

    def forward(
        self,
        x_TD: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        step: StepTensors,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        read: ReadRows | None = None,
    ) -> torch.Tensor:
        """Return the attention output [T, D]; with `read` only its R rows.

        Args:
            x_TD: normalised hidden states.
            cos_TR, sin_TR: of the tokens' positions, see `RotaryTable.rows`.
            k_cache, v_cache: [blocks, G, block_size, Dh]; written with the keys and values of all T
                tokens.
            read: the rows whose output is needed; None: all.

        Collective over TP: every rank must call.
        """
        spec = self.spec
        queries = (step if read is None else read).queries
        qkv_TO = linear(x_TD, self.qkv_OD, self.qkv_bias_O)
        q, *gates, k, v = qkv_TO.split_with_sizes(self.widths, dim=1)  # a third of `split`'s cost
        if self.splits_norm:
            q, k = self._norm_projections(q, k)
        if not spec.rotary:
            cos_TR, sin_TR = cos_TR[:, :0], sin_TR[:, :0]
        q_THD = qk_rotary_store(
            q,
            k,
            v,
            self.q_norm,
            self.k_norm,
            cos_TR,
            sin_TR,
            k_cache,
            v_cache,
            step.slots_T,
            self.qk_rule,
        )
        if self.query_scale_P is not None:
            q_THD.mul_(self.query_scale_P.index_select(0, step.positions_T)[:, None, None])
        if read is not None:
            q_THD = q_THD.index_select(0, read.rows_R)
        out_THD = self.backend.run(self.kind, q_THD, k_cache, v_cache, queries, self.sinks_H)
        out_TO = out_THD.flatten(1)
        for gate_TO in gates:
            gate_TO = gate_TO if read is None else gate_TO.index_select(0, read.rows_R)
            out_TO = out_TO * sigmoid_by_row(gate_TO.contiguous())
        return project_out(out_TO, self.out_DO, self.out_bias_D, self.sums)

    def kv_spec(self, num_layers: int) -> KVSpec:
        """Return the shape of the cache of `num_layers` such layers on this rank."""
        dim = self.spec.head_dim
        return KVSpec(
            num_layers=num_layers, num_kv_heads=self.share.num_kv_heads, key_dim=dim, value_dim=dim
        )

    def _norm_projections(
        self, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise the whole query and key projections, of which a tensor rank holds a part.

        Collective over TP: every rank must call.
        """
        assert self.q_norm is not None and self.k_norm is not None
        spec, share = self.spec, self.share
        wide_q, wide_k = q.float(), k.float()
        squares_T2 = torch.stack((wide_q.square().sum(1), wide_k.square().sum(1)), dim=1)
        self.sums(squares_T2)
        # Every key head was summed once per rank that has a replica of it.
        q_count = spec.num_heads * spec.head_dim
        k_count = spec.num_kv_heads * spec.head_dim * share.kv_replicas
        q_scale_T1 = (squares_T2[:, :1] / q_count + spec.norm_eps).rsqrt()
        k_scale_T1 = (squares_T2[:, 1:] / k_count + spec.norm_eps).rsqrt()
        q = (wide_q * q_scale_T1).to(q.dtype) * self.q_norm
        k = (wide_k * k_scale_T1).to(k.dtype) * self.k_norm
        return q, k

    def finalize_weights(self) -> None:
        """Rearrange the loaded weights, in place, into the layout that `linear` reads fastest.

        Rows of queries and keys whose rotary pairs are neighbours are sorted into halves, which the
        rotation takes as pairs; their products do not change. Output gates are sorted behind the
        queries: the files have each head's query, then its gate. Call it once.
        """
        if self.spec.output_gate:
            for rows_O in (self.qkv_OD, self.qkv_bias_O):
                if rows_O is not None:
                    sorted_rows = rows_O[: 2 * self.q_width]
                    by_head = sorted_rows.unflatten(0, (-1, 2, self.spec.head_dim))
                    sorted_rows.copy_(by_head.transpose(0, 1).flatten(0, 2))
        if self.spec.interleaved:
            assert self.spec.qk_norm in ("none", "unit"), "weights of a norm are to be sorted too"
            assert not self.spec.output_gate, "keys are not behind the queries"
            for rows in (self.qkv_OD, self.qkv_bias_O):
                if rows is not None:
                    turned = rows[: self.q_width + self.kv_width]
                    pairs = turned.unflatten(0, (-1, self.spec.head_dim // 2, 2))
                    turned.copy_(pairs.transpose(1, 2).flatten(0, 2))
        for weight in (self.qkv_OD, self.out_DO):
            to_panels(weight)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of this rank's heads; prefix: as in model.layers.0.self_attn."""
        spec, share, dim = self.spec, self.share, self.spec.head_dim
        q_rows = slice(share.first_head * dim, share.first_head * dim + self.q_width)
        kv_rows = slice(share.first_kv_head * dim, share.first_kv_head * dim + self.kv_width)
        q_full, kv_full = spec.num_heads * dim, spec.num_kv_heads * dim
        per_query = 2 if spec.output_gate else 1
        wide_rows = slice(q_rows.start * per_query, q_rows.stop * per_query)
        parts = (
            ("q", wide_rows, q_full * per_query),
            ("k", kv_rows, kv_full),
            ("v", kv_rows, kv_full),
        )
        start = 0
        for letter, rows, full in parts:
            end = start + rows.stop - rows.start
            name = f"{prefix}.{letter}_proj"
            view = self.qkv_OD[start:end]
            yield WeightSlot(f"{name}.weight", view, (full, spec.hidden), (rows,))
            if self.qkv_bias_O is not None:
                bias = self.qkv_bias_O[start:end]
                yield WeightSlot(f"{name}.bias", bias, (full,), (rows,), kind="bias")
            start = end
        yield from out_slots(prefix, self.out_DO, self.out_bias_D, q_rows, q_full)
        if self.sinks_H is not None:
            heads = slice(share.first_head, share.first_head + share.num_heads)
            yield WeightSlot(
                f"{prefix}.sinks", self.sinks_H, (spec.num_heads,), (heads,), kind="bias"
            )
        norms = (("q", self.q_norm, q_rows, q_full), ("k", self.k_norm, kv_rows, kv_full))
        for letter, norm, rows, full in norms:
            if norm is not None and spec.qk_norm != "unit":
                shape, shard = ((dim,), None) if spec.qk_norm == "head" else ((full,), (rows,))
                yield WeightSlot(
                    f"{prefix}.{letter}_norm.weight",
                    norm,
                    shape,
                    shard,
                    kind="norm",
                    offset=spec.norm_offset,
                )


def share_query_scales(attentions: Iterable[nn.Module], max_len: int, device: torch.device) -> None:
    """Give each layer that scales its queries the table it needs, equal ones once.

    max_len: P, the positions that the model can run.
    """
    tables: dict[QueryScale, torch.Tensor] = {}
    for attention in attentions:
        if isinstance(attention, Attention) and (scale := attention.spec.query_scale) is not None:
            if scale not in tables:
                tables[scale] = scale.table(max_len, device)
            attention.query_scale_P = tables[scale]
