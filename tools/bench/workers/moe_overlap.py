"""One rank of bench_overlap.py: a dropless layer with each number of chunks in turns.

    python -m bench.workers.moe_overlap '{"tokens": 4096, ...}'    # RANK, MASTER_ADDR, ... as usual

Legend: T tokens on this rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.loads import routing_of, zipf_loads
from bench.moe_case import MoEShape, make_tokens, make_weights
from engine.config_io import config_from_tree
from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.moe.layer import MoELayer, MoESpec
from engine.moe.router import RouterSpec
from engine.profiling.phases import HostClock, Phase

EXPOSED = (Phase.DISPATCH, Phase.COMBINE)


def build(shape: MoEShape, topology: Topology, chunks: int, seed: int) -> MoELayer:
    """One layer with seeded weights."""
    tree = {"model": {"path": "."}, "moe": {"overlap": {"chunks": chunks}}}
    router = RouterSpec(num_experts=shape.experts, top_k=shape.top_k, normalize=True)
    layer = MoELayer(
        MoESpec(router=router, hidden=shape.hidden, ffn=shape.ffn),
        layer=0,
        topology=topology,
        config=config_from_tree(tree).moe,
        device=topology.device,
        dtype=torch.float32,
    )
    weights = make_weights(shape, seed)
    own = slice(layer.first_expert, layer.first_expert + layer.num_local_experts)
    layer.gate_weight_ED.copy_(weights.gate_ED)
    layer.experts.w13_e2FD.copy_(weights.w13_E2FD[own])
    layer.experts.w2_eDF.copy_(weights.w2_EDF[own])
    return layer


@torch.inference_mode()
def run(options: dict[str, Any]) -> dict[str, Any]:
    """Time every chunk count `rounds` times, in turns. Collective over both ranks."""
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    tree = {"model": {"path": "."}, "runtime": {"device": "cpu", "threads": 1}}
    topology = bootstrap.start(config_from_tree(tree))
    shape, tokens, seed = MoEShape(**options["shape"]), options["tokens"], options["seed"]
    layers = {n: build(shape, topology, n, seed) for n in options["chunks"]}
    loads = zipf_loads(2 * tokens, shape.experts, shape.top_k, options["zipf"])
    x_TD = make_tokens(make_weights(shape, seed), routing_of(loads, 2 * tokens, seed), seed)
    x_TD = x_TD[tokens * rank : tokens * (rank + 1)].contiguous()
    found: dict[int, dict[str, Any]] = {n: {"seconds": [], "exposed": []} for n in layers}
    for turn in range(options["rounds"] + 1):
        for n, layer in layers.items():
            layer.telemetry.clock = clock = HostClock()
            dist.barrier()
            begin = time.perf_counter()
            out_TD = layer(x_TD)
            seconds = time.perf_counter() - begin
            clock.close_step()
            spans = clock.read()
            assert spans is not None
            if not turn:
                found[n]["digest"] = hashlib.sha256(out_TD.numpy().tobytes()).hexdigest()
                continue
            found[n]["seconds"].append(seconds)
            found[n]["exposed"].append(float(spans.seconds_by_phase()[list(EXPOSED)].sum()))
    dist.barrier()
    bootstrap.stop(topology)
    for entry in found.values():
        entry["median_exposed"] = float(np.median(entry["exposed"]))
    return {str(n): entry for n, entry in found.items()}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # a peer's own shutdown may wait for a rank that has already left
