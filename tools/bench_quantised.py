"""Experts with int4 and int8 weights against float32: time of their products, error of weights.

    python tools/bench_quantised.py
    python tools/bench_quantised.py --sizes 512x1024 --rows 1,8,256 --threads 1
    python tools/bench_quantised.py --checkpoints configs/checkpoints/tiny_mixtral

Each size (model dim x expert hidden dim) has equal layers that take turns, so that weights come
from memory and not from a cache. float32 (in panels), int8 and int4 run in turns on random rows;
the table shows medians and one JSON line follows.

    ms          one layer's experts, all with the same number of rows
    speedup     float32's time over this one's, in the same round
    GB/s        bytes of all weights, as they are stored, over the time
    clock       processor: time of this thread on its core, which other work disturbs less than time
                on the wall; the default with one thread

`error` is the root mean square of what rounding changes, over that of the weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench.environment_record import environment_record
from bench.interleave import interleave
from bench.report import emit, spread, table
from safetensors.torch import load_file

from engine.ops import native
from engine.ops.grouped_ffn import grouped_ffn
from engine.ops.panels import to_panels
from engine.ops.quantised import dequantise, grouped_ffn_quantised, quantise

FORMATS = {"float32": None, "int8": 8, "int4": 4}
HEADER = ["rows", "weights", "ms", "speedup", "GB/s"]


def make_layers(
    dim: int, width: int, experts: int, layers: int, group: int
) -> dict[str, list[tuple[Any, Any]]]:
    """Return every format's (w13, w2) of each layer, of the same random weights."""
    made: dict[str, list[tuple[Any, Any]]] = {name: [] for name in FORMATS}
    generator = torch.Generator().manual_seed(0)
    for _ in range(layers):
        w13 = torch.randn(experts, 2 * width, dim, generator=generator) / dim**0.5
        w2 = torch.randn(experts, dim, width, generator=generator) / width**0.5
        for name, bits in FORMATS.items():
            if bits:
                made[name].append((quantise(w13, bits, group), quantise(w2, bits, group)))
        to_panels(w13, stacked=2)
        to_panels(w2)
        made["float32"].append((w13, w2))
    return made


def num_bytes(weights: tuple[Any, Any]) -> int:
    """Return the memory of one layer's weights."""
    return sum(w.nbytes if isinstance(w, torch.Tensor) else w.num_bytes for w in weights)


def measure(
    made: dict[str, list[tuple[Any, Any]]], dim: int, rows: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Run one number of rows per expert in turns; return each format's figures."""
    x_RD = torch.randn(options.experts * rows, dim)
    counts_e = [rows] * options.experts
    clock: Callable[[], float] = (
        time.thread_time if options.clock == "processor" else time.perf_counter
    )
    repeats = options.repeats or max(1, 48 // rows)

    def run(name: str) -> float:
        product: Callable[..., Any] = grouped_ffn if name == "float32" else grouped_ffn_quantised
        product(x_RD, *made[name][-1], counts_e)
        started = clock()
        for _ in range(repeats):
            for weights in made[name]:
                product(x_RD, *weights, counts_e)
        return (clock() - started) / repeats / len(made[name])

    rounds = interleave(list(made), options.rounds, run, options.pause)
    figures: dict[str, Any] = {}
    for name, seconds in rounds.items():
        ratios = [base / own for base, own in zip(rounds["float32"], seconds, strict=True)]
        figures[name] = {
            "seconds": spread(seconds),
            "speedup": spread(ratios),
            "gb_s": num_bytes(made[name][0]) / statistics.median(seconds) / 1e9,
        }
    return figures


def checkpoint_errors(folder: Path, group: int) -> dict[str, float]:
    """Return the relative error of each format over all experts of a checkpoint."""
    experts = [
        tensor.float()[None]
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if ".experts." in name
    ]
    if not experts:
        raise ValueError(f"--checkpoints {folder}: no *.safetensors there with experts' weights")
    total = sum(float(w.square().sum()) for w in experts)
    errors = {}
    for name, bits in FORMATS.items():
        if bits:
            lost = (dequantise(quantise(w, bits, group)) - w for w in experts)
            errors[name] = (sum(float(e.square().sum()) for e in lost) / total) ** 0.5
    return errors


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every size and checkpoint, print tables and the JSON line."""
    options = _parse(argv)
    torch.set_num_threads(options.threads)
    options.clock = options.clock or ("processor" if options.threads == 1 else "wall")
    record: dict[str, Any] = {
        "bench": "quantised",
        **environment_record(("torch",)),
        "kernels": native.reason(),
        "options": {n: str(v) for n, v in vars(options).items() if n not in ("out", "checkpoints")},
        "cases": {},
        "errors": {},
    }
    texts = []
    for dim, width in options.sizes:
        made = make_layers(dim, width, options.experts, options.layers, options.group)
        cases = {str(rows): measure(made, dim, rows, options) for rows in options.rows}
        record["cases"][f"{dim}x{width}"] = cases
        lines = [
            [rows, name, f["seconds"]["median"] * 1e3, f["speedup"]["median"], f["gb_s"]]
            for rows, figures in cases.items()
            for name, f in figures.items()
        ]
        title = f"{options.experts} experts {dim}x{width}, {options.clock} time"
        texts.append(f"{title}\n{table(HEADER, lines, left=(0, 1))}")
    lines = []
    for folder in options.checkpoints:
        errors = checkpoint_errors(folder, options.group)
        record["errors"][folder.name] = errors
        lines += [[folder.name, name, error] for name, error in errors.items()]
    if lines:
        texts.append(table(["experts of", "weights", "error"], lines, left=(0, 1)))
    emit("\n\n".join(texts), record, options.out, "bench_quantised")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def sizes(text: str) -> list[tuple[int, int]]:
        pairs = [part.split("x") for part in text.split(",")]
        return [(int(dim), int(width)) for dim, width in pairs]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", type=sizes, default=[(512, 1024), (2048, 1024)], metavar="DxF,DxF"
    )
    parser.add_argument(
        "--rows", type=numbers, default=[1, 2, 8, 256, 1024], metavar="N,N", help="per expert"
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--group", type=int, default=32, help="columns that share a scale")
    parser.add_argument("--layers", type=int, default=3, help="equal layers that take turns")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=["wall", "processor"], help="processor: one thread only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, help="per round; default: by the rows")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds before each measurement")
    parser.add_argument(
        "--checkpoints", type=Path, nargs="*", default=[], metavar="FOLDER",
        help="report the error of their experts' weights",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for bench_quantised.txt and .json")
    options = parser.parse_args(argv)
    if options.clock == "processor" and options.threads != 1:
        parser.error("--clock processor: measures one thread; add --threads 1")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
