"""Cost of the profiler: the same job with and without it, in turns, in one run.

    python tools/bench_profiler.py                 # two ranks, one core each
    python tools/bench_profiler.py --ranks 1
    python tools/bench_profiler.py --candidates on routing claims

Each rank builds two engines on one random Mixtral, `profiler.enabled` true and false, and both run
the same requests again and again: off, on, off, on, ... The cost is the median of on / off of the
same round, of wall time (the slower rank's) and of processor time (both ranks', all threads), which
other work on the machine disturbs less. A third engine with span files (`profiler.spans`) shows
the cost of writing them. `--candidates` chooses the engines, `routing` and `claims` among them
(`profiler.routing`, with and without claims); the cost is that over the first. The place of an
engine's weights in memory makes one or two percent for as long as it exists, so the ranks are
started several times and build the engines in another order each time. A recording of the routing
costs less than such runs can tell apart, so the time inside of it is also counted, as a share of
the run. The table is followed by one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.candidate import REPOSITORY, TOOLS, WorkerError
from bench.environment_record import environment_record
from bench.report import emit, spread, table
from bench_straggler import make_checkpoint

NAMES = ("off", "on", "spans")  # by default


def profilers(folder: str) -> dict[str, dict[str, Any]]:
    """Return the profiler's settings of every candidate."""
    return {
        "off": {"enabled": False},
        "on": {},
        "spans": {"spans": f"{folder}/spans"},
        "routing": {"routing": f"{folder}/routing"},
        "claims": {"routing": f"{folder}/claims", "routing_claims": True},
    }


class Stopwatch:
    """Adds up the time inside of functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return run


def worker(job: dict[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """Run one rank; return each engine's runs: wall and CPU seconds, and those spent recording.

    Collective.
    """
    import torch.distributed as dist

    from engine.config.loader import config_from_tree
    from engine.distributed import bootstrap
    from engine.llm import LLM
    from engine.moe.stats import LayerStats
    from engine.profiling.routing.recorder import RoutingRecorder
    from engine.request import SamplingParams

    recording = Stopwatch()
    for owner, name in ((RoutingRecorder, "add"), (LayerStats, "_record_claims")):
        setattr(owner, name, recording.timed(getattr(owner, name)))
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})

    def config(profiler: dict[str, Any]) -> Any:
        runtime = {"device": "cpu", "threads": 1}
        model = {"path": job["checkpoint"]}
        return config_from_tree({"model": model, "runtime": runtime, "profiler": profiler})

    topology = bootstrap.start(config({}))
    names, settings = tuple(job["candidates"]), profilers(job["folder"])
    first = job["start"] % len(names)
    built = names[first:] + names[:first]
    engines = {name: LLM(config(settings[name]), topology) for name in built}
    draw = random.Random(0)
    prompts = [
        [draw.randrange(4096) for _ in range(draw.randrange(32, 256))]
        for _ in range(job["requests"])
    ]
    params = SamplingParams(max_new_tokens=job["new_tokens"], ignore_eos=True)
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for turn in range(job["rounds"] + 1):
        order = built if turn % 2 else tuple(reversed(built))
        for name in order:
            dist.barrier()
            begin = time.perf_counter(), time.process_time(), recording.seconds
            engines[name].generate(prompts, params)
            end = time.perf_counter(), time.process_time(), recording.seconds
            if turn:
                wall, cpu, inside = (b - a for a, b in zip(begin, end, strict=True))
                seconds[name].append((wall, cpu, inside))
    dist.barrier()
    bootstrap.stop(topology)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks, print the table and the JSON line."""
    options = _parse(argv)
    names = options.candidates
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        make_checkpoint(Path(folder) / "model")
        job = {
            "checkpoint": str(Path(folder) / "model"),
            "folder": folder,
            "candidates": names,
            "requests": options.requests,
            "new_tokens": options.new_tokens,
            "rounds": options.rounds,
        }
        started = [
            runs(_run({**job, "start": start}, options.ranks, options.timeout))
            for start in range(options.starts)
        ]
    wall, cpu, inside = (
        {name: [value for kinds in started for value in kinds[kind][name]] for name in names}
        for kind in (0, 1, 2)
    )
    over_off = [
        {
            name: [own / off for own, off in zip(kind[name], kind[names[0]], strict=True)]
            for name in kind
        }
        for kind in (wall, cpu)
    ]
    rows = [
        [
            name,
            *(
                cell
                for kind, ratios in zip((wall, cpu), over_off, strict=True)
                for cell in (
                    statistics.median(kind[name]),
                    f"{statistics.median(ratios[name]) - 1:+.2%}",
                )
            ),
            f"{statistics.median(inside[name]):.2%}",
        ]
        for name in names
    ]
    over = f"over {names[0]}"
    header = ["profiler", "seconds", over, "CPU seconds", over, "recording"]
    text = (
        f"{options.requests} requests, {options.new_tokens} new tokens each, {options.ranks} ranks "
        f"of one core, {options.starts} starts of {options.rounds} rounds\n{table(header, rows)}"
    )
    kept = {name: value for name, value in vars(options).items() if name not in ("out", "worker")}
    record = {
        "bench": "profiler",
        **environment_record(("torch",)),
        "options": kept,
        "seconds": {name: spread(wall[name]) for name in names},
        "over_off": {name: spread(over_off[0][name]) for name in names},
        "cpu_seconds": {name: spread(cpu[name]) for name in names},
        "cpu_over_off": {name: spread(over_off[1][name]) for name in names},
        "recording": {name: spread(inside[name]) for name in names},
    }
    emit(text, record, options.out, "bench_profiler")
    return 0


