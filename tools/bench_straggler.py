"""Are the findings right? The batch job on two ranks, with known causes of waiting.

    python tools/bench_straggler.py                       # all but the slow link
    python tools/bench_straggler.py --only slow_link      # as root: two network namespaces
    python tools/bench_straggler.py --out docs/results/straggler

Two real ranks, each pinned to a core, run launch/infer.py on a random Mixtral:

    balanced   nothing is wrong                       no rank may be named
    hot_expert rank 0's first experts are chosen      load, rank 0
               far more often than the others
    throttled  two busy processes on rank 1's core    device, rank 1
    stalled    rank 1 is stopped for 0.5 s, again     host, rank 1
               and again
    slow_link  100 Mbit/s between the ranks           network, no rank

The table shows the first finding of each; one JSON line follows. The exit code is 1 when one is
wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.candidate import REPOSITORY, TOOLS, WorkerError
from bench.environment_record import environment_record
from bench.link import End, limited, loopback
from bench.report import emit, table
from bench_speed_aware import cpu_hogs

HEADER = ["trouble", "cause", "ranks", "time lost", "right"]
EXPECTED: dict[str, tuple[str, list[int]]] = {
    "balanced": ("balanced", []),
    "hot_expert": ("load", [0]),
    "throttled": ("device", [1]),
    "stalled": ("host", [1]),
    "slow_link": ("network", []),
}
# Requests, and new tokens of each. Unequal loads cost most in prefill, which rows bound; a stall
# differs from a slow device by affecting few of the steps, so those jobs have many.
JOBS = {"hot_expert": (160, 8), "stalled": (64, 112)}
_JOB = (48, 48)
_STOP_S, _GO_S = 0.5, 0.6


def make_checkpoint(folder: Path) -> None:
    """Write the random Mixtral of the other benches."""
    tool = [sys.executable, str(TOOLS / "make_random_checkpoint.py")]
    options = ["--family", "mixtral", "--size", "bench", "--out", str(folder)]
    subprocess.run([*tool, *options], check=True, stdout=subprocess.DEVNULL)


def skew_loads(folder: Path, skewed: Path, by: float = 6.0) -> None:
    """Copy a checkpoint with most load on rank 0's experts.

    Expert 1's gate is the opposite of expert 0's and both are large, so every token chooses one of
    them; half of them choose expert 2.
    """
    from safetensors.torch import load_file, save_file

    skewed.mkdir()
    for source in folder.iterdir():
        if source.suffix != ".safetensors":
            (skewed / source.name).write_bytes(source.read_bytes())
            continue
        tensors = load_file(source)
        for name, tensor in tensors.items():
            if "gate.weight" in name:
                tensor[1] = -tensor[0]
                tensor[:3] *= by
        save_file(tensors, skewed / source.name, metadata={"format": "pt"})


def make_input(path: Path, num_requests: int, seed: int) -> None:
    """Write ragged prompts of random token ids."""
    draw = random.Random(seed)
    lines = [
        {"id": str(n), "prompt_token_ids": [draw.randrange(4096) for _ in range(length)]}
        for n in range(num_requests)
        for length in [draw.randrange(32, 256)]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@contextmanager
def stalls(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stop a process for a while, repeatedly, until the block is left."""
    over = threading.Event()

    def strike() -> None:
        while not over.wait(_GO_S) and process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            over.wait(_STOP_S)
            process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run_job(
    checkpoint: Path,
    folder: Path,
    ends: tuple[End, End],
    options: argparse.Namespace,
    *,
    new_tokens: int,
    stall: bool,
) -> dict[str, Any]:
    """Run the batch job on both ranks; return its report.

    Raises:
        WorkerError: a rank failed or did not end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = folder / "out.jsonl"
    shutil.rmtree(folder / "spans", ignore_errors=True)
    settings = {
        "model.path": checkpoint,
        "sampling.max_new_tokens": new_tokens,
        "sampling.ignore_eos": "true",
        "runtime.threads": 1,
        "profiler.spans": folder / "spans",
    }
    command = [sys.executable, str(REPOSITORY / "launch" / "infer.py")]
    command += ["--config", str(REPOSITORY / "configs" / "tiny_mixtral_ep2.yaml"), "--overwrite"]
    command += ["--input", str(folder / "in.jsonl"), "--output", str(output)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    cores = sorted(os.sched_getaffinity(0))
    running = []
    for rank, end in enumerate(ends):
        environ = {
            **os.environ,
            **end.env,
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0" if end.command else str(rank),
            "LOCAL_WORLD_SIZE": "1" if end.command else "2",
        }
        pinned = ["taskset", "-c", str(cores[rank % len(cores)])]
        running.append(
            subprocess.Popen(
                [*end.command, *pinned, *command],
                env=environ,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
    try:
        if stall:
            _wait_for(folder / "spans" / "spans.rank00001.jsonl", options.timeout)
            with stalls(running[1]):
                running[0].wait(options.timeout)
        for rank, process in enumerate(running):
            _, err = process.communicate(timeout=options.timeout)
            if process.returncode:
                raise WorkerError(f"rank {rank} failed:\n{err.decode(errors='replace')[-2000:]}")
    except subprocess.TimeoutExpired as error:
        raise WorkerError(f"no result in {options.timeout} s") from error
    finally:
        for process in running:
            process.kill()
            process.wait()
    return json.loads(Path(f"{output}.report.json").read_text())["run"]


def _wait_for(path: Path, timeout: float) -> None:
    """Wait for a file that a rank opens once its model is loaded: earlier stalls do not count."""
    end = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > end:
            raise WorkerError(f"the job did not begin within {timeout} s")
        time.sleep(0.05)


def run_trouble(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return one row: the job's findings with this cause, and whether they are right."""
    checkpoint = folder / ("skewed" if name == "hot_expert" else "even")
    num_requests, new_tokens = JOBS.get(name, _JOB)
    make_input(folder / "in.jsonl", num_requests, options.seed)
    place = limited(options.link) if name == "slow_link" else loopback()
    with cpu_hogs(2 if name == "throttled" else 0), place as ends:
        run = run_job(
            checkpoint, folder, ends, options, new_tokens=new_tokens, stall=name == "stalled"
        )
    first = run["verdict"][0]
    cause, ranks = EXPECTED[name]
    return {
        "verdicts": run["verdict"],
        "lost": run["lost"],
        "seconds": run["seconds"],
        "right": first["cause"] == cause and first["ranks"] == ranks,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the troubles; print the table and the JSON line."""
    options = _parse(argv)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        make_checkpoint(folder / "even")
        skew_loads(folder / "even", folder / "skewed")
        for trouble in options.only:
            found[trouble] = run_trouble(trouble, folder, options)
    rows = [
        [
            trouble,
            first["cause"],
            ", ".join(map(str, first["ranks"])) or "-",
            f"{first['share']:.0%}",
            "yes" if entry["right"] else "NO",
        ]
        for trouble, entry in found.items()
        for first in entry["verdicts"][:1]
    ]
    findings = [f"{trouble}: {entry['verdicts'][0]['text']}" for trouble, entry in found.items()]
    text = "\n".join(["2 ranks of one core each", table(HEADER, rows), *findings])
    kept = {name: value for name, value in vars(options).items() if name != "out"}
    record = {
        "bench": "straggler",
        **environment_record(("torch",)),
        "options": kept,
        "troubles": found,
    }
    emit(text, record, options.out, "bench_straggler")
    return 0 if all(entry["right"] for entry in found.values()) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names: Any = lambda text: text.split(",")  # noqa: E731
    usual = [name for name in EXPECTED if name != "slow_link"]
    parser.add_argument("--only", type=names, default=usual, metavar="NAME,NAME")
    parser.add_argument("--link", default="100mbit", metavar="RATE", help="of slow_link")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=300, help="seconds")
    parser.add_argument("--out", type=Path, help="folder for bench_straggler.txt and .json")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.only) - set(EXPECTED)):
        parser.error(f"--only {unknown[0]}: must be of {', '.join(EXPECTED)}")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
