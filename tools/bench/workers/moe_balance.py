"""One rank of bench_balance.py: dropless layers with and without copies of experts, in turns.

python -m bench.workers.moe_balance '{"tokens": 4096, ...}'   # RANK, MASTER_ADDR, ...
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.loads import overloaded_rank_loads, routing_of, zipf_loads
from bench.moe_case import MoEShape, make_tokens, make_weights
from engine.config.loader import config_from_tree
from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.moe.layer import MoELayer
from engine.moe.placement.placement import LayerPlacement, Placement, Precision
from engine.moe.placement.search import plan_layer
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec
from engine.profiling.device_clocks import HostClock, NoClock
from engine.profiling.phase_clock import Phase

RANKS = 2


def load_of(name: str, tokens: int, shape: MoEShape) -> np.ndarray:
    """Return the rows of each expert: `hot:RATIO`, `zipf:EXPONENT` or `even`."""
    kind, _, value = name.partition(":")
    if kind == "hot":
        return overloaded_rank_loads(tokens, shape.experts, shape.top_k, float(value), RANKS)
    return zipf_loads(tokens, shape.experts, shape.top_k, float(value) if kind == "zipf" else 0.0)


def build(
    shape: MoEShape,
    topology: Topology,
    placement: LayerPlacement,
    precision: Precision,
    row_times: list[float],
    seed: int,
) -> MoELayer:
    """Make one layer of this rank."""
    config = config_from_tree({"model": {"path": "."}})
    router = RouterSpec(num_experts=shape.experts, top_k=shape.top_k, normalize=True)
    speeds = Placement(RANKS, shape.experts, {}, row_times_W=row_times).speeds_W
    layer = MoELayer(
        MoESpec(router=router, hidden=shape.hidden, ffn=shape.ffn),
        layer=0,
        topology=topology,
        config=config.moe,
        device=topology.device,
        dtype=torch.float32,
        placement=placement,
        precision=precision,
        speeds_W=speeds,
    )
    weights = make_weights(shape, seed)
    with torch.no_grad():
        layer.gate.weight_ED.copy_(weights.gate_ED)
        for local, expert in enumerate(layer.local_experts):
            w13_2FD, w2_DF = weights.w13_E2FD[expert], weights.w2_EDF[expert]
            layer.experts.set_weights(local, w13_2FD, w2_DF)
    layer.finalize_weights()
    return layer


@torch.inference_mode()
def run(options: dict[str, Any]) -> dict[str, Any]:
    """Time each layer `rounds` times, in turns. Collective over both ranks."""
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    tree = {"model": {"path": "."}, "runtime": {"device": "cpu", "threads": 1}}
    topology = bootstrap.start(config_from_tree(tree))
    shape, tokens, seed = MoEShape(**options["shape"]), options["tokens"], options["seed"]
    weights, times = make_weights(shape, seed), options["row_times"]
    contiguous = LayerPlacement.contiguous(shape.experts, RANKS)
    cases: list[tuple[str, MoELayer, torch.Tensor]] = []
    for name in options["loads"]:
        load_E = load_of(name, RANKS * tokens, shape)
        ids_TK = routing_of(load_E, RANKS * tokens, seed)
        x_TD = make_tokens(weights, ids_TK, seed)[tokens * rank : tokens * (rank + 1)].contiguous()
        planned = plan_layer(
            {"": load_E[None]},
            RANKS,
            num_copies=options["copies"],
            keep_homes=True,
            row_times_W=times,
            margin=0.0,
        )
        for kind, placement in (("contiguous", contiguous), ("copies", planned)):
            layer = build(shape, topology, placement, "model", times, seed)
            cases.append((f"{name} {kind}", layer, x_TD))
    found: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "experts": [], "rows": []} for name, _, _ in cases
    }
    for turn in range(options["rounds"] + options["warm_up"]):
        for name, layer, x_TD in cases:
            layer.telemetry.clock = clock = HostClock()
            layer.telemetry.loads.clear()
            dist.barrier()
            begin = time.perf_counter()
            layer(x_TD)
            seconds = time.perf_counter() - begin
            clock.close_step()
            layer.telemetry.clock = NoClock()
            spans = clock.read()
            assert spans is not None
            if turn < options["warm_up"]:
                continue
            entry = found[name]
            entry["seconds"].append(seconds)
            entry["experts"].append(float(spans.seconds_by_phase()[Phase.EXPERTS]))
            entry["rows"].append(int(layer.telemetry.loads.layers[0].own_after.sum()))
    dist.barrier()
    bootstrap.stop(topology)
    return found


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))), flush=True)