def runs(
    ranks: Sequence[dict[str, list[Sequence[float]]]],
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """Return, by engine, of each run: wall time of the slowest rank, CPU time of all ranks, and the
    largest share of a rank's wall time that went into recording.
    """
    wall, cpu, inside = {}, {}, {}
    for name in ranks[0]:
        rounds = list(zip(*(reply[name] for reply in ranks), strict=True))
        wall[name] = [max(run[0] for run in each) for each in rounds]
        cpu[name] = [sum(run[1] for run in each) for each in rounds]
        inside[name] = [max(run[2] / run[0] for run in each) for each in rounds]
    return wall, cpu, inside


def _run(job: dict[str, Any], num_ranks: int, timeout: float) -> list[dict[str, Any]]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(TOOLS / "bench_profiler.py"), "--worker", json.dumps(job)]
    environ = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TOOLS), str(REPOSITORY)]),
    }
    running = [
        subprocess.Popen(
            command,
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(num_ranks)
    ]
    replies = []
    try:
        for rank, process in enumerate(running):
            out, err = process.communicate(timeout=timeout)
            if process.returncode:
                raise WorkerError(f"rank {rank} failed:\n{err.decode(errors='replace')[-2000:]}")
            replies.append(json.loads(out.decode().splitlines()[-1]))
    except subprocess.TimeoutExpired as error:
        raise WorkerError(f"no result in {timeout} s") from error
    finally:
        for process in running:
            process.kill()
            process.wait()
    return replies


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=8, help="of each start")
    parser.add_argument("--starts", type=int, default=6, help="each with engines made anew")
    parser.add_argument(
        "--candidates", nargs="+", choices=sorted(profilers("")), default=list(NAMES)
    )
    parser.add_argument("--timeout", type=int, default=600, help="seconds")
    parser.add_argument("--out", type=Path, help="folder for bench_profiler.txt and .json")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if min(options.ranks, options.rounds, options.starts) < 1:
        parser.error("--ranks, --rounds and --starts must be at least 1")
    return options


if __name__ == "__main__":
    asked = _parse(None)
    if asked.worker is not None:
        print(json.dumps(worker(asked.worker)), flush=True)
        sys.exit(0)
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
