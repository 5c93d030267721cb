"""One rank of bench_speed_aware.py: a layer dropless, under even capacity, and under capacity by
measured speed, in turns.

    python -m bench.workers.moe_speed_aware '{"tokens": 4096, ...}'   # RANK, MASTER_ADDR, ...

Legend: T tokens on this rank.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from bench.loads import routing_of, zipf_loads
from bench.moe_case import MoEShape, make_tokens, make_weights
from bench.workers.moe_overlap import build
from engine.config import CapacityConfig
from engine.config.loader import config_from_tree
from engine.distributed import bootstrap
from engine.moe.capacity.speed_weights import ONE, SpeedWeights
from engine.moe.step import MoEStep
from engine.profiling.device_clocks import HostClock, NoClock
from engine.profiling.phase_clock import Phase
from engine.profiling.row_time import RowTime

NAMES = ("dropless", "even", "speed_aware")


@torch.inference_mode()
def run(options: dict[str, Any]) -> dict[str, Any]:
    """Time each capacity `rounds` times, in turns. Collective over both ranks."""
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    tree = {"model": {"path": "."}, "runtime": {"device": "cpu", "threads": 1}}
    topology = bootstrap.start(config_from_tree(tree))
    shape, tokens, seed = MoEShape(**options["shape"]), options["tokens"], options["seed"]
    layer = build(shape, topology, "1", seed)
    loads = zipf_loads(2 * tokens, shape.experts, shape.top_k, options["zipf"])
    x_TD = make_tokens(make_weights(shape, seed), routing_of(loads, 2 * tokens, seed), seed)
    x_TD = x_TD[tokens * rank : tokens * (rank + 1)].contiguous()
    even = MoEStep.whole(
        torch.full((tokens,), rank), torch.arange(tokens), num_tokens_W=(tokens, tokens)
    )
    capacity = CapacityConfig(
        policy="token_drop", factor=options["factor"], scope="rank", phases=("prefill", "decode")
    )
    settings = {"dropless": CapacityConfig(), "even": capacity, "speed_aware": capacity}
    found: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "experts": [], "rows": [], "dropped": 0} for name in NAMES
    }
    row_time, shares = RowTime(), SpeedWeights()
    for turn in range(options["rounds"] + options["warm_up"]):
        for name in NAMES:
            layer.set_capacity(settings[name])
            step = None if name == "dropless" else even
            if name == "speed_aware":
                step = replace(even, weights_W=shares.current)
            layer.telemetry.clock = clock = HostClock()
            layer.telemetry.loads.clear()
            layer.drops.read_and_reset()
            dist.barrier()
            begin = time.perf_counter()
            layer(x_TD, step)
            seconds = time.perf_counter() - begin
            clock.close_step()
            layer.telemetry.clock = NoClock()
            spans = clock.read()
            assert spans is not None
            row_time.add(spans)
            # As in the step control message: every rank gets the time per row of all ranks.
            row_times = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
            dist.all_gather(row_times, torch.tensor([row_time.picoseconds_per_row]))
            shares.update([int(each) for each in row_times])
            if turn < options["warm_up"]:
                continue
            entry = found[name]
            entry["seconds"].append(seconds)
            entry["experts"].append(float(spans.seconds_by_phase()[Phase.EXPERTS]))
            entry["rows"].append(int(layer.telemetry.loads.layers[0].own_after.sum()))
            entry["dropped"] += layer.drops.read_and_reset().dropped
    found["speed_aware"]["shares"] = [share / ONE for share in shares.current or (ONE, ONE)]
    found["speed_aware"]["paces"] = [int(each) for each in row_times]
    dist.barrier()
    bootstrap.stop(topology)
    return found


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))), flush=True)
