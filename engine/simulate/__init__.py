"""Simulate: what a layer and a step would take on other ranks, with other settings.

    lockstep simulate RUN/routing --ranks 8,64,1024 --gamma none,1.5 --device h200 --model DIR

Recorded or made loads (`loads.py`) go through the engine's own decisions (`decisions.py`, token by
token in `claims.py`) for every scenario (`scenario.py`, `placements.py`); rows and bytes between
ranks follow (`exchanges.py`), then times (`timeline.py`) by a cost model (`cost_model.py`) that was
fitted to a job's spans (`spans.py`, `fit.py`) or follows from a device's assumed figures
(`figures.py`, `device_file.py`). `predict.py` runs a scenario, `command.py` the command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("trace", nargs="?", type=Path, metavar="TRACE", help="folder of profiler.routing, or .npz")
    add("--synthetic", metavar="SKEW", help="instead: uniform, or zipf:EXPONENT")
    add("--layers", type=_count, default=1, metavar="N", help="of --synthetic (default: 1)")
    add("--experts", type=_count, metavar="N", help="of --synthetic")
    add("--top-k", type=_count, metavar="N", help="of --synthetic and .npz")
    add("--steps", type=_count, metavar="N", help="at most so many (default: all; synthetic: 1)")
    add(
        "--ranks", type=_list(_count), default=(8,), metavar="N,...", help="up to 4096 (default: 8)"
    )
    add("--expert", type=_count, metavar="N", help="parallel.expert (default: fewest replicas)")
    add("--gamma", type=_list(str), default=("none",), metavar="X,...", help="none: dropless")
    add("--scope", choices=("expert", "rank"), default="expert", help="moe.capacity.scope")
    add(
        "--consensus", choices=("global", "quota", "local"), default="global",
        help="moe.capacity.consensus",
    )  # fmt: skip
    add("--copies", type=_list(_count_or_0), default=(0,), metavar="N,...", help="per layer")
    add("--placement", type=Path, metavar="FILE", help="instead of --copies: moe.placement")
    add("--precision", choices=("model", "int8", "int4"), default="model", help="of copies")
    add("--target", type=_share, default=0.95, metavar="X", help="moe.copies.target")
    add("--tokens", type=_list(_count), metavar="N,...", help="per step over all ranks")
    add(
        "--ranks-per-node", type=_list(_count), default=(8,), metavar="N,...",
        help="that a node's links connect (default: 8)",
    )  # fmt: skip
    add(
        "--slower", type=_slower, action="append", default=[], metavar="RANK:FACTOR",
        help="a rank whose own work takes FACTOR times as long; may be repeated",
    )  # fmt: skip
    add("--device", metavar="NAME", help="h100, h200 (assumed figures), or a device file")
    add(
        "--fit", type=Path, action="append", default=[], metavar="SPANS",
        help="folder of profiler.spans to fit costs to; may be repeated",
    )  # fmt: skip
    add("--cores", type=_count, metavar="N", help="that the ranks of a node share, on CPUs")
    add("--write-device", type=Path, metavar="FILE", help="save what --fit found")
    add("--model", type=Path, metavar="DIR", help="checkpoint (default: the recorded one)")
    add("--hidden", type=_count, metavar="N", help="model dim, without --model")
    add("--ffn", type=_count, metavar="N", help="hidden dim of an expert, without --model")
    add("--context", type=_count_or_0, default=1024, metavar="N", help="keys of a mean token")
    add("--seed", type=_count_or_0, default=0)
    add("--plot", type=Path, metavar="FILE", help="an .svg")
    add("--json", action="store_true", help="print one JSON object instead")


def _number(text: str, least: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {least}")
    return int(text)


def _count(text: str) -> int:
    return _number(text, 1)


def _count_or_0(text: str) -> int:
    return _number(text, 0)


def _list(read: Callable[[str], _T]) -> Callable[[str], tuple[_T, ...]]:
    def convert(text: str) -> tuple[_T, ...]:
        return tuple(dict.fromkeys(read(part.strip()) for part in text.split(",")))

    return convert


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _share(text: str) -> float:
    value = _real(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and at most 1")
    return value


def _slower(text: str) -> tuple[int, float]:
    rank, _, factor = text.partition(":")
    value = _real(factor)
    if not rank.isdecimal() or not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} must be RANK:FACTOR, as in 3:1.5")
    return int(rank), value
