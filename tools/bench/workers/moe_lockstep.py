"""Worker: this engine's MoE layer, on one rank or expert-parallel over several."""

from __future__ import annotations

import torch

from bench.moe_case import MoEShape, MoEWeights
from bench.protocol import serve
from bench.workers.moe_base import Layer, MoEWorker
from engine.config.loader import config_from_tree
from engine.distributed import bootstrap
from engine.moe.layer import MoELayer
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec


class Worker(MoEWorker):
    """`engine.moe.layer.MoELayer` as Mixtral uses it."""

    def setup(self, threads: int) -> None:
        """Join the run. Collective over all ranks."""
        self._config = config_from_tree(
            {
                "model": {"path": "."},  # no checkpoint is read: there is only a layer
                "runtime": {"device": "cpu", "threads": threads},
            }
        )
        self._topology = bootstrap.start(self._config)

    def build(self, shape: MoEShape, weights: MoEWeights) -> Layer:
        """Make one layer. Collective over all ranks."""
        router = RouterSpec(num_experts=shape.experts, top_k=shape.top_k, normalize=True)
        layer = MoELayer(
            MoESpec(router=router, hidden=shape.hidden, ffn=shape.ffn),
            layer=0,
            topology=self._topology,
            config=self._config.moe,
            device=self._topology.device,
            dtype=torch.float32,
        )
        own = layer.local_experts
        with torch.no_grad():
            layer.gate.weight_ED.copy_(weights.gate_ED)
            layer.experts.stacked.w13_e2FD.copy_(weights.w13_E2FD[own])
            layer.experts.stacked.w2_eDF.copy_(weights.w2_EDF[own])
        layer.finalize_weights()
        return layer


if __name__ == "__main__":
    serve(Worker())
