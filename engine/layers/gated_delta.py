"""Gated DeltaNet: linear attention with a short convolution and one state per sequence.

One call per layer and step for decode and prefill together: project, convolve queries, keys and
values, run the delta rule, normalise each head, gate, project out. No keys are cached: a sequence
has one row in each of the two states, whatever its length. Under tensor parallelism each rank has
consecutive key heads, their value heads and the states of these.

Legend: T tokens of the step, D model dim, G and H key and value heads on this rank, N rows of the
states, C channels of the convolution (2 G * key dim + H * value dim), W its taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from engine.distributed.groups import Group
from engine.layers.kv_cache import StateSpec
from engine.layers.parallel import TensorSum, empty_parameter, project_out
from engine.layers.precision import compute_dtype
from engine.layers.step_inputs import ReadRows, StepTensors
from engine.ops.causal_conv import causal_conv_silu
from engine.ops.gated_delta_rule import gated_delta_rule
from engine.ops.gated_rms_norm import gated_rms_norm
from engine.ops.linear import linear
from engine.ops.panels import to_panels
from engine.weights.slot import WeightSlot


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaSpec:
    """One Gated DeltaNet layer as the checkpoint has it, before any sharding."""

    hidden: int
    num_key_heads: int
    num_value_heads: int  # a multiple of the key heads
    key_dim: int  # of one head
    value_dim: int  # of one head
    conv_width: int
    norm_eps: float
    # Whether the files hold one matrix for queries, keys, values and output gates, its rows by key
    # head, and one for step sizes and decays (Qwen3-Next); otherwise four (Qwen3.5).
    by_key_head: bool = True

    @property
    def values(self) -> int:
        """Numbers of the value heads together."""
        return self.num_value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.num_key_heads * self.key_dim + self.values


class GatedDelta(nn.Module):
    """This tensor rank's heads of one layer; parameters are uninitialised until the slots are
    filled. dtype: of the matrices.

    Raises:
        ValueError: when the tensor ranks do not divide the key heads.
    """

    def __init__(
        self, spec: GatedDeltaSpec, tensor: Group, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        if spec.num_key_heads % tensor.size:
            raise ValueError(
                f"parallel.tensor = {tensor.size} must divide the {spec.num_key_heads} key heads "
                "of the model's linear attention (linear_num_key_heads); set parallel.tensor to a "
                f"divisor of {spec.num_key_heads}"
            )
        self.whole, self.sums = spec, TensorSum(tensor)
        self.spec = spec = replace(
            spec,
            num_key_heads=spec.num_key_heads // tensor.size,
            num_value_heads=spec.num_value_heads // tensor.size,
        )
        wide = compute_dtype(dtype, device)  # of all but the two large matrices

        def empty(*shape: int, dtype: torch.dtype = wide) -> nn.Parameter:
            return empty_parameter(*shape, device=device, dtype=dtype)

        heads, values = spec.num_value_heads, spec.values
        # Rows of queries, keys, values, output gates, step sizes and decays, in this order once
        # `finalize_weights` has sorted those of a checkpoint that has them by key head.
        self.in_OD = empty(spec.channels + values + 2 * heads, spec.hidden, dtype=dtype)
        self.conv_C1W = empty(spec.channels, 1, spec.conv_width)
        self.norm_V = empty(spec.value_dim)
        self.out_DO = empty(spec.hidden, values, dtype=dtype)
        # In float32: they decide how fast a state fades over thousands of tokens.
        self.log_rate_H = empty(heads, dtype=torch.float32)
        self.rate_bias_H = empty(heads, dtype=torch.float32)

    def state_spec(self) -> StateSpec:
        """Return the states of one sequence: the last W - 1 inputs of the convolution, and per
        value head a matrix [key dim, value dim].
        """
        spec = self.spec
        return StateSpec(
            conv_shape=(spec.conv_width - 1, spec.channels),
            delta_shape=(spec.num_value_heads, spec.key_dim, spec.value_dim),
            conv_dtype=self.conv_C1W.dtype,
        )

    def forward(
        self,
        x_TD: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        step: StepTensors,
        conv_state: torch.Tensor,
        delta_state: torch.Tensor,
        read: ReadRows | None = None,
    ) -> torch.Tensor:
        """Return the output [T, D]; with `read` only its rows.

        Args:
            x_TD: normalised hidden states.
            cos_TR, sin_TR: not used, nothing is rotated.
            step: a sequence at its first tokens begins with zeroed states.
            conv_state: [N, W - 1, C], advanced by all T tokens.
            delta_state: float32 [N, H, key dim, value dim], advanced by all T tokens.
            read: the rows whose output is needed; None: all.

        Collective over TP: every rank must call.
        """
        spec, queries = self.spec, step.queries
        states_S = queries.states_S
        assert states_S is not None, "the model has states, so its steps have their rows"
        start_S1, context_S = queries.query_start_S1, queries.context_lens_S
        heads, keys = spec.num_value_heads, spec.num_key_heads * spec.key_dim
        widths = (spec.channels, spec.values, heads, heads)
        qkv_TC, gate_TO, b_TH, a_TH = linear(x_TD, self.in_OD).split_with_sizes(widths, dim=1)
        mixed_TC = causal_conv_silu(
            qkv_TC, self.conv_C1W.squeeze(1), conv_state, states_S, start_S1, context_S
        )
        q, k, v = mixed_TC.split_with_sizes((keys, keys, spec.values), dim=1)
        out_THV = gated_delta_rule(
            q.unflatten(1, (spec.num_key_heads, -1)),
            k.unflatten(1, (spec.num_key_heads, -1)),
            v.unflatten(1, (heads, -1)),
            a_TH,
            b_TH,
            self.log_rate_H,
            self.rate_bias_H,
            delta_state,
            states_S,
            start_S1,
            context_S,
            queries.query_lens,
            queries.context_lens,
        )
        rows_R = None if read is None else read.rows_R
        gated_RO = gated_rms_norm(out_THV, gate_TO, self.norm_V, spec.norm_eps, rows_R)
        return project_out(gated_RO, self.out_DO, None, self.sums)

    def finalize_weights(self) -> None:
        """Rearrange the loaded weights, in place, into the layout that `linear` reads fastest.

        Rows that the files have by key head are sorted by what they are. Call it once.
        """
        spec = self.spec
        if spec.by_key_head:
            groups, shared = spec.num_key_heads, spec.num_value_heads // spec.num_key_heads
            per_head = shared * spec.value_dim
            qkvz_OD, ba_OD = self.in_OD.split_with_sizes(
                (spec.channels + spec.values, 2 * spec.num_value_heads)
            )
            for rows_OD, parts in (
                (qkvz_OD, (spec.key_dim, spec.key_dim, per_head, per_head)),
                (ba_OD, (shared, shared)),
            ):
                by_part = rows_OD.unflatten(0, (groups, -1)).split_with_sizes(parts, dim=1)
                rows_OD.copy_(torch.cat([part.flatten(0, 1) for part in by_part]))
        for weight in (self.in_OD, self.out_DO):
            to_panels(weight)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of this rank's heads; prefix: as in model.layers.0.linear_attn."""
        mine, whole, rank = self.spec, self.whole, self.sums.group.rank
        channels, heads = mine.channels, mine.num_value_heads
        qkv_OD, gate_OD, b_OD, a_OD = self.in_OD.split_with_sizes(
            (channels, mine.values, heads, heads)
        )
        if mine.by_key_head:
            qkvz_OD, ba_OD = self.in_OD.split_with_sizes((channels + mine.values, 2 * heads))
            full = whole.channels + whole.values
            yield _share(f"{prefix}.in_proj_qkvz.weight", qkvz_OD, full, rank)
            yield _share(f"{prefix}.in_proj_ba.weight", ba_OD, 2 * whole.num_value_heads, rank)
        else:
            yield from self._channel_slots(f"{prefix}.in_proj_qkv.weight", qkv_OD)
            yield _share(f"{prefix}.in_proj_z.weight", gate_OD, whole.values, rank)
            yield _share(f"{prefix}.in_proj_b.weight", b_OD, whole.num_value_heads, rank)
            yield _share(f"{prefix}.in_proj_a.weight", a_OD, whole.num_value_heads, rank)
        yield from self._channel_slots(f"{prefix}.conv1d.weight", self.conv_C1W)
        columns = slice(rank * mine.values, (rank + 1) * mine.values)
        shape = (mine.hidden, whole.values)
        yield WeightSlot(f"{prefix}.out_proj.weight", self.out_DO, shape, (slice(None), columns))
        yield WeightSlot(f"{prefix}.norm.weight", self.norm_V, (mine.value_dim,), kind="norm")
        for name, target in (("A_log", self.log_rate_H), ("dt_bias", self.rate_bias_H)):
            yield _share(f"{prefix}.{name}", target, whole.num_value_heads, rank, kind="bias")

    def _channel_slots(self, name: str, target: torch.Tensor) -> Iterator[WeightSlot]:
        """Yield the slots of a tensor whose rows are queries, keys and values, one after the other.

        A rank has a range of each.
        """
        whole, group = self.whole, self.sums.group
        shape = (whole.channels, *target.shape[1:])
        if group.size == 1:
            yield WeightSlot(name, target, shape)
            return
        keys, before, start = whole.num_key_heads * whole.key_dim, 0, 0
        for full in (keys, keys, whole.values):
            count = full // group.size
            rows = slice(before + group.rank * count, before + (group.rank + 1) * count)
            yield WeightSlot(name, target[start : start + count], shape, (rows,))
            before, start = before + full, start + count


def _share(
    name: str,
    target: torch.Tensor,
    full: int,
    rank: int,
    kind: Literal["matrix", "bias"] = "matrix",
) -> WeightSlot:
    """Return the slot of a tensor of `full` rows, of which each rank has as many."""
    count = target.shape[0]
    rows = slice(rank * count, (rank + 1) * count)
    return WeightSlot(name, target, (full, *target.shape[1:]), (rows,), kind=kind)
