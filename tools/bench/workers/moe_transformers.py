"""Worker: transformers' Mixtral block in one process."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from bench.moe_case import MoEShape, MoEWeights
from bench.protocol import serve
from bench.workers.moe_base import Layer, MoEWorker


class Worker(MoEWorker):
    """`MixtralSparseMoeBlock` with one of transformers' experts implementations."""

    def build(self, shape: MoEShape, weights: MoEWeights, experts: str = "eager") -> Layer:
        """Make one block; experts: 'eager', 'grouped_mm' or 'batched_mm'."""
        sizes: dict[str, Any] = {
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "experts_implementation": experts,
        }
        block: Any = MixtralSparseMoeBlock(MixtralConfig(**sizes)).eval()
        with torch.no_grad():
            block.gate.weight.copy_(weights.gate_ED)
            block.experts.gate_up_proj.copy_(weights.w13_E2FD)
            block.experts.down_proj.copy_(weights.w2_EDF)
        # One sequence of all tokens.
        return lambda x_TD: block(x_TD[None])[0]


if __name__ == "__main__":
    serve(Worker())
