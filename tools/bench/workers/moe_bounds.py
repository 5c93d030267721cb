"""Worker: the machine's bounds on a MoE layer.

gemm: the experts' matrix products at the case's rows per expert, into buffers allocated
beforehand. read: all experts' weights summed once, the least a layer with few rows can do. With
several ranks each does its own experts' part.
"""

from __future__ import annotations

import torch

from bench.moe_case import MoEShape, MoEWeights, share
from bench.protocol import serve
from bench.workers.moe_base import Layer, MoEWorker


class Worker(MoEWorker):
    """A bound in the shape of a layer; its output is the input and is not checked."""

    def setup(self, threads: int) -> None:
        """Join the other ranks, to start each run together with them."""
        if self.ranks > 1:
            torch.distributed.init_process_group("gloo")

    def build(self, shape: MoEShape, weights: MoEWeights, what: str = "gemm") -> Layer:
        """Return the bound `what`: 'gemm' or 'read'."""
        self._shape = shape
        self._own = share(shape.experts, self.ranks, self.rank)
        w13_e2FD, w2_eDF = weights.w13_E2FD[self._own].clone(), weights.w2_EDF[self._own].clone()

        def read(x_TD: torch.Tensor) -> torch.Tensor:
            w13_e2FD.sum()
            w2_eDF.sum()
            return x_TD

        def multiply(x_TD: torch.Tensor) -> torch.Tensor:
            for w13_2FD, w2_DF, (x, hidden, up, down) in zip(
                w13_e2FD, w2_eDF, self._buffers, strict=True
            ):
                torch.mm(x, w13_2FD.T, out=up)
                torch.mm(hidden, w2_DF.T, out=down)
            return x_TD

        return read if what == "read" else multiply

    def prepare(self, topk_ids_TK: torch.Tensor) -> None:
        """Allocate inputs and outputs of every local expert's products."""
        rows = torch.bincount(topk_ids_TK.flatten(), minlength=self._shape.experts).tolist()
        hidden, ffn = self._shape.hidden, self._shape.ffn
        self._buffers = [
            (
                torch.randn(rows[index], hidden),
                torch.randn(rows[index], ffn),
                torch.empty(rows[index], 2 * ffn),
                torch.empty(rows[index], hidden),
            )
            for index in range(self._own.start, self._own.stop)
        ]


if __name__ == "__main__":
    serve(Worker())
