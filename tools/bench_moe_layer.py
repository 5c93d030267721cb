"""One MoE layer: this engine against transformers and DeepSpeed, with the machine's bounds.

    python tools/bench_moe_layer.py
    python tools/bench_moe_layer.py --tokens 4096 --candidates gemm-1x2,lockstep-1-rank

Default sizes: hidden 512, ffn 1024, 8 experts top-2, float32. Default cases: 4096 tokens (about
1,024 rows per expert, bound by GEMM), 64 tokens (16 rows) and 8 tokens (2 rows, bound by reading
weights). Four equal layers take turns, as in a model, so that weights come from memory and not from
a cache. Every candidate gets all cores; they run in turns, A B C, A B C, ..., and the table shows
medians; one JSON line follows.

    tok/s           tokens / median seconds of one forward (several ranks: the slowest rank's)
    of GEMM         GFLOP/s of the experts' products over the best `gemm-*` row of the same table,
                    which runs the bare torch products at the same rows per expert
    weights GB/s    all experts' weights / the same seconds; `read-*` rows are the bound
    error           largest difference to float64 over the largest value; '-' where nothing is
                    computed or tokens are dropped by design

DeepSpeed runs where it is installed; its capacity-1.0 row drops tokens, so it does less work.

    python tools/bench_moe_layer.py --capacity            # 4,096 tokens per rank, skewed loads
    python tools/bench_moe_layer.py --capacity --experts 64 --top-k 8
    python tools/bench_moe_layer.py --capacity --simulated --ranks 8

compare this engine's capacity policies with its own dropless layer on skewed loads, and with the
speedup that the loads allow; see `bench/capacity_mode.py` and `bench/simulated_mode.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench import capacity_run
from bench.candidate import Candidate, Running, WorkerError, add_candidates_option, select, start
from bench.environment_record import environment_record
from bench.interleave import interleave
from bench.moe_case import LOADS, MoEShape, make_ids, make_tokens, make_weights, reference
from bench.report import emit, spread, table

HEADER = ["candidate", "ms", "tok/s", "GFLOP/s", "of GEMM", "weights GB/s", "error"]
BOUNDS = ("gemm", "read")


def candidates(threads: int) -> list[Candidate]:
    """Return all candidates that can run on this machine, in the order of the table."""
    half = max(1, threads // 2)

    def one(name: str, module: str, **load: Any) -> Candidate:
        return _candidate(name, module, 1, threads, load)

    def two(name: str, module: str, **load: Any) -> Candidate:
        return _candidate(name, module, 2, half, load)

    found = [
        one(f"gemm-1x{threads}", "moe_bounds", what="gemm"),
        two(f"gemm-2x{half}", "moe_bounds", what="gemm"),
        one(f"read-1x{threads}", "moe_bounds", what="read"),
        two(f"read-2x{half}", "moe_bounds", what="read"),
        one("lockstep-1-rank", "moe_lockstep"),
        two("lockstep-2-ranks", "moe_lockstep"),
        one("transformers-eager", "moe_transformers", experts="eager"),
        one("transformers-grouped_mm", "moe_transformers", experts="grouped_mm"),
    ]
    if importlib.util.find_spec("deepspeed") is not None:
        found += [
            two("deepspeed-2-ranks", "moe_deepspeed"),
            two("deepspeed-2-ranks-cap-1.0", "moe_deepspeed", capacity_factor=1.0),
        ]
    return found


def measure(
    running: dict[str, Running], shape: MoEShape, tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Run one case in turns; return each candidate's figures."""
    errors = {
        name: _error(worker, shape, tokens, options)
        for name, worker in running.items()
        if not name.startswith(BOUNDS) and "cap-" not in name
    }
    iterations = options.iterations or max(3, min(50, 16384 // tokens))

    def run(name: str) -> list[float]:
        replies = running[name].call("run", tokens=tokens, load=options.load, iterations=iterations)
        return [max(times) for times in zip(*(reply["seconds"] for reply in replies), strict=True)]

    for name in running:  # once unmeasured
        run(name)
    rounds = interleave(list(running), options.rounds, run, options.pause)
    figures: dict[str, Any] = {}
    for name, lists in rounds.items():
        seconds = [statistics.median(times) for times in lists]  # one figure per round
        median = statistics.median(seconds)
        computes, reads = not name.startswith("read"), not name.startswith("gemm")
        figures[name] = {
            "seconds": spread(seconds),
            "tok_s": None if name.startswith(BOUNDS) else tokens / median,
            "gflops": shape.flops(tokens) / median / 1e9 if computes else None,
            "weights_gb_s": shape.weight_bytes / median / 1e9 if reads else None,
            "error": errors.get(name),
        }
    best = max((f["gflops"] for n, f in figures.items() if n.startswith("gemm")), default=None)
    for entry in figures.values():
        known = best is not None and entry["gflops"] is not None
        entry["of_gemm"] = entry["gflops"] / best if known else None
    return figures


def case_table(shape: MoEShape, tokens: int, load: str, figures: dict[str, Any]) -> str:
    """Return one case's table."""
    rows = [
        [
            name,
            entry["seconds"]["median"] * 1e3,
            entry["tok_s"],
            entry["gflops"],
            None if entry["of_gemm"] is None else f"{entry['of_gemm']:.1%}",
            entry["weights_gb_s"],
            entry["error"],
        ]
        for name, entry in figures.items()
    ]
    mean = tokens * shape.top_k / shape.experts
    title = f"{tokens:,} tokens, {mean:g} rows per expert on average, load {load}"
    return f"{title}\n{table(HEADER, rows)}"


def _error(worker: Running, shape: MoEShape, tokens: int, options: argparse.Namespace) -> float:
    """Return the largest difference to float64 over the largest value, over all ranks' rows."""
    weights = make_weights(shape, options.seed)
    topk_ids_TK = make_ids(shape, tokens, options.load, options.seed)
    x_TD = make_tokens(weights, topk_ids_TK, options.seed)
    expected = reference(weights, x_TD, topk_ids_TK).numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/output"
        worker.call("output", tokens=tokens, load=options.load, path=path)
        ranks = range(worker.candidate.ranks)
        output = np.concatenate([np.load(f"{path}.{rank}.npy") for rank in ranks])
    return float(np.abs(output - expected).max() / np.abs(expected).max())


def main(argv: Sequence[str] | None = None) -> int:
    """Start the candidates, run the cases, print tables and the JSON line."""
    options = _parse(argv)
    shape = MoEShape(
        hidden=options.hidden, ffn=options.ffn, experts=options.experts, top_k=options.top_k
    )
    make_weights(shape, options.seed)  # a shape that cannot be made fails here
    if options.capacity:
        text, cases = capacity_run.run(options, shape, sys.executable)
        kept = {  # a path of one machine means nothing on another
            name: value.name if isinstance(value, Path) else str(value)
            for name, value in vars(options).items()
            if name != "out"
        }
        record = {
            "bench": "moe_capacity",
            **environment_record(("torch",)),
            "options": kept,
            "cases": cases,
        }
        emit(text, record, options.out, "bench_moe_capacity")
        return 0
    chosen = select(candidates(options.threads), options.candidates)
    record: dict[str, Any] = {
        "bench": "moe_layer",
        **environment_record(("torch", "transformers", "deepspeed")),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "cases": {},
    }
    texts = []
    with contextlib.ExitStack() as stack:
        running: dict[str, Running] = {}
        for candidate in chosen:
            print(f"starting {candidate.name} ...", file=sys.stderr, flush=True)
            running[candidate.name] = stack.enter_context(start(candidate))
            running[candidate.name].call(
                "load",
                shape=dataclasses.asdict(shape),
                seed=options.seed,
                threads=candidate.threads,
                layers=options.layers,
                **candidate.load,
            )
        for tokens in options.tokens:
            figures = measure(running, shape, tokens, options)
            record["cases"][str(tokens)] = figures
            texts.append(case_table(shape, tokens, options.load, figures))
    emit("\n\n".join(texts), record, options.out, "bench_moe_layer")
    return 0


def _candidate(name: str, module: str, ranks: int, threads: int, load: dict[str, Any]) -> Candidate:
    return Candidate(
        name=name,
        module=f"bench.workers.{module}",
        python=sys.executable,
        ranks=ranks,
        threads=threads,
        load=load,
        needs_engine=module == "moe_lockstep",
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    numbers: Any = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--tokens", type=numbers, default=[4096, 64, 8], metavar="N,N")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    capacity = parser.add_argument_group("capacity policies")
    capacity.add_argument("--capacity", action="store_true", help="compare capacity policies")
    words: Any = lambda text: text.split(",")  # noqa: E731
    capacity.add_argument(
        "--loads", type=words, default=["zipf0.3", "zipf0.5", "zipf1.0", "hot1.6"], metavar="A,B",
        help="uniform, zipfS, hotR, recorded",
    )  # fmt: skip
    capacity.add_argument("--gammas", type=words, default=["2", "1.5", "1"], metavar="A,B")
    capacity.add_argument(
        "--recorded", type=Path, metavar="FILE",
        help="for --loads recorded: a batch job's report.json or an .npz of chosen experts",
    )  # fmt: skip
    capacity.add_argument("--simulated", action="store_true", help="run one rank at a time")
    capacity.add_argument(  # its former name
        "--virtual", dest="simulated", action="store_true", default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )  # fmt: skip
    capacity.add_argument("--ranks", type=int, default=8, help="simulated ranks")
    parser.add_argument("--layers", type=int, default=4, help="equal layers that take turns")
    parser.add_argument("--load", choices=LOADS, default="uniform", help="rows of each expert")
    add_candidates_option(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iterations", type=int, help="forwards per round; default: by the tokens")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds before each measurement")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for bench_moe_layer.txt and .json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
