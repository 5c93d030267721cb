"""Multi-head latent attention, absorbed, over the paged latent cache.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.

The cache holds one vector per token: the normalised latent c (C numbers) and one rotary key (R
numbers) that all heads share. Instead of expanding c into keys and values, their up-projections are
absorbed into the query and into the output:

    score   q_nope . (U_k c) + q_rope . k_rope  =  (U_k^T q_nope) . c + q_rope . k_rope
    output  sum_j p_j (U_v c_j)                 =  U_v (sum_j p_j c_j)

so that attention itself is multi-query attention with key width C + R and value width C, the value
being a prefix of the key. Under tensor parallelism heads are split and the latent is replicated.

Legend: T tokens, D model dim, H heads on this rank, C latent (kv_lora_rank), Q query latent
(q_lora_rank), N and R dims of a head without and with rotation, V value dim of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from engine.distributed.groups import Group
from engine.layers.attention_backends.backend import AttentionBackend, AttentionKind
from engine.layers.attention_backends.paged_kernels import PAGED_KERNELS
from engine.layers.kv_cache import KVSpec
from engine.layers.parallel import TensorSum, empty_parameter, out_slots, project_out, share_heads
from engine.layers.precision import compute_dtype
from engine.layers.step_inputs import ReadRows, StepTensors
from engine.ops.latent_rotary_store import latent_rotary_store
from engine.ops.linear import linear
from engine.ops.panels import to_panels
from engine.ops.rms_norm import rms_norm
from engine.weights.slot import WeightSlot

# Every published DeepSeek model uses this for the norms of the two latents, not rms_norm_eps.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class MLASpec:
    """One latent attention layer as the checkpoint has it, before any sharding."""

    hidden: int
    num_heads: int
    q_rank: int | None  # Q; None: a direct query projection
    kv_rank: int  # C
    nope_dim: int  # N
    rope_dim: int  # R
    value_dim: int  # V
    scale: float  # on the scores, YaRN's factor and that of the query latent included
    latent_scale: float = 1.0  # of the normalised latent c (LongCat-Flash)
    interleaved: bool = True  # rotary pairs are (2i, 2i + 1); otherwise (i, i + R / 2)
    bias: bool = False  # on the two down-projections and the output projection


class LatentAttention(nn.Module):
    """This tensor rank's heads of one layer; dtype: of the matrices that `linear` reads.

    Raises:
        ValueError: when the tensor ranks do not divide the heads.
    """

    def __init__(
        self, spec: MLASpec, tensor: Group, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        # One key/value head per query head: the latent has no heads to share.
        self.share = share_heads(spec.num_heads, spec.num_heads, tensor)
        self.spec, self.sums = spec, TensorSum(tensor)
        heads = self.share.num_heads
        self.head_dim = spec.nope_dim + spec.rope_dim
        self.q_width = heads * self.head_dim
        self.latent_width = spec.kv_rank + spec.rope_dim
        self.down_q = self.q_width if spec.q_rank is None else spec.q_rank
        self.backend: AttentionBackend = PAGED_KERNELS
        self.kind = AttentionKind(
            num_heads=heads,
            num_kv_heads=1,
            key_dim=self.latent_width,
            value_dim=spec.kv_rank,
            scale=spec.scale,
            is_latent=True,
        )

        wide = compute_dtype(dtype, device)

        def empty(*shape: int, dtype: torch.dtype = wide) -> nn.Parameter:
            return empty_parameter(*shape, device=device, dtype=dtype)

        # All projections of x in one matrix: queries (or the query latent, Q rows), then latent and
        # rotary key (C + R rows).
        self.down_OD = empty(self.down_q + self.latent_width, spec.hidden, dtype=dtype)
        self.kv_norm_C = empty(spec.kv_rank)
        # Each head's key rows (N), then its value rows (V). Small, and read by plain products that
        # would widen it in every step: held in the dtype that they compute in.
        self.kv_up_HOC = empty(heads, spec.nope_dim + spec.value_dim, spec.kv_rank)
        self.out_DO = empty(spec.hidden, heads * spec.value_dim, dtype=dtype)
        self.down_bias_O = self.out_bias_D = self.q_norm_Q = self.q_up_OQ = None
        if spec.q_rank is not None:
            self.q_norm_Q = empty(spec.q_rank)
            self.q_up_OQ = empty(self.q_width, spec.q_rank, dtype=dtype)
        if spec.bias:
            self.down_bias_O = empty(self.down_q + self.latent_width)
            # A direct query projection has no bias in any DeepSeek model: its rows stay zero.
            self.down_bias_O[: self.down_q] = 0
            self.out_bias_D = empty(spec.hidden)

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
        """Return the attention output [T, D]; with `read` only its rows.

        Args:
            x_TD: normalised hidden states.
            cos_TR, sin_TR: of the tokens' positions, see `RotaryTable.rows`.
            k_cache: [blocks, 1, block_size, C + R]; written with the latents of all T tokens.
            v_cache: a view of its first C columns.
            read: the rows whose output is needed; None: all.

        Collective over TP: every rank must call.
        """
        spec = self.spec
        queries = (step if read is None else read).queries
        down_TO = linear(x_TD, self.down_OD, self.down_bias_O)
        q, latent, k_rope = down_TO.split((self.down_q, spec.kv_rank, spec.rope_dim), dim=1)
        if self.q_up_OQ is not None and self.q_norm_Q is not None:
            q = linear(rms_norm(q, self.q_norm_Q, LATENT_NORM_EPS), self.q_up_OQ)
        q_nope_THN, q_rope_THR = q.unflatten(1, (-1, self.head_dim)).split(
            (spec.nope_dim, spec.rope_dim), dim=2
        )
        if read is not None:
            q_nope_THN = q_nope_THN.index_select(0, read.rows_R)

        # Absorb the keys' up-projection into the queries; the values' follows after attention.
        key_up_HNC, value_up_HVC = self.kv_up_HOC.split((spec.nope_dim, spec.value_dim), dim=1)
        absorbed_HTC = torch.bmm(q_nope_THN.transpose(0, 1), key_up_HNC)
        q_THL = latent_rotary_store(
            absorbed_HTC.transpose(0, 1),
            q_rope_THR,
            latent,
            k_rope,
            self.kv_norm_C,
            LATENT_NORM_EPS,
            cos_TR,
            sin_TR,
            k_cache,
            step.slots_T,
            interleaved=spec.interleaved,
            rows_Q=None if read is None else read.rows_R,
        )
        mixed_THC = self.backend.run(self.kind, q_THL, k_cache, v_cache, queries)
        out_HTV = torch.bmm(mixed_THC.transpose(0, 1), value_up_HVC.transpose(1, 2))
        out_TO = out_HTV.transpose(0, 1).flatten(1)
        return project_out(out_TO, self.out_DO, self.out_bias_D, self.sums)

    def kv_spec(self, num_layers: int) -> KVSpec:
        """Return the cache shape of `num_layers` such layers, the same on every tensor rank."""
        return KVSpec(
            num_layers=num_layers,
            num_kv_heads=1,
            key_dim=self.latent_width,
            value_dim=self.spec.kv_rank,
            latent=True,
        )

    def finalize_weights(self) -> None:
        """Rearrange the loaded weights, in place, into the layout that `linear` reads fastest.

        The scale of the latent becomes part of the up-projections of all that is made of it.
        """
        if self.spec.latent_scale != 1.0:
            self.kv_up_HOC.mul_(self.spec.latent_scale)
        for weight in (self.down_OD, self.q_up_OQ, self.out_DO):
            if weight is not None:
                to_panels(weight)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of this rank's heads; prefix: as in model.layers.0.self_attn."""
        spec, share = self.spec, self.share
        first, end = share.first_head, share.first_head + share.num_heads

        def rows_of(width: int) -> slice:
            return slice(first * width, end * width)

        q_full, q_rows = spec.num_heads * self.head_dim, rows_of(self.head_dim)
        down_q, down_latent = self.down_OD[: self.down_q], self.down_OD[self.down_q :]
        if self.q_up_OQ is None or self.q_norm_Q is None:
            name = f"{prefix}.q_proj.weight"
            yield WeightSlot(name, down_q, (q_full, spec.hidden), (q_rows,))
        else:
            rank = self.down_q
            yield WeightSlot(f"{prefix}.q_a_proj.weight", down_q, (rank, spec.hidden))
            yield WeightSlot(f"{prefix}.q_a_layernorm.weight", self.q_norm_Q, (rank,), kind="norm")
            name = f"{prefix}.q_b_proj.weight"
            yield WeightSlot(name, self.q_up_OQ, (q_full, rank), (q_rows,))
        name = f"{prefix}.kv_a_proj_with_mqa"
        yield WeightSlot(f"{name}.weight", down_latent, (self.latent_width, spec.hidden))
        if self.down_bias_O is not None:
            q_bias, latent_bias = self.down_bias_O[: self.down_q], self.down_bias_O[self.down_q :]
            yield WeightSlot(f"{name}.bias", latent_bias, (self.latent_width,), kind="bias")
            if spec.q_rank is not None:
                name = f"{prefix}.q_a_proj.bias"
                yield WeightSlot(name, q_bias, (spec.q_rank,), kind="bias")
        name, rank = f"{prefix}.kv_a_layernorm.weight", spec.kv_rank
        yield WeightSlot(name, self.kv_norm_C, (rank,), kind="norm")
        width = spec.nope_dim + spec.value_dim
        name, full = f"{prefix}.kv_b_proj.weight", (spec.num_heads * width, rank)
        yield WeightSlot(name, self.kv_up_HOC.flatten(0, 1), full, (rows_of(width),))
        columns, full_width = rows_of(spec.value_dim), spec.num_heads * spec.value_dim
        yield from out_slots(prefix, self.out_DO, self.out_bias_D, columns, full_width)
