"""Worker: DeepSpeed's MoE layer, expert-parallel over all ranks on gloo.

Its all-to-all sends equal, padded buffers. Dropless pads every expert to the busiest one's rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.moe_case import MoEShape, MoEWeights, share
from bench.protocol import serve
from bench.workers.moe_base import Layer, MoEWorker


class GatedExpert(nn.Module):
    """Mixtral's expert; DeepSpeed has none of its own."""

    def __init__(self, shape: MoEShape) -> None:
        super().__init__()
        self.w13 = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.w2 = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (silu(x w1^T) * (x w3^T)) w2^T."""
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class Worker(MoEWorker):
    """`deepspeed.moe.layer.MoE`, top-2 with normalised weights as Mixtral's."""

    def setup(self, threads: int) -> None:
        """Join the run. Collective over all ranks."""
        import deepspeed

        # Otherwise init_distributed compiles an extension for a minute or two.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)

    def build(
        self, shape: MoEShape, weights: MoEWeights, capacity_factor: float | None = None
    ) -> Layer:
        """Make one layer; capacity_factor None: dropless. Collective over all ranks."""
        from deepspeed.moe.layer import MoE

        layer: Any = MoE(
            hidden_size=shape.hidden,
            expert=GatedExpert(shape),
            num_experts=shape.experts,
            ep_size=self.ranks,
            k=shape.top_k,
            eval_capacity_factor=capacity_factor or 1.0,
            drop_tokens=capacity_factor is not None,
            top2_2nd_expert_sampling=False,  # else the second expert is drawn with noise
        ).eval()
        layer.set_deepspeed_parallelism()
        inner = layer.deepspeed_moe
        own = share(shape.experts, self.ranks, self.rank)
        with torch.no_grad():
            inner.gate.wg.weight.copy_(weights.gate_ED)
            for expert, index in zip(
                inner.experts.deepspeed_experts, range(own.start, own.stop), strict=True
            ):
                expert.w13.weight.copy_(weights.w13_E2FD[index])
                expert.w2.weight.copy_(weights.w2_EDF[index])
        # One sequence of this rank's tokens.
        return lambda x_TD: layer(x_TD[None])[0][0]


if __name__ == "__main__":
    serve(Worker())
