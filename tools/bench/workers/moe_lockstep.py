"""Worker: this engine's MoE layer, on one rank or expert-parallel over several."""

from __future__ import annotations

import torch

from bench.moe_case import MoEShape, MoEWeights
from bench.protocol import serve
from bench.workers.moe_base import MoEWorker
from engine.config_io import config_from_tree
from engine.distributed import bootstrap
from engine.moe.layer import MoELayer, MoESpec
from engine.moe.router import RouterSpec


class Worker(MoEWorker):
    """`engine.moe.layer.MoELayer` as Mixtral uses it."""

    def build(self, shape: MoEShape, weights: MoEWeights, backend: str = "auto") -> None:
        """backend: `moe.experts.backend`. Collective over all ranks."""
        config = config_from_tree(
            {
                "model": {"path": "."},  # no checkpoint is read: the layer stands alone
                "moe": {"experts": {"backend": backend}},
                "runtime": {"device": "cpu", "threads": torch.get_num_threads()},
            }
        )
        topology = bootstrap.start(config)
        router = RouterSpec(num_experts=shape.experts, top_k=shape.top_k, normalize=True)
        layer = MoELayer(
            MoESpec(router=router, hidden=shape.hidden, ffn=shape.ffn),
            layer=0,
            topology=topology,
            config=config.moe,
            device=topology.device,
            dtype=torch.float32,
        )
        own = slice(layer.first_expert, layer.first_expert + layer.num_local_experts)
        with torch.no_grad():
            layer.gate_weight_ED.copy_(weights.gate_ED)
            layer.experts.w13_e2FD.copy_(weights.w13_E2FD[own])
            layer.experts.w2_eDF.copy_(weights.w2_EDF[own])
        self._layer = layer

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Run the layer."""
        return self._layer(x_TD)


if __name__ == "__main__":
    serve(Worker())
