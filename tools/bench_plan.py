"""How long planning takes, and what a plan is worth on steps that it was not made for.

    python tools/bench_plan.py                            # 61 layers of 256 experts on 64 ranks
    python tools/bench_plan.py --layers 4 --experts 32 --ranks 8 --copies 8

Loads are generated (tools/bench/drifting_loads.py): zipf popularity that drifts. A plan is made
from the first steps; the table has its share of perfect balance on these and on the steps that
follow, beside that of contiguous homes, of a balanced packing without copies, and of the usual
greedy placement, which knows mean loads alone, with the same copies and the same split. One JSON
line follows.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench.drifting_loads import drifting_loads
from bench.environment_record import environment_record
from bench.report import emit, table

from engine.moe.placement import search
from engine.moe.placement.placement import LayerPlacement, Placement
from engine.ops import native

HEADER = ["placement", "planned for", "later", "later, least"]


def greedy_layer(loads_SE: np.ndarray, num_ranks: int, num_copies: int) -> LayerPlacement:
    """Return the usual greedy placement by mean loads.

    A further copy goes to the expert with most rows per host; then hosts, most rows first, go to
    the rank with fewest rows that has room.
    """
    mean_E = loads_SE.mean(0)
    num_experts = len(mean_E)
    hosts_E = np.ones(num_experts, dtype=np.int64)
    for _ in range(num_copies):
        hosts_E[np.where(hosts_E < num_ranks, mean_E / hosts_E, -1).argmax()] += 1
    room_W = np.full(num_ranks, -(-(num_experts + num_copies) // num_ranks))
    load_W = np.zeros(num_ranks)
    found: list[list[int]] = [[] for _ in range(num_experts)]
    each_E = mean_E / hosts_E
    for expert in np.argsort(-each_E, kind="stable").tolist():
        for _ in range(int(hosts_E[expert])):
            free_W = room_W > 0
            free_W[found[expert]] = False
            if not free_W.any():
                continue
            rank = int(np.where(free_W, load_W, np.inf).argmin())
            found[expert].append(rank)
            load_W[rank] += each_E[expert]
            room_W[rank] -= 1
    return LayerPlacement(
        tuple(hosts[0] for hosts in found), tuple(tuple(sorted(hosts[1:])) for hosts in found)
    )


def measure(options: argparse.Namespace) -> tuple[list[list[Any]], dict[str, Any]]:
    """Return the rows of the table, and times and shares for the record."""
    rows_per_step = options.rows_per_rank * options.ranks
    loads = {
        layer: drifting_loads(
            2 * options.steps,
            options.experts,
            rows_per_step,
            exponent=options.zipf,
            drift=options.drift,
            memory=options.memory,
            seed=1000 * options.seed + layer,
        )
        for layer in range(options.layers)
    }
    first = {layer: loads_SE[: options.steps] for layer, loads_SE in loads.items()}
    later = {layer: loads_SE[options.steps :] for layer, loads_SE in loads.items()}
    make = partial(
        search.plan,
        {"recorded": first},
        options.experts,
        options.ranks,
        seed=options.seed,
        processes=options.processes,
    )
    start, start_cpu = time.perf_counter(), _cpu_seconds()
    planned = make(num_copies=options.copies, keep_homes=options.keep_homes, effort=options.effort)
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - start_cpu
    greedy = {n: greedy_layer(x, options.ranks, options.copies) for n, x in first.items()}
    candidates = {
        "contiguous": Placement(options.ranks, options.experts, {}),
        "packed homes, no copies": make(num_copies=0, effort=0.0),
        "greedy": Placement(options.ranks, options.experts, greedy),
        "planned": planned,
    }
    rows, shares = [], {}
    for name, placement in candidates.items():
        before, after = (
            search.describe(placement, {"": each}).domains[""] for each in (first, later)
        )
        shares[name] = {
            "first": before.share,
            "later": after.share,
            "least": min(after.layer_shares.values()),
        }
        rows.append([name, *(f"{share:.3f}" for share in shares[name].values())])
    return rows, {"seconds": seconds, "cpu_seconds": cpu_seconds, "shares": shares}


def _cpu_seconds() -> float:
    """Return the processor time of this process and of those that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; print the table and the JSON line; return 1 where a share or a time is not reached."""
    options = _parse(argv)
    rows, found = measure(options)
    text = "\n".join(
        [
            f"{options.layers} layers, {options.experts} experts, {options.ranks} ranks, "
            f"{options.copies} copies per layer, {options.steps} steps: planned in "
            f"{found['seconds']:.0f} s ({found['cpu_seconds']:.0f} s of processor time) by "
            f"{options.processes} processes; {native.reason()}",
            table(HEADER, rows),
        ]
    )
    kept = {name: value for name, value in vars(options).items() if name != "out"}
    record = {"bench": "plan", **environment_record(("torch", "numpy")), "options": kept, **found}
    emit(text, record, options.out, "bench_plan")
    reached = found["shares"]["planned"]["later"] >= options.want
    return 0 if reached and found["seconds"] <= options.most_seconds else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--layers", type=int, default=61)
    add("--experts", type=int, default=256)
    add("--ranks", type=int, default=64)
    add("--copies", type=int, default=64, help="per layer")
    add("--steps", type=int, default=200, help="planned for; as many follow")
    add("--rows-per-rank", type=int, default=16384, help="2,048 tokens of 8 experts")
    add("--zipf", type=float, default=0.5, help="exponent of the popularity")
    add("--drift", type=float, default=0.1, help="standard deviation of its logarithm")
    add("--memory", type=float, default=50.0, help="steps in which a deviation decays to 1/e")
    add("--keep-homes", action="store_true")
    add("--effort", type=float, default=1.0)
    add("--processes", type=int, default=len(os.sched_getaffinity(0)))
    add("--seed", type=int, default=0)
    add("--want", type=float, default=0.0, help="exit code 1 below this share on later steps")
    add("--most-seconds", type=float, default=600.0, help="exit code 1 above")
    add("--out", type=Path, help="folder for bench_plan.txt and .json")
    options = parser.parse_args(argv)
    if options.ranks > options.experts:
        parser.error(f"--ranks {options.ranks}: at most the {options.experts} experts")
    return options


if __name__ == "__main__":
    sys.exit(main())
