"""Capacity benches from options to tables: start two ranks, make the loads, run the cases."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

import numpy as np
import torch

from bench.candidate import start
from bench.capacity_mode import make_loads, real_case, real_text, start_ranks
from bench.moe_case import MoEShape, make_weights
from bench.simulated_mode import simulated_case, simulated_text
from bench.transfers import measure_transfers


def run(options: argparse.Namespace, shape: MoEShape, python: str) -> tuple[str, dict[str, Any]]:
    """Run all loads; return the tables and the JSON record.

    Raises:
        ValueError: loads that do not exist or do not fit the shape.
    """
    fields = dataclasses.asdict(shape)
    tokens, num_ranks = options.tokens[0], options.ranks if options.simulated else 2
    cases: dict[str, np.ndarray] = {}
    for name in options.loads:
        cases |= make_loads(name, shape, tokens * num_ranks, num_ranks, options.recorded)
    texts, record = [], {}
    with start(start_ranks(fields, options.seed, python)) as running:
        running.call("load", shape=fields, seed=options.seed, threads=1)
        if not options.simulated:
            for name, loads_E in cases.items():
                figures = real_case(running, shape, loads_E, options)
                record[name] = {"loads": loads_E.tolist(), "policies": figures}
                texts.append(real_text(name, loads_E, tokens, shape, figures))
            return "\n\n".join(texts), record
        transfers = measure_transfers(running)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights = make_weights(shape, options.seed)
    for name, loads_E in cases.items():
        figures = simulated_case(
            shape,
            weights,
            num_ranks,
            loads_E,
            options.gammas,
            transfers,
            rounds=options.rounds,
            seed=options.seed,
        )
        record[name] = {"loads": loads_E.tolist(), "virtual": True, "policies": figures}
        texts.append(simulated_text(name, loads_E, tokens, num_ranks, figures))
    record["transfers"] = {kind: dataclasses.asdict(each) for kind, each in transfers.items()}
    return "\n\n".join(texts), record
