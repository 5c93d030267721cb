"""Plan a placement: homes and copies of experts from recorded loads, as a file for moe.placement.

    python tools/plan_placement.py RUN/routing --ranks 8 --target 0.95 --out placement.yaml
    python tools/plan_placement.py text=A/routing tasks=B/routing --ranks 8 --copies 8 --out p.yaml
    python tools/plan_placement.py A/routing --ranks 8 --memory-gib 4 --model DIR --precision int4 \
        --out placement.yaml
    python tools/plan_placement.py B/routing --from placement.yaml --max-moves 2 --out next.yaml
    python tools/plan_placement.py B/routing --ranks 8 --speeds out.jsonl.report.json --out p.yaml

A TRACE is a folder that profiler.routing filled, or an .npz file (tools/placement/traces.py); each
is one kind of traffic, and a plan is made for each alone and for all mixed. --speeds takes a file
(tools/placement/speeds.py) or the report of a job. Printed are, per kind, the share of perfect
balance today (contiguous, no copies, or that of --from), as planned, and at best; what 0, 1, 2, 4
... copies per layer would give; then one JSON line. Equal arguments give an equal file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a checkout needs no install

import numpy as np
from bench.report import table
from placement import heat_map
from placement.options import parse
from placement.speeds import read_row_times
from placement.traces import Domain, read_domains

from engine.config.validation import ConfigError
from engine.moe.placement import search
from engine.moe.placement.budget import (
    copy_bytes,
    doubling,
    fewest_copies,
    frontier_times,
    slots_for_memory,
)
from engine.moe.placement.placement import Placement
from engine.moe.placement.placement_file import read_placement, write_placement
from engine.moe.placement.predict import bound, rank_times

_FRONTIER_LAYERS = 12  # of more, so many at equal distances
_WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, print and write; return the exit code.

    Raises:
        ValueError: something cannot be read, planned or written; the message names what to do.
    """
    options = parse(argv, (__doc__ or "").splitlines()[0])
    picture = options.heat_map or options.out.with_suffix(".html")
    heat_map.check_available(picture)
    domains = read_domains(options.trace)
    loads: search.Loads = {domain.name: domain.by_layer for domain in domains}
    num_experts = domains[0].loads_SLE.shape[2]
    today = _today(options, domains, num_experts)
    num_ranks = today.num_ranks
    if num_ranks > num_experts:
        raise ValueError(
            f"--ranks {num_ranks}: every rank is the home of an expert, and the model has "
            f"{num_experts}; give at most as many"
        )
    times_W = _row_times(options, today, domains)
    today = search.describe(replace(today, row_times_W=times_W or ()), loads)
    if options.source is not None:
        planned = search.improve(
            today,
            loads,
            max_moves=options.max_moves,
            seed=options.seed,
            processes=options.processes,
        )
    else:
        planned = _plan(options, domains, loads, times_W)
    rows = _shares(today, planned, loads)
    print(
        f"{len(planned.layers)} layers, {num_experts} experts, {num_ranks} ranks, "
        f"{planned.num_copies} copies ({planned.precision})\n"
    )
    print(table(["traffic", "today", "planned", "bound"], [list(row.values()) for row in rows]))
    points = [] if options.source is not None else _frontier(options, loads, planned)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_placement(planned, options.out)
        heat_map.draw(
            _rank_loads(today, loads), _rank_loads(planned, loads), search.layers_of(loads), picture
        )
    except OSError as error:
        raise ValueError(f"--out {options.out}: cannot be written: {error.strerror}") from error
    print(f"\nplacement: {options.out}\nheat map: {picture}\n")
    print(json.dumps(_record(options, planned, rows, points), allow_nan=False))
    return 0


def _today(options: argparse.Namespace, domains: Sequence[Domain], num_experts: int) -> Placement:
    """Return the placement that --from names, or contiguous homes without copies."""
    if options.source is None:
        layers = domains[0].layers
        empty = Placement(options.ranks, num_experts, {}, fingerprint=domains[0].fingerprint)
        return (
            replace(empty, layers={index: empty.layer(index) for index in layers})
            if (options.ranks <= num_experts)
            else empty
        )
    found = read_placement(options.source)
    for name, own, other in (
        ("experts", found.num_experts, num_experts),
        ("ranks", found.num_ranks, options.ranks or found.num_ranks),
        ("model", found.fingerprint, domains[0].fingerprint),
    ):
        if own != other and None not in (own, other):
            raise ValueError(f"--from {options.source}: it has {name} {own}, here are {other}")
    return found


def _row_times(
    options: argparse.Namespace, today: Placement, domains: Sequence[Domain]
) -> tuple[float, ...] | None:
    if options.speeds is None:
        return tuple(today.row_times_W) or None
    mean = np.mean([domain.loads_SLE.sum(2).mean() for domain in domains])
    return read_row_times(options.speeds, today.num_ranks, float(mean) / today.num_ranks)


