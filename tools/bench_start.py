"""Time from srun to the first record of a Slurm job, against a lower bound of any engine.

    python tools/bench_start.py                    # four ranks on two virtual nodes

Needs Debian's slurm-wlm and munge: the job runs under a real slurmctld, on the CPU, over gloo.

    lower bound  as many processes as ranks, at once: `import torch`, then config, tokenizer and
                 every weight of the checkpoint read by Hugging Face's own libraries
    bare         the same without config and tokenizer, and so without `import transformers`
    job          srun of the same number of tasks; each runs launch/infer.py. From srun's start to
                 the first record in the ledger: of one new token, on disk
    queue        srun of tasks that do nothing: Slurm's own share of `job`

They run in turns. The ratio is the median of job / lower bound of the same round; the job's time
includes Slurm's. The table is followed by one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.candidate import REPOSITORY
from bench.environment_record import environment_record
from bench.parts import written
from bench.report import emit, spread, table
from virtual_slurm import VirtualSlurm, missing_programs

HEADER = ["what", "seconds", "over lower bound"]
NAMES = ("floor", "bare", "job", "queue")  # keys of the JSON line
_LABELS = {"floor": "lower bound"}
_SCRIPT = REPOSITORY / "launch" / "infer.py"
_CHECKPOINT = REPOSITORY / "configs" / "checkpoints" / "tiny_mixtral"
_TOKENIZER = """
from transformers import AutoConfig, AutoTokenizer
AutoConfig.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
"""
_BARE = """
import sys
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
weights = load_file(sys.argv[1] + "/model.safetensors")
assert weights and sum(float(each.sum()) for each in weights.values())
"""
_LIMIT_S = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds, print the table and the JSON line."""
    options = _parse(argv)
    if missing := missing_programs():
        raise ValueError(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        VirtualSlurm(num_nodes=2) as slurm,
    ):
        folder = Path(name)
        line = {"id": "first", "prompt": "The capital of France is", "max_new_tokens": 1}
        (folder / "in.jsonl").write_text(json.dumps(line) + "\n")
        for turn in range(options.rounds + 1):  # the first one warms the page cache
            found = {
                "floor": _processes(options.ranks, _BARE + _TOKENIZER),
                "bare": _processes(options.ranks, _BARE),
                "job": _job(slurm, folder, options.ranks, turn),
                "queue": _queue(slurm, options.ranks),
            }
            if turn:
                for name in NAMES:
                    seconds[name].append(found[name])
    ratios = {
        name: [own / low for own, low in zip(seconds[name], seconds["floor"], strict=True)]
        for name in NAMES
    }
    rows = [
        [
            _LABELS.get(name, name),
            statistics.median(seconds[name]),
            f"{statistics.median(ratios[name]):.2f}x",
        ]
        for name in NAMES
    ]
    text = f"{options.ranks} ranks, {options.rounds} rounds\n{table(HEADER, rows)}"
    record = {
        "bench": "start",
        **environment_record(("torch", "transformers")),
        "ranks": options.ranks,
        "rounds": options.rounds,
        "seconds": {name: spread(seconds[name]) for name in NAMES},
        "over_floor": {name: spread(ratios[name]) for name in NAMES},
    }
    emit(text, record, options.out, "bench_start")
    return 0


def _processes(ranks: int, code: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-c", code, str(_CHECKPOINT)]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(ranks)]
    for process in running:
        if process.wait(_LIMIT_S):
            raise RuntimeError(f"a process ended with exit code {process.returncode}")
    return time.perf_counter() - began


def _job(slurm: VirtualSlurm, folder: Path, ranks: int, turn: int) -> float:
    output = folder / f"out{turn}.jsonl"
    command = [sys.executable, str(_SCRIPT), "--config", "tiny_mixtral_ep2"]
    for setting in (f"parallel.expert={ranks}", "runtime.device=cpu"):
        command += ["--set", setting]
    command += ["--input", str(folder / "in.jsonl"), "--output", str(output)]
    began = time.perf_counter()
    process = slurm.start(*_srun(ranks), *command)
    while time.perf_counter() - began < _LIMIT_S:
        if output.exists() or written(output):
            break
        if process.poll() is not None:
            break
        time.sleep(0.005)
    taken = time.perf_counter() - began
    _, errors = process.communicate(timeout=_LIMIT_S)
    if process.returncode or not output.exists():
        raise RuntimeError(f"the job failed:\n{errors.decode(errors='replace')[-2000:]}")
    return taken


def _queue(slurm: VirtualSlurm, ranks: int) -> float:
    began = time.perf_counter()
    slurm.run(*_srun(ranks), "true")
    return time.perf_counter() - began


def _srun(ranks: int) -> list[str]:
    return ["srun", "--nodes=2", f"--ntasks-per-node={ranks // 2}", "--exclusive"]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for bench_start.txt and .json")
    options = parser.parse_args(argv)
    if options.ranks < 2 or options.ranks % 2 or options.rounds < 1:
        parser.error("--ranks must be even and at least 2, --rounds at least 1")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
