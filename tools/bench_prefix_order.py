"""What ordering a big input by common prefixes takes: time and memory of rank 0.

    python tools/bench_prefix_order.py             # a million lines, 1,000 prefixes, 8 ranks

    scan     read the input and index it, as a job with scheduler.prefix_cache = false does
    ordered  the same with the hashes of the prompts' beginnings; then groups, order and dealing

Each in a process of its own, three times, in turns; medians. Seconds are of the processor, memory
is the peak of the process.
The table is followed by one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.candidate import REPOSITORY
from bench.environment_record import environment_record
from bench.report import emit, table

HEADER = ["job", "scan s", "order s", "rank 0 peak MiB"]
_WORDS = "the of value return def sum class model when input over each".split()
_ROUNDS = 3


def make_input(path: Path, lines: int, prefixes: int, words: int) -> None:
    """Write requests that begin with one of `prefixes` texts of `words` words; 0: with none."""
    draw = random.Random(0)
    begins = [" ".join(draw.choices(_WORDS, k=words)) for _ in range(prefixes)] or [""]
    with path.open("w") as file:
        for number in range(lines):
            own = " ".join(draw.choices(_WORDS, k=draw.randint(3, 40)))
            line = {"id": f"request-{number}", "prompt": f"{draw.choice(begins)} {own}"}
            file.write(json.dumps({**line, "max_new_tokens": 16}) + "\n")


def prepare(path: Path, ordered: bool, ranks: int) -> tuple[float, float, int, float]:
    """Return seconds to scan and to order, the lines that share prefixes, and the peak in MiB."""
    import numpy as np

    from engine.batch.input.index import scan_input
    from engine.batch.input.pending import PendingLines
    from engine.batch.input.prefix_hashes import PrefixHasher
    from engine.generation.prefix_order import find_shared

    begin, sharing = time.process_time(), 0
    hasher = PrefixHasher() if ordered else None
    index = scan_input(path, on_lines=None if hasher is None else hasher.add)
    scanned = time.process_time()
    lines = PendingLines.select(index, np.zeros(len(index), dtype=bool))
    if hasher is not None:
        prefixes = hasher.finish().select(lines[:, 0])
        if (shared := find_shared(prefixes)) is not None:
            dealt_n, _ = shared.deal(prefixes.sizes_n, ranks)
            lines, sharing = lines[dealt_n], shared.num_sharing
    seconds = time.process_time() - scanned
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return scanned - begin, seconds, sharing, int(found[1]) / 1024 if found else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both inputs; print the table and the JSON line."""
    options = _parse(argv)
    rows, jobs = [], {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for kind, prefixes in (("no prefixes", 0), ("prefixes", options.prefixes)):
            path = Path(name) / "in.jsonl"
            make_input(path, options.lines, prefixes, options.words)
            taken: dict[bool, list[tuple[float, float, int, float]]] = {False: [], True: []}
            for _ in range(_ROUNDS):
                for ordered, runs in taken.items():
                    runs.append(_in_process(path, ordered, options.ranks))
            for ordered, runs in taken.items():
                scan_s, order_s, sharing, peak_mib = map(statistics.median, zip(*runs, strict=True))
                job = f"{kind}, {'ordered' if ordered else 'scan'}"
                rows.append([job, scan_s, order_s, peak_mib])
                jobs[job] = {"scan_s": scan_s, "order_s": order_s, "peak_mib": peak_mib}
                jobs[job] |= {"sharing": sharing, "input_bytes": path.stat().st_size}
    slower = [after[1] / before[1] - 1 for before, after in zip(rows[::2], rows[1::2], strict=True)]
    more = [after[3] - before[3] for before, after in zip(rows[::2], rows[1::2], strict=True)]
    text = (
        f"{options.lines:,} lines, {options.prefixes:,} prefixes of {options.words} words, "
        f"{options.ranks} ranks\n{table(HEADER, rows)}\n\n"
        f"the scan is slower by {slower[0]:.0%} without prefixes and {slower[1]:.0%} with them; "
        f"rank 0 needs {more[0]:.0f} and {more[1]:.0f} MiB more"
    )
    record = {
        "bench": "prefix_order",
        **environment_record(("numpy",)),
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "jobs": jobs,
    }
    emit(text, record, options.out, "bench_prefix_order")
    return 0


def _in_process(path: Path, ordered: bool, ranks: int) -> tuple[float, float, int, float]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(prepare, path, ordered, ranks).result()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--prefixes", type=int, default=1000)
    parser.add_argument("--words", type=int, default=256, help="of a prefix")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--out", type=Path, help="folder for bench_prefix_order.txt and .json")
    options = parser.parse_args(argv)
    if min(options.lines, options.prefixes, options.words, options.ranks) < 1:
        parser.error("--lines, --prefixes, --words and --ranks must be at least 1")
    return options


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    sys.exit(main())
