"""Command line of `tools/plan_placement.py`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Return the options.

    Raises:
        ValueError: some are out of range or do not go together.
    """
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("trace", nargs="+", metavar="TRACE", help="PATH or NAME=PATH; several: kinds of traffic")
    add("--ranks", type=int, metavar="W", help="expert-parallel ranks; needed without --from")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--copies", type=int, metavar="N", help="per layer")
    budget.add_argument("--memory-gib", type=float, metavar="X", help="for copies, per rank")
    budget.add_argument(
        "--target", type=float, metavar="SHARE", help="the fewest copies for it; default: 0.95"
    )
    add("--precision", choices=("model", "int8", "int4"), default="model", help="of copies")
    add("--model", type=Path, metavar="DIR", help="checkpoint, for --memory-gib")
    add("--expert-bytes", type=int, metavar="N", help="an expert in 16 bits, for --memory-gib")
    add(
        "--nodes",
        type=int,
        default=1,
        metavar="N",
        help="that the ranks, in order, are spread over",
    )
    add(
        "--node-cost",
        type=float,
        default=0.0,
        metavar="X",
        help="of a row that leaves its node, in rows of the slowest rank; default: 0",
    )
    add("--speeds", type=Path, metavar="FILE", help="of ranks, or a report")
    add("--keep-homes", action="store_true", help="homes stay contiguous")
    add("--from", dest="source", type=Path, metavar="PLACEMENT", help="change this one")
    add("--max-moves", type=int, metavar="N", help="copies per layer, with --from; default: 2")
    add("--seed", type=int, default=0)
    add("--effort", type=float, default=1.0, metavar="X", help="2: search twice as long")
    add("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    add("--heat-map", type=Path, metavar="FILE", help=".png or .html; default: OUT.html")
    add("--out", type=Path, required=True, metavar="FILE", help=".yaml or .json")
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError where options are out of range or do not go together."""
    budgets = (options.copies, options.memory_gib, options.target)
    if options.source is None:
        if options.ranks is None:
            raise ValueError("--ranks: give the number of expert-parallel ranks")
        if options.max_moves is not None:
            raise ValueError("--max-moves: needs --from, the placement to change")
        if budgets == (None, None, None):
            options.target = 0.95
    elif budgets != (None, None, None) or options.keep_homes or options.nodes > 1:
        raise ValueError(
            "--from keeps homes and numbers of copies; omit --copies, --memory-gib, --target, "
            "--keep-homes and --nodes, or plan anew without --from"
        )
    elif options.max_moves is None:
        options.max_moves = 2
    for name, least in (
        ("ranks", 1),
        ("copies", 0),
        ("nodes", 1),
        ("node_cost", 0),
        ("max_moves", 0),
        ("processes", 1),
        ("effort", 0),
        ("expert_bytes", 2),
    ):
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if options.memory_gib is not None and not options.memory_gib > 0:
        raise ValueError(f"--memory-gib {options.memory_gib}: must be above 0")
    if options.target is not None and not 0 < options.target <= 1:
        raise ValueError(f"--target {options.target}: must be above 0 and at most 1")
    if options.nodes > 1 and options.ranks is not None and options.ranks % options.nodes:
        raise ValueError(
            f"--nodes {options.nodes}: {options.ranks} ranks cannot be spread evenly over them"
        )
