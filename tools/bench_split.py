"""What a step's balance decisions cost: the split, the cut and the order of claims, on one core.

    python tools/bench_split.py
    python tools/bench_split.py --cases 64x256+256 --zipf 1.0

Loads are zipf's over experts in random order; copies are placed for loads that differ from them by
a factor of about 1.2, the hottest expert onto the coldest rank, again and again. The table shows
medians; one JSON line follows.

    case        ranks x experts + copies of a layer
    claims      assignments of all ranks in a step: --tokens per rank, at most --most-claims
    share       mean rank load over the most loaded rank's, after the split
    split us    all rows, to the least majorised loads with the most rows at home
    cold split  the same after other work has filled the caches, as a layer does
    optimum us  the most loaded rank's rows alone, as a search for a placement asks for
    fewest us   the fewest rows away from home within limits of 1.05 mean loads
    cut us      claims kept per expert under those limits
    order us    claims of random scores from the best to the last
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.environment_record import environment_record
from bench.report import emit, table

from engine.ops import native
from engine.ops.order_claims import order_claims
from engine.ops.split import Hosts, batch_optimum, cut, optimum, split_rows

CASES = "2x8+2,4x8+4,8x8+8,8x32+8,64x256+64,64x256+256,256x256+256,1024x1024+1024"
COLUMNS = ("split", "cold split", "optimum", "fewest", "cut", "order")
HEADER = ["case", "zipf", "claims", "share", *(f"{name} us" for name in COLUMNS)]


def place(load_E: np.ndarray, num_ranks: int, copies: int) -> Hosts:
    """Return contiguous homes and copies of the experts with the most load per host.

    Every copy goes to the coldest of the ranks that have the fewest copies and do not hold it.
    """
    num_experts = len(load_E)
    held = [{expert * num_ranks // num_experts} for expert in range(num_experts)]
    on_rank_W = np.zeros(num_ranks, dtype=np.int64)
    for _ in range(copies):
        share_E = load_E / np.array([len(ranks) for ranks in held])
        load_W = np.zeros(num_ranks)
        for expert, ranks in enumerate(held):
            load_W[list(ranks)] += share_E[expert]
        free = on_rank_W == on_rank_W.min()
        for expert in np.argsort(-share_E, kind="stable").tolist():
            ranks = [rank for rank in np.flatnonzero(free).tolist() if rank not in held[expert]]
            if ranks:
                rank = min(ranks, key=lambda rank: load_W[rank])
                held[expert].add(rank)
                on_rank_W[rank] += 1
                break
    homes = [expert * num_ranks // num_experts for expert in range(num_experts)]
    instances = [
        (rank, rank != homes[expert], expert) for expert, ranks in enumerate(held) for rank in ranks
    ]
    rank_I, copy_I, expert_I = (np.array(column) for column in zip(*sorted(instances), strict=True))
    return Hosts(num_ranks, expert_I, rank_I, ~copy_I)


def measure(
    ranks: int, experts: int, copies: int, zipf: float, claims: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Return the median microseconds of each decision in one case, and the share."""
    rng = np.random.default_rng(seed)
    weight_E = rng.permutation(np.arange(1, experts + 1) ** -zipf)
    load_E = rng.multinomial(claims, weight_E / weight_E.sum())
    hosts = place(load_E * rng.lognormal(0, 0.2, experts), ranks, copies)
    expert_N = rng.permutation(np.repeat(np.arange(experts, dtype=np.int32), load_E))
    limit_W = np.full(ranks, int(np.ceil(1.05 * claims / ranks)))
    score_N = torch.from_numpy(rng.integers(-(2**31), 2**31, claims).astype(np.int32))
    place_N = torch.arange(claims, dtype=torch.int32)
    calls: dict[str, Callable[[], object]] = {
        "split": lambda: split_rows(load_E, hosts),
        "optimum": lambda: batch_optimum(load_E[None], hosts),
        "fewest": lambda: split_rows(load_E, hosts, limit_W=limit_W, fewest_moved=True),
        "cut": lambda: cut(expert_N, hosts, limit_W),
        "order": lambda: order_claims([score_N, ~place_N]),
    }
    medians = {name: _median_us(call, repeats) for name, call in calls.items()}
    elsewhere = np.zeros(2**23)  # 64 MiB: more than the caches hold
    medians["cold split"] = _median_us(calls["split"], repeats, lambda: np.add(elsewhere, 1))
    share = claims / ranks / optimum(load_E, hosts)
    case = {"ranks": ranks, "experts": experts, "copies": copies, "zipf": zipf, "claims": claims}
    return {**case, "share": share, "us": medians}


def _median_us(
    call: Callable[[], object], repeats: int, between: Callable[[], object] = lambda: None
) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        between()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; print the table and the JSON line."""
    options = _parse(argv)
    torch.set_num_threads(1)
    found = []
    for ranks, experts, copies in options.cases:
        top_k = min(experts, 2 if experts <= 8 else 8)
        claims = min(options.tokens * top_k * ranks, options.most_claims)
        for zipf in options.zipf:
            found.append(
                measure(ranks, experts, copies, zipf, claims, options.repeats, options.seed)
            )
    rows = [
        [
            f"{entry['ranks']}x{entry['experts']}+{entry['copies']}",
            entry["zipf"],
            entry["claims"],
            entry["share"],
            *(entry["us"][name] for name in COLUMNS),
        ]
        for entry in found
    ]
    text = f"{native.reason()}\n{table(HEADER, rows)}"
    kept = {name: value for name, value in vars(options).items() if name != "out"}
    record = {
        "bench": "split",
        **environment_record(("torch", "numpy")),
        "options": kept,
        "cases": found,
    }
    emit(text, record, options.out, "bench_split")
    return 0


def _cases(text: str) -> list[tuple[int, int, int]]:
    cases = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", part.strip())
        if match is None or int(match[1]) < 1 or int(match[2]) < 1:
            raise argparse.ArgumentTypeError(f"{part!r}: write RANKSxEXPERTS+COPIES: 64x256+256")
        cases.append((int(match[1]), int(match[2]), int(match[3])))
    return cases


def _exponents(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=_cases, default=CASES, metavar="RANKSxEXPERTS+COPIES,...")
    parser.add_argument("--zipf", type=_exponents, default="0.5,0.8,1.0", metavar="EXPONENT,...")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--most-claims", type=int, default=2**21)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for bench_split.txt and .json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
