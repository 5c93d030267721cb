"""Dense MLP: the gated feed-forward of dense layers and shared experts, replicated on every rank.

Legend: T tokens, D model dim, F hidden dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from engine.layers.parallel import empty_parameter
from engine.layers.precision import compute_dtype
from engine.ops.linear import linear
from engine.ops.panels import to_panels
from engine.ops.silu_and_mul import gate_output, silu_and_mul
from engine.weights.slot import WeightSlot


class DenseMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), times sigmoid(output gate . x) where there is such a gate."""

    def __init__(
        self,
        hidden: int,
        ffn: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        output_gate: bool = False,
    ) -> None:
        """Build it uninitialised.

        Args:
            hidden: D.
            ffn: F.
            device, dtype: of the matrices.
            bias: on the three projections (DeepSeek-V2's mlp_bias).
            output_gate: whether the output has a gate (Qwen2-MoE's shared expert).
        """
        super().__init__()
        self.hidden, self.ffn = hidden, ffn

        wide = compute_dtype(dtype, device)

        def empty(*shape: int, dtype: torch.dtype = wide) -> nn.Parameter:
            return empty_parameter(*shape, device=device, dtype=dtype)

        self.gate_up_2FD = empty(2 * ffn, hidden, dtype=dtype)  # gate rows, then up rows
        self.down_DF = empty(hidden, ffn, dtype=dtype)
        self.gate_up_bias_2F = empty(2 * ffn) if bias else None
        self.down_bias_D = empty(hidden) if bias else None
        self.output_gate_1D = empty(1, hidden) if output_gate else None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the output [T, D] in x's dtype; T may be 0."""
        hidden_TF = silu_and_mul(linear(x_TD, self.gate_up_2FD, self.gate_up_bias_2F))
        out_TD = linear(hidden_TF, self.down_DF, self.down_bias_D)
        if self.output_gate_1D is not None:
            out_TD = gate_output(out_TD, x_TD, self.output_gate_1D)
        return out_TD

    def finalize_weights(self) -> None:
        """Rearrange the loaded weights, in place, into the layout that `linear` reads fastest."""
        for weight in (self.gate_up_2FD, self.down_DF):
            to_panels(weight)

    def weight_slots(self, prefix: str, output_gate: str = "") -> Iterator[WeightSlot]:
        """Yield the slots under `prefix`; output_gate: full name of the output gate's weight."""
        hidden, ffn = self.hidden, self.ffn
        gate, up = self.gate_up_2FD[:ffn], self.gate_up_2FD[ffn:]
        yield WeightSlot(f"{prefix}.gate_proj.weight", gate, (ffn, hidden))
        yield WeightSlot(f"{prefix}.up_proj.weight", up, (ffn, hidden))
        yield WeightSlot(f"{prefix}.down_proj.weight", self.down_DF, (hidden, ffn))
        if self.gate_up_bias_2F is not None and self.down_bias_D is not None:
            gate, up = self.gate_up_bias_2F[:ffn], self.gate_up_bias_2F[ffn:]
            yield WeightSlot(f"{prefix}.gate_proj.bias", gate, (ffn,), kind="bias")
            yield WeightSlot(f"{prefix}.up_proj.bias", up, (ffn,), kind="bias")
            yield WeightSlot(f"{prefix}.down_proj.bias", self.down_bias_D, (hidden,), kind="bias")
        if self.output_gate_1D is not None:
            yield WeightSlot(output_gate, self.output_gate_1D, (1, hidden))
