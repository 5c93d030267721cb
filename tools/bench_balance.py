"""What copies of hot experts gain: one dropless MoE layer on two ranks, each pinned to a core.

    python tools/bench_balance.py
    python tools/bench_balance.py --cpu-hogs 1 --row-times 1,2    # rank 1 at half its speed
    python tools/bench_balance.py --trace DIR --virtual-ranks 4,8 # int4 copies, recorded loads

Every load runs with contiguous homes and with copies in the model's precision (`--copies` of them,
planned for the load), in turns in one run; `even` is a load that needs none. The table shows
medians, then one JSON line follows.

    layer ms     the slower rank's forward
    rows         computed by the ranks' experts, rank 0 / rank 1
    experts ms   of rank 0 / of rank 1
    row share    the mean rank's rows over the most loaded rank's
    time share   the even load's layer time over this one's, in the same round
    of the bound the slower rank's expert time against rows over speeds: all rows over the sum of
                 the rows per second that the ranks have reached; 1 is the bound

With --trace the loads are those of a recorded job (profiler.routing), on virtual ranks: the experts
of each rank run alone, one rank after the other, with as many int4 copies per layer as ranks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench.candidate import WorkerError
from bench.environment_record import environment_record
from bench.link import loopback
from bench.report import emit, spread, table
from bench.two_ranks import run_two_ranks
from bench.virtual_copies import virtual_shares
from bench_speed_aware import cpu_hogs

from engine.profiling.routing.trace import (
    read_trace,
)

HEADER = ["load", "layer ms", "rows", "experts ms", "row share", "time share", "of the bound"]
EVEN = "even contiguous"


def figures(ranks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures of each case; ranks: replies by rank."""
    seconds = {
        name: [max(pair) for pair in zip(*(reply[name]["seconds"] for reply in ranks), strict=True)]
        for name in ranks[0]
    }
    found: dict[str, dict[str, Any]] = {}
    for name in ranks[0]:
        rows = [statistics.median(reply[name]["rows"]) for reply in ranks]
        experts = [statistics.median(reply[name]["experts"]) for reply in ranks]
        speeds = [count / time for count, time in zip(rows, experts, strict=True) if time]
        found[name] = {
            "seconds": spread(seconds[name]),
            "rows": rows,
            "experts": experts,
            "row_share": sum(rows) / len(rows) / max(rows),
            "time_share": statistics.median(
                even / own for even, own in zip(seconds[EVEN], seconds[name], strict=True)
            ),
            "of_the_bound": max(experts) / (sum(rows) / sum(speeds)),
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; print the table and the JSON line."""
    options = _parse(argv)
    if options.trace is not None:
        return _virtual(options)
    shape = {name: getattr(options, name) for name in ("hidden", "ffn", "experts", "top_k")}
    job = {
        "shape": shape,
        "loads": [*options.loads.split(","), "even"],
        "row_times": [float(each) for each in options.row_times.split(",")],
        **{name: getattr(options, name) for name in ("tokens", "copies", "rounds", "warm_up")},
        "seed": options.seed,
    }
    with cpu_hogs(options.cpu_hogs), loopback() as ends:
        replies = run_two_ranks("bench.workers.moe_balance", job, ends, options.timeout)
    found = figures(replies)
    rows = [
        [
            name,
            entry["seconds"]["median"] * 1e3,
            " / ".join(f"{count:,.0f}" for count in entry["rows"]),
            " / ".join(f"{value * 1e3:.0f}" for value in entry["experts"]),
            *(f"{entry[key]:.3f}" for key in ("row_share", "time_share", "of_the_bound")),
        ]
        for name, entry in found.items()
    ]
    text = (
        f"{options.tokens:,} tokens per rank, {options.copies} copies, times per row "
        f"{options.row_times}\n{table(HEADER, rows)}"
    )
    kept = {name: value for name, value in vars(options).items() if name != "out"}
    record = {
        "bench": "balance",
        **environment_record(("torch",)),
        "options": kept,
        "cases": found,
    }
    emit(text, record, options.out, "bench_balance")
    return 0


def _virtual(options: argparse.Namespace) -> int:
    """Run the bench on virtual ranks."""
    torch.set_num_threads(1)
    trace = read_trace(options.trace)
    tokens_S = trace.tokens_S2.sum(1)
    prefill_S = trace.tokens_S2[:, 0] >= max(1, int(tokens_S.max()) // 2)
    if (count := int(prefill_S.sum())) < 4:
        raise ValueError(f"--trace {options.trace}: has {count} large prefill steps, 4 are needed")
    found = [
        virtual_shares(
            trace.loads_SLE[prefill_S],
            int(ranks),
            hidden=options.hidden,
            ffn=options.ffn,
            rounds=options.rounds,
        )
        for ranks in options.virtual_ranks.split(",")
    ]
    header = ["ranks", "row share", "time share", "time share without copies"]
    rows = [
        [each.ranks, *(f"{x:.3f}" for x in (each.rows, each.time, each.time_before))]
        for each in found
    ]
    kept = {name: str(value) for name, value in vars(options).items() if name != "out"}
    record = {
        "bench": "balance_virtual",
        **environment_record(("torch",)),
        "options": kept,
        "steps": count,
        "shares": [asdict(each) for each in found],
    }
    text = f"{count} recorded prefill steps, as many int4 copies per layer as ranks\n"
    emit(text + table(header, rows), record, options.out, "bench_balance_virtual")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--loads", default="hot:1.6,zipf:1.0", help="hot:RATIO or zipf:EXPONENT")
    parser.add_argument("--copies", type=int, default=2, help="of the layer")
    parser.add_argument("--row-times", default="1,1", help="time per row of each rank, as planned")
    parser.add_argument("--cpu-hogs", type=int, default=0, help="busy processes on rank 1's core")
    parser.add_argument("--trace", type=Path, help="folder of profiler.routing: virtual ranks")
    parser.add_argument("--virtual-ranks", default="4,8", help="with --trace")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--out", type=Path, help="folder for bench_balance.txt and .json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        sys.exit(f"error: {error}")
