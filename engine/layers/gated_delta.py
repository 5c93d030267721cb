"""Gated DeltaNet: linear attention with a short convolution and one state per sequence.

One call per layer and step for decode and prefill together: project, convolve queries, keys and
values, run the delta rule, normalise each head, gate, project out. No keys are cached: a sequence
has one row in each of the two states, whatever its length. Not split over tensor ranks.

Legend: T tokens of the step, S sequences, D model dim, G key heads, H value heads, N rows of the
states, C channels of the convolution (2 G * key dim + H * value dim), W its taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.parallel import empty_parameter
from engine.layers.step_inputs import Queries
from engine.ops.causal_conv import causal_conv_silu
from engine.ops.gated_delta_rule import gated_delta_rule
from engine.ops.linear import linear
from engine.ops.panels import to_panels
from engine.ops.rms_norm import rms_norm
from engine.weights.slot import WeightSlot


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaSpec:
    """One Gated DeltaNet layer as the checkpoint has it."""

    hidden: int
    num_key_heads: int
    num_value_heads: int  # a multiple of the key heads
    key_dim: int  # of one head
    value_dim: int  # of one head
    conv_width: int
    norm_eps: float

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        keys = 2 * self.num_key_heads * self.key_dim
        return keys + self.num_value_heads * self.value_dim


class GatedDelta(nn.Module):
    """All heads of one layer; parameters are uninitialised until the slots are filled."""

    def __init__(self, spec: GatedDeltaSpec, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec

        def empty(*shape: int) -> nn.Parameter:
            return empty_parameter(*shape, device=device, dtype=dtype)

        heads, values = spec.num_value_heads, spec.num_value_heads * spec.value_dim
        # Rows by key head, as in the checkpoint: its query, its key, then values and output gates
        # of its value heads; of the other matrix their step sizes, then their decays.
        self.qkvz_OD = empty(spec.channels + values, spec.hidden)
        self.ba_OD = empty(2 * heads, spec.hidden)
        self.conv_C1W = empty(spec.channels, 1, spec.conv_width)
        self.norm_V = empty(spec.value_dim)
        self.out_DO = empty(spec.hidden, values)
        # In float32: they decide how fast a state fades over thousands of tokens.
        self.log_rate_H = empty_parameter(heads, device=device, dtype=torch.float32)
        self.rate_bias_H = empty_parameter(heads, device=device, dtype=torch.float32)

    def new_states(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return zeroed states of `rows` sequences: [N, W - 1, C] and float32 [N, H, K, V]."""
        spec, weight = self.spec, self.conv_C1W
        conv = weight.new_zeros(rows, spec.conv_width - 1, spec.channels)
        shape = (rows, spec.num_value_heads, spec.key_dim, spec.value_dim)
        return conv, weight.new_zeros(shape, dtype=torch.float32)

    def forward(
        self,
        x_TD: torch.Tensor,
        queries: Queries,
        states_S: torch.Tensor,
        conv_state: torch.Tensor,
        delta_state: torch.Tensor,
        rows_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the output [T, D]; with `rows_R` only these rows.

        Args:
            x_TD: normalised hidden states.
            queries: of all T tokens. A sequence at its first tokens begins with zeroed states.
            states_S: int64, the row of each sequence in the states, all different.
            conv_state, delta_state: see `new_states`; advanced by all T tokens.
            rows_R: int64, the rows whose output is needed; None: all.
        """
        spec = self.spec
        shared = spec.num_value_heads // spec.num_key_heads
        widths = (spec.key_dim, spec.key_dim, shared * spec.value_dim, shared * spec.value_dim)
        by_head_TGO = linear(x_TD, self.qkvz_OD).unflatten(1, (spec.num_key_heads, -1))
        *qkv, gate = by_head_TGO.split_with_sizes(widths, dim=2)
        b_TGO, a_TGO = linear(x_TD, self.ba_OD).unflatten(1, (spec.num_key_heads, -1)).chunk(2, 2)
        start_S1, context_S = queries.query_start_S1, queries.context_lens_S
        mixed_TC = causal_conv_silu(
            torch.cat([part.flatten(1) for part in qkv], dim=1),
            self.conv_C1W.squeeze(1),
            conv_state,
            states_S,
            start_S1,
            context_S,
        )
        keys = spec.num_key_heads * spec.key_dim
        values = spec.num_value_heads * spec.value_dim
        q, k, v = mixed_TC.split_with_sizes((keys, keys, values), dim=1)
        rate_TH = F.softplus(a_TGO.flatten(1).float() + self.rate_bias_H)
        out_THV = gated_delta_rule(
            q.unflatten(1, (spec.num_key_heads, -1)),
            k.unflatten(1, (spec.num_key_heads, -1)),
            v.unflatten(1, (spec.num_value_heads, -1)),
            -self.log_rate_H.exp() * rate_TH,
            b_TGO.flatten(1).sigmoid(),
            delta_state,
            states_S,
            start_S1,
            context_S,
            queries.query_lens,
        )
        gate_THV = gate.reshape(out_THV.shape)
        if rows_R is not None:
            out_THV, gate_THV = out_THV.index_select(0, rows_R), gate_THV.index_select(0, rows_R)
        normed_THV = rms_norm(out_THV.contiguous(), self.norm_V, spec.norm_eps)
        gated_THV = (normed_THV * F.silu(gate_THV.float())).to(x_TD.dtype)
        return linear(gated_THV.flatten(1), self.out_DO)

    def finalize_weights(self) -> None:
        """Rearrange the loaded weights, in place, into the layout that `linear` reads fastest."""
        for weight in (self.qkvz_OD, self.ba_OD, self.out_DO):
            to_panels(weight)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots; prefix: as in model.layers.0.linear_attn."""
        for name, target in (
            ("in_proj_qkvz.weight", self.qkvz_OD),
            ("in_proj_ba.weight", self.ba_OD),
            ("conv1d.weight", self.conv_C1W),
            ("out_proj.weight", self.out_DO),
        ):
            yield WeightSlot(f"{prefix}.{name}", target, tuple(target.shape))
        heads = (self.spec.num_value_heads,)
        yield WeightSlot(f"{prefix}.norm.weight", self.norm_V, (self.spec.value_dim,), kind="norm")
        yield WeightSlot(f"{prefix}.A_log", self.log_rate_H, heads, kind="bias")
        yield WeightSlot(f"{prefix}.dt_bias", self.rate_bias_H, heads, kind="bias")
