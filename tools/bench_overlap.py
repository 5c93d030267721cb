"""How much communication overlap hides and deduplication saves: one MoE layer on two ranks.

    python tools/bench_overlap.py                      # over loopback
    python tools/bench_overlap.py --link 2gbit         # two network namespaces, as root

Two real ranks over gloo, each pinned to a core of its own, balanced or zipf loads, dropless. The
settings run in turns, A B C, A B C, ...; the table shows medians; one JSON line follows.

    chunks       `auto` has chosen before the first round; `N copies`: without deduplication, a
                 token's row is sent once for each of its experts on the other rank
    layer ms     the slower rank's forward
    exposed ms   time that a rank waits in dispatch and combine, the mean of both ranks; what is
                 hidden behind the experts is not in it
    hidden       share of one chunk's exposed time that is gone
    speedup      against the first in the same round
    sent MB      by one rank in dispatch and combine, the mean of both
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.candidate import WorkerError
from bench.environment_record import environment_record
from bench.link import End, limited, loopback
from bench.report import emit, spread, table
from bench.two_ranks import run_two_ranks

HEADER = ["chunks", "layer ms", "exposed ms", "hidden", "speedup", "sent MB"]


def figures(ranks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures of each setting from both ranks' replies; the first is the baseline."""
    names = list(ranks[0])
    seconds = {
        name: [max(pair) for pair in zip(*(reply[name]["seconds"] for reply in ranks), strict=True)]
        for name in names
    }
    exposed = {
        name: statistics.fmean(reply[name]["median_exposed"] for reply in ranks) for name in names
    }
    base = names[0]
    return {
        name: {
            "seconds": spread(seconds[name]),
            "exposed": exposed[name],
            "hidden": 1 - exposed[name] / exposed[base],
            "speedup": statistics.median(
                one / other for one, other in zip(seconds[base], seconds[name], strict=True)
            ),
            "bytes": statistics.fmean(reply[name]["bytes"] for reply in ranks),
            "chosen": ranks[0][name]["chosen"],
            "equal": [reply[name]["digest"] for reply in ranks]
            == [reply[base]["digest"] for reply in ranks],
        }
        for name in names
    }


def run_ranks(ends: tuple[End, End], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the bench on both ranks; return their replies."""
    job = {
        "shape": {
            "hidden": options.hidden,
            "ffn": options.ffn,
            "experts": options.experts,
            "top_k": options.top_k,
        },
        "tokens": options.tokens,
        "chunks": options.chunks,
        "rounds": options.rounds,
        "zipf": options.zipf,
        "seed": options.seed,
    }
    return run_two_ranks("bench.workers.moe_overlap", job, ends, options.timeout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; print the table and the JSON line."""
    options = _parse(argv)
    with limited(options.link) if options.link else loopback() as ends:
        found = figures(run_ranks(ends, options))
    rows = [
        [
            name if entry["chosen"] is None else f"{name}: {entry['chosen']}",
            entry["seconds"]["median"] * 1e3,
            entry["exposed"] * 1e3,
            f"{entry['hidden']:.0%}",
            entry["speedup"],
            entry["bytes"] / 1e6,
        ]
        for name, entry in found.items()
    ]
    equal = all(entry["equal"] for entry in found.values())
    text = (
        f"{options.tokens:,} tokens per rank, 2 ranks, link {options.link or 'loopback'}, outputs "
        f"{'bitwise equal' if equal else 'DIFFER'}\n{table(HEADER, rows)}"
    )
    kept = {name: value for name, value in vars(options).items() if name != "out"}
    record = {
        "bench": "overlap",
        **environment_record(("torch",)),
        "options": kept,
        "chunks": found,
    }
    emit(text, record, options.out, "bench_overlap")
    return 0 if equal else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names: Any = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--link", metavar="RATE", help="as tc writes it: 1gbit; default: loopback")
    parser.add_argument(
        "--chunks",
        type=names,
        default=["1", "2", "4", "auto", "1 copies", "4 copies"],
        metavar="WAY,WAY",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--zipf", type=float, default=0.0, help="exponent; 0: balanced")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=300, help="seconds")
    parser.add_argument("--out", type=Path, help="folder for bench_overlap.txt and .json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
