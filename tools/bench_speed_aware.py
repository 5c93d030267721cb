"""What capacity by measured speed gains on a slow rank: one MoE layer on two ranks, one throttled.

    python tools/bench_speed_aware.py                  # rank 1 at half its speed
    python tools/bench_speed_aware.py --cpu-hogs 3     # at a quarter
    python tools/bench_speed_aware.py --cpu-hogs 0     # no rank throttled: nothing may change

Two real ranks, each pinned to a core of its own; `--cpu-hogs` busy processes share rank 1's
core. Dropless, token_drop with even capacity, and with moe.capacity.speed_aware take turns in one
run; both capacities have the same factor and so the same number of slots. The table shows medians,
then one JSON line follows.

    layer ms    the slower rank's forward
    rows        computed by the ranks' experts, rank 0 / rank 1
    experts ms  of rank 0 / of rank 1
    dropped     share of all assignments
    speedup     against even capacity in the same round
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.candidate import WorkerError
from bench.environment_record import environment_record
from bench.link import loopback
from bench.report import emit, spread, table
from bench.two_ranks import run_two_ranks

HEADER = ["capacity", "layer ms", "rows", "experts ms", "dropped", "speedup"]


@contextmanager
def cpu_hogs(count: int) -> Iterator[None]:
    """Run busy processes on the core that rank 1 will be pinned to."""
    cores = sorted(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{cores[1 % len(cores)]}}})\nwhile True: pass"
    running = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def figures(
    ranks: Sequence[dict[str, Any]], num_assignments: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return the figures of each capacity.

    Args:
        ranks: replies by rank.
        num_assignments: of both ranks in one call.
    """
    seconds = {
        name: [max(pair) for pair in zip(*(reply[name]["seconds"] for reply in ranks), strict=True)]
        for name in ranks[0]
    }
    return {
        name: {
            "seconds": spread(seconds[name]),
            "experts": [statistics.median(reply[name]["experts"]) for reply in ranks],
            "rows": [statistics.median(reply[name]["rows"]) for reply in ranks],
            "dropped": sum(reply[name]["dropped"] for reply in ranks) / rounds / num_assignments,
            "speedup": statistics.median(
                even / own for even, own in zip(seconds["even"], seconds[name], strict=True)
            ),
        }
        for name in ranks[0]
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; print the table and the JSON line."""
    options = _parse(argv)
    job = {
        "shape": {
            "hidden": options.hidden,
            "ffn": options.ffn,
            "experts": options.experts,
            "top_k": options.top_k,
        },
        "tokens": options.tokens,
        "factor": options.factor,
        "rounds": options.rounds,
        "warm_up": options.warm_up,
        "zipf": options.zipf,
        "seed": options.seed,
    }
    with cpu_hogs(options.cpu_hogs), loopback() as ends:
        replies = run_two_ranks("bench.workers.moe_speed_aware", job, ends, options.timeout)
    found = figures(replies, 2 * options.tokens * options.top_k, options.rounds)
    aware = replies[0]["speed_aware"]
    slower = aware["paces"][1] / max(1, aware["paces"][0])
    rows = [
        [
            name,
            entry["seconds"]["median"] * 1e3,
            " / ".join(f"{count:,.0f}" for count in entry["rows"]),
            " / ".join(f"{value * 1e3:.0f}" for value in entry["experts"]),
            f"{entry['dropped']:.1%}",
            entry["speedup"],
        ]
        for name, entry in found.items()
    ]
    shares = " and ".join(f"{share:.2f}" for share in aware["shares"])
    text = (
        f"{options.tokens:,} tokens per rank, zipf {options.zipf}, factor {options.factor}, scope "
        f"rank; rank 1 takes {slower:.2f}x rank 0's time per row, shares {shares}\n"
        f"{table(HEADER, rows)}"
    )
    kept = {name: value for name, value in vars(options).items() if name != "out"}
    record = {
        "bench": "speed_aware",
        **environment_record(("torch",)),
        "options": kept,
        "slower": slower,
        "shares": aware["shares"],
        "capacities": found,
    }
    emit(text, record, options.out, "bench_speed_aware")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu-hogs", type=int, default=1, help="busy processes on rank 1's core")
    former: Any = {"dest": "cpu_hogs", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--rivals", type=int, **former)
    parser.add_argument("--factor", default="0.75", help="moe.capacity.factor of both capacities")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--zipf", type=float, default=0.0, help="exponent; 0: balanced")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=300, help="seconds")
    parser.add_argument("--out", type=Path, help="folder for bench_speed_aware.txt and .json")
    options = parser.parse_args(argv)
    if options.cpu_hogs < 0 or options.rounds < 1:
        parser.error("--cpu-hogs must be at least 0 and --rounds at least 1")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
