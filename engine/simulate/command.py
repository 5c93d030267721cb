"""Command: `lockstep simulate`, from its options to the table."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.simulate import report
from engine.simulate.cost_model import CostModel
from engine.simulate.device_file import DeviceFile, read_device, write_device
from engine.simulate.figures import cost_model
from engine.simulate.fit import fit_costs
from engine.simulate.loads import Traffic, make_traffic, read_traffic
from engine.simulate.placements import Placements
from engine.simulate.predict import Simulator
from engine.simulate.scenario import scenarios
from engine.simulate.shape import Shape, read_shape
from engine.simulate.spans import read_calls


def run(options: argparse.Namespace) -> int:
    """Print the predictions; return the exit code.

    Raises:
        ValueError: an option or a file is wrong; it names it and what to do.
    """
    _check(options)
    device = None if options.device is None else read_device(options.device)
    traffic = _traffic(options)
    shape = _shape(options, traffic, device)
    costs = _costs(options, device, shape)
    placements = Placements(traffic, options.placement, options.seed)
    chosen = scenarios(
        num_experts=traffic.num_experts,
        top_k=traffic.top_k,
        ranks=options.ranks,
        expert=options.expert,
        gammas=options.gamma,
        scope=options.scope,
        consensus=options.consensus,
        copies=options.copies if options.placement is None else (-1,),
        precision=options.precision,
        tokens=options.tokens or (None,),
        ranks_per_node=options.ranks_per_node,
        slower=dict(options.slower),
    )
    simulator = Simulator(
        traffic,
        placements,
        shape=shape,
        costs=costs,
        target=options.target,
        seed=options.seed,
    )
    found = [simulator.predict(scenario) for scenario in chosen]
    if options.plot is not None:
        report.plot(options.plot, found, costs)
    if options.json:
        labels = report.labels(found)
        record: dict[str, Any] = {
            "traffic": traffic.name,
            "steps": len(traffic.loads_SLE),
            "times": report.origin(costs),
            "scenarios": [report.as_json(*pair) for pair in zip(found, labels, strict=True)],
        }
        print(json.dumps(record, allow_nan=False))
    else:
        report.print_table(found, traffic, costs)
        if options.plot is not None:
            print(f"plot: {options.plot}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError where options do not go together."""
    if (options.trace is None) == (options.synthetic is None):
        raise ValueError(
            "TRACE: give the folder of profiler.routing of a job, or --synthetic SKEW with "
            "--experts, --top-k and --tokens"
        )
    if options.synthetic is not None:
        for name in ("experts", "top_k", "tokens"):
            if getattr(options, name) is None:
                raise ValueError(f"--{name.replace('_', '-')}: --synthetic needs it")
        if options.top_k > options.experts:
            raise ValueError(f"--top-k {options.top_k}: is more than --experts {options.experts}")
    if options.fit and options.device is not None:
        raise ValueError("--fit: finds the costs that --device would give; omit one of them")
    if options.write_device is not None and not options.fit:
        raise ValueError("--write-device: needs --fit, which finds what it saves")
    if options.placement is not None and any(options.copies):
        raise ValueError("--placement: has copies of its own; omit --copies")
    if options.plot is not None and options.plot.suffix != ".svg":
        raise ValueError(f"--plot {options.plot}: the name must end in .svg")
    if (options.hidden is None) != (options.ffn is None):
        raise ValueError("--hidden and --ffn: give both, or --model")


def _traffic(options: argparse.Namespace) -> Traffic:
    if options.trace is not None:
        return read_traffic(options.trace, options.top_k).first(options.steps)
    return make_traffic(
        options.synthetic,
        num_tokens=max(options.tokens),
        num_layers=options.layers,
        num_experts=options.experts,
        top_k=options.top_k,
        steps=options.steps or 1,
        seed=options.seed,
    )


def _shape(
    options: argparse.Namespace, traffic: Traffic, device: DeviceFile | None
) -> Shape | None:
    """Return the model's sizes, from the options or the checkpoint that was recorded."""
    shape = None
    if options.hidden is not None:
        shape = Shape(
            hidden=options.hidden,
            ffn=options.ffn,
            num_experts=traffic.num_experts,
            top_k=traffic.top_k,
            # As of attention with a head for every key: four square matrices.
            attention_weights=4 * options.hidden**2,
        )
    else:
        folder = options.model
        if folder is None and traffic.trace is not None and os.path.isdir(traffic.trace.model):
            folder = Path(traffic.trace.model)
        if folder is not None:
            assumes_gpu = device is not None and device.figures is not None
            shape = read_shape(folder, "cuda" if assumes_gpu else "cpu")
    if shape is not None and shape.num_experts != traffic.num_experts:
        raise ValueError(
            f"--model: has {shape.num_experts} experts, the loads are of {traffic.num_experts}; "
            "give loads and checkpoint of one model"
        )
    if shape is None and (options.device is not None or options.fit):
        raise ValueError(
            "--model: times need the sizes of the model; name its checkpoint, or give --hidden and "
            "--ffn"
        )
    return shape


def _costs(
    options: argparse.Namespace, device: DeviceFile | None, shape: Shape | None
) -> CostModel | None:
    if options.fit:
        calls = [call for folder in options.fit for call in read_calls(folder)]
        source = f"{len(calls):,} layer calls of {', '.join(map(str, options.fit))}"
        name = (options.write_device or options.fit[0]).stem
        costs = fit_costs(calls, name, source, options.cores)
        if options.write_device is not None:
            write_device(costs, options.write_device)
        return costs
    if device is None or shape is None:
        return None
    if device.figures is not None:
        return cost_model(device.name, device.figures, shape, options.context)
    assert device.costs is not None
    cores = options.cores or device.costs.cores
    return replace(device.costs, cores=cores)
