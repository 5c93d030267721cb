"""One rank of bench_overlap.py: a dropless layer, each setting of its chunks in turns.

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

from bench.loads import random_routing
from bench.moe_case import MoEShape, make_tokens, make_weights
from engine.config.loader import config_from_tree
from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.moe.dispatch.chunk_tuner import ChunkTuner
from engine.moe.layer import MoELayer
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec
from engine.profiling.device_clocks import HostClock
from engine.profiling.phase_clock import Phase

EXPOSED = (Phase.DISPATCH, Phase.COMBINE)


# Calls of a layer within which moe.overlap.chunks: auto must have chosen.
_TRIALS = 64


def build(shape: MoEShape, topology: Topology, name: str, seed: int) -> MoELayer:
    """Return one layer with seeded weights.

    name: a number of chunks or `auto`; `N copies` sends a row once for every expert.
    """
    chunks, _, copies = name.partition(" ")
    tree = {
        "model": {"path": "."},
        "moe": {
            "overlap": {"chunks": chunks if chunks == "auto" else int(chunks)},
            "dispatch": {"deduplicate": not copies},
        },
    }
    router = RouterSpec(num_experts=shape.experts, top_k=shape.top_k, normalize=True)
    layer = MoELayer(
        MoESpec(router=router, hidden=shape.hidden, ffn=shape.ffn),
        layer=0,
        topology=topology,
        config=config_from_tree(tree).moe,
        device=topology.device,
        dtype=torch.float32,
        tuner=ChunkTuner(topology.device),
    )
    weights = make_weights(shape, seed)
    own = layer.local_experts
    layer.gate.weight_ED.copy_(weights.gate_ED)
    layer.experts.stacked.w13_e2FD.copy_(weights.w13_E2FD[own])
    layer.experts.stacked.w2_eDF.copy_(weights.w2_EDF[own])
    return layer


@torch.inference_mode()
def run(options: dict[str, Any]) -> dict[str, Any]:
    """Time every setting `rounds` times, in turns. Collective over both ranks."""
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    # Over the network, also on one host: what overlap hides is a link.
    runtime = {"device": "cpu", "threads": 1, "shared_memory": False}
    tree = {"model": {"path": "."}, "runtime": runtime}
    topology = bootstrap.start(config_from_tree(tree))
    shape, tokens, seed = MoEShape(**options["shape"]), options["tokens"], options["seed"]
    layers = {name: build(shape, topology, name, seed) for name in options["chunks"]}
    ids_TK = random_routing(2 * tokens, shape.experts, shape.top_k, options["zipf"], seed)
    x_TD = make_tokens(make_weights(shape, seed), ids_TK, seed)
    x_TD = x_TD[tokens * rank : tokens * (rank + 1)].contiguous()
    for layer in layers.values():
        calls = 0
        while layer.layout_policy.tuner is not None and not layer.layout_policy.choices:
            assert calls < _TRIALS, "the tuner does not choose"
            layer(x_TD, group_tokens=2 * tokens)
            calls += 1
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "exposed": []} for name in layers}
    for turn in range(options["rounds"] + 1):
        for name, layer in layers.items():
            layer.telemetry.clock = clock = HostClock()
            dist.barrier()
            begin = time.perf_counter()
            out_TD = layer(x_TD, group_tokens=2 * tokens)
            seconds = time.perf_counter() - begin
            clock.close_step()
            spans = clock.read()
            assert spans is not None
            if not turn:
                found[name]["digest"] = hashlib.sha256(out_TD.numpy().tobytes()).hexdigest()
                found[name]["bytes"] = int(spans.num_bytes[np.isin(spans.phases, EXPOSED)].sum())
                continue
            found[name]["seconds"].append(seconds)
            found[name]["exposed"].append(float(spans.seconds_by_phase()[list(EXPOSED)].sum()))
    dist.barrier()
    bootstrap.stop(topology)
    for entry in found.values():
        entry["median_exposed"] = float(np.median(entry["exposed"]))
    for name, layer in layers.items():
        found[name]["chosen"] = next(iter(layer.layout_policy.choices.values()), None)
    return found


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # a peer's own shutdown may wait for a rank that has exited