def _plan(
    options: argparse.Namespace,
    domains: Sequence[Domain],
    loads: search.Loads,
    times_W: tuple[float, ...] | None,
) -> Placement:
    """Return the plan for a budget."""
    layers, usual = domains[0].layers, _usual(options, times_W)
    counts: int | dict[int, int]
    slots = None
    if options.copies is not None:
        counts = options.copies
    elif options.memory_gib is not None:
        size = copy_bytes(*_expert_weights(options), options.precision)
        memory = options.memory_gib * 2**30
        slots = slots_for_memory(memory, size, layers, options.ranks)
        counts = {index: sum(each) for index, each in slots.items()}
    else:
        tasks = [
            partial(
                fewest_copies,
                {name: each[index] for name, each in loads.items()},
                options.ranks,
                options.target,
                seed=options.seed + index,
                **usual,
            )
            for index in layers
        ]
        found = search.map_layers(tasks, options.processes)
        counts = dict(zip(layers, found, strict=True))
    return search.plan(
        loads,
        domains[0].loads_SLE.shape[2],
        options.ranks,
        num_copies=counts,
        precision=options.precision,
        seed=options.seed,
        slots=slots,
        fingerprint=domains[0].fingerprint,
        processes=options.processes,
        effort=options.effort,
        **usual,
    )


def _usual(options: argparse.Namespace, times_W: tuple[float, ...] | None) -> dict[str, Any]:
    return {
        "row_times_W": times_W,
        "keep_homes": options.keep_homes,
        "nodes": options.nodes,
        "node_cost": options.node_cost,
    }


def _expert_weights(options: argparse.Namespace) -> tuple[int, int]:
    """Return the weights of an expert and the bytes of one, from --expert-bytes or --model."""
    if options.expert_bytes is not None:
        return options.expert_bytes // 2, 2
    if options.model is None:
        raise ValueError(
            "--memory-gib: the size of an expert is needed; give --model DIR, or --expert-bytes N "
            "of an expert in 16 bits"
        )
    from engine.models.registry import read_config, read_spec
    from engine.models.spec import SparseSpec

    config = read_config(options.model)
    sizes = [
        layer.mlp.moe.hidden * layer.mlp.moe.ffn * 3
        for layer in read_spec(config).layers
        if isinstance(layer.mlp, SparseSpec)
    ]
    if not sizes:
        raise ValueError(f"--model {options.model}: it has no MoE layers")
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return max(sizes), _WEIGHT_BYTES.get(dtype, 4)


def _shares(today: Placement, planned: Placement, loads: search.Loads) -> list[dict[str, Any]]:
    times_W = planned.row_times_W or None
    rows = []
    for name, by_layer in search.with_mixed(loads).items():
        steps_SE = np.concatenate(list(by_layer.values()))
        rows.append(
            {
                "traffic": name,
                "today": round(today.domains[name].share, 4),
                "planned": round(planned.domains[name].share, 4),
                "bound": round(bound(steps_SE, planned.num_ranks, times_W), 4),
            }
        )
    return rows


def _frontier(
    options: argparse.Namespace, loads: search.Loads, planned: Placement
) -> list[dict[str, Any]]:
    """Print and return the shares with 0, 1, 2, 4 ... copies per layer, searched for quickly."""
    layers = search.layers_of(loads)
    most = max(planned.num_ranks, *(planned.layer(index).num_copies for index in layers))
    counts = doubling(most)
    if len(layers) > _FRONTIER_LAYERS:
        layers = [layers[n] for n in np.linspace(0, len(layers) - 1, _FRONTIER_LAYERS).astype(int)]
    every = search.with_mixed(loads)
    tasks = [
        partial(
            frontier_times,
            {name: each[index] for name, each in every.items() if name in loads},
            planned.num_ranks,
            counts,
            seed=options.seed + index,
            **_usual(options, tuple(planned.row_times_W) or None),
        )
        for index in layers
    ]
    found = list(search.map_layers(tasks, options.processes))
    points = []
    for number, count in enumerate(counts):
        shares: dict[str, Any] = {"copies": count}
        for name in loads:
            ideal, slowest = (sum(layer[number][name][n] for layer in found) for n in (0, 1))
            shares[name] = round(ideal / slowest, 4) if slowest else 1.0
        points.append(shares)
    of = "" if len(layers) == len(planned.layers) else f", over {len(layers)} of the layers"
    print(f"\nshare by copies per layer, searched for quickly{of}")
    print(table(["copies", *loads], [list(point.values()) for point in points]))
    return points


def _rank_loads(placement: Placement, loads: search.Loads) -> np.ndarray:
    """Return each rank's mean time over the mean rank's by layer, over all traffic; [L, W]."""
    rows = []
    for index in search.layers_of(loads):
        steps_SE = np.concatenate([by_layer[index] for by_layer in loads.values()])
        times_W = rank_times(
            placement.layer(index), steps_SE, placement.num_ranks, placement.row_times_W or None
        ).mean(1)
        rows.append(times_W / max(float(times_W.mean()), 1e-12))
    return np.array(rows)


def _record(
    options: argparse.Namespace,
    planned: Placement,
    rows: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    copies = {index: layer.num_copies for index, layer in sorted(planned.layers.items())}
    held = [r for layer in planned.layers.values() for ranks in layer.copies_E for r in ranks]
    shown = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    return {
        "tool": "plan_placement",
        "options": shown,
        "shares": rows,
        "copies": copies,
        "copies_of_fullest_rank": int(np.bincount(held, minlength=1).max()),
        "frontier": points,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
