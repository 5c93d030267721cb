"""Base of the MoE-layer workers: make weights and tokens, time a forward, save an output.

A worker implements how to build its layer; tokens of a case are split over its ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.moe_case import MoEShape, MoEWeights, make_ids, make_tokens, make_weights, share
from bench.protocol import memory_mib

Layer = Callable[[torch.Tensor], torch.Tensor]


class MoEWorker:
    """Base class. Subclasses implement `build`, and `setup` where it is needed."""

    def setup(self, threads: int) -> None:
        """Run once before the layers are built, e.g. to make process groups."""

    def build(self, shape: MoEShape, weights: MoEWeights, **settings: Any) -> Layer:
        """Make one layer with the weights (of this rank's experts) copied into it.

        The layer maps this rank's tokens [T, D] to their outputs; collective where there are
        several ranks.
        """
        raise NotImplementedError

    def prepare(self, topk_ids_TK: torch.Tensor) -> None:
        """Take the experts that all ranks' tokens choose, before a run; by default ignored."""

    def load(
        self, shape: dict[str, int], seed: int, threads: int, layers: int, **settings: Any
    ) -> dict[str, Any]:
        """Build `layers` equal layers in separate memory. threads: CPU threads of this rank."""
        torch.set_num_threads(threads)
        self.rank = int(os.environ.get("RANK", "0"))
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self._shape, self._seed = MoEShape(**shape), seed
        self._weights = make_weights(self._shape, seed)
        self.setup(threads)
        self._layers = [self.build(self._shape, self._weights, **settings) for _ in range(layers)]
        torch.set_num_threads(threads)  # a framework may have chosen its own in the meantime
        return memory_mib()

    @torch.inference_mode()
    def run(self, tokens: int, load: str, iterations: int) -> dict[str, Any]:
        """Return seconds of each of `iterations` forwards, all ranks starting together.

        The layers take turns, as in a model: one layer's weights would stay in the caches.
        """
        x_TD = self._tokens(tokens, load)
        seconds = []
        for index in range(iterations):
            layer = self._layers[index % len(self._layers)]
            self._barrier()
            begin = time.perf_counter()
            layer(x_TD)
            seconds.append(time.perf_counter() - begin)
        return {"seconds": seconds}

    @torch.inference_mode()
    def output(self, tokens: int, load: str, path: str) -> dict[str, Any]:
        """Save this rank's output rows as `path`.RANK.npy, to be checked against float64."""
        out_TD = self._layers[-1](self._tokens(tokens, load))
        np.save(f"{path}.{self.rank}.npy", out_TD.float().numpy())
        return memory_mib()

    def _tokens(self, tokens: int, load: str) -> torch.Tensor:
        topk_ids_TK = make_ids(self._shape, tokens, load, self._seed)
        self.prepare(topk_ids_TK)
        x_TD = make_tokens(self._weights, topk_ids_TK, self._seed)
        return x_TD[share(tokens, self.ranks, self.rank)].contiguous()

    def _barrier(self) -> None:
        if self.ranks > 1:
            torch.distributed.barrier()
