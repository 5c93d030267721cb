"""Ranks over NCCL: all GPUs of this machine under torchrun, one rank each; gloo on the CPU.

Tokens must equal those of one rank, or with a single GPU those of the CPU. A rank that is killed or
stopped must be reported within the limit by the others, and leave no process.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench.candidate import REPOSITORY, Candidate, Running, start
from bench.parts import part_files
from chaos.processes import ranks_of, send, wait_until_gone
from make_random_checkpoint import SIZES, make_checkpoint

from gpu_checks.check import Check, Settings, at_most, figure, guarded, not_here
from gpu_checks.worker import end_marked, marked

GROUP = "nccl"
NEW_TOKENS = 12
# The collective's own limit; the report, and torchrun's end of the other ranks, after it.
TIMEOUT_S, GRACE_S = 5.0, 20.0
START_S = 60.0  # most until a job has written its first records
_MARK = "LOCKSTEP_GPU_JOB"


def check_nccl(settings: Settings) -> Iterator[Check]:
    """Check tokens of several layouts, then a killed and a stopped rank."""
    device = settings.device.type
    ranks = torch.cuda.device_count() if device == "cuda" else 2
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as name:
        folder = Path(name)
        yield figure(GROUP, "ranks", ranks, "one per GPU")
        try:
            make_checkpoint("mixtral", folder / "mixtral")
            yield from _check_tokens(folder, device, ranks)
        except Exception as error:  # a rank that did not start; the faults may still say why
            yield from guarded(GROUP, "tokens", lambda error=error: _raise(error))
        for fault, signum in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
            if fault == "stopped" and ranks == 1:
                yield not_here(GROUP, f"a rank {fault}", "one GPU: no other rank to report it")
                continue
            yield from guarded(
                GROUP,
                f"a rank {fault}",
                lambda f=fault, s=signum: _check_fault(folder, device, ranks, f, s),
            )


def _raise(error: Exception) -> list[Check]:
    raise error


def _check_tokens(folder: Path, device: str, ranks: int) -> Iterator[Check]:
    reference = device if ranks > 1 else "cpu"
    even = ranks > 1 and ranks % 2 == 0
    layouts: list[tuple[str, list[str] | None, list[list[int]]]] = [
        (f"EP {ranks}", [], _prompts(24)),
        # One short prompt: the other ranks have no token, and most experts no row.
        (f"EP {ranks}, zero rows on a rank", [], _prompts(1)),
        # Enough rows per rank to be divided (`engine/moe/dispatch/chunk_layout.py`).
        (
            f"EP {ranks}, 2 chunks",
            ["moe.overlap.chunks=2", "scheduler.max_batch_tokens=2048"],
            _prompts(6 * ranks, 250),
        ),
        (f"EP {ranks}, fewer tokens per step", ["scheduler.max_batch_tokens=64"], _prompts(9)),
        ("TP 2", ["parallel.tensor=2"] if even else None, _prompts(8)),
    ]
    with start(_engine("one", 1), 100.0) as one, start(_engine("all", ranks), 100.0) as every:
        for name, layout, prompts in layouts:
            if layout is None:
                yield not_here(GROUP, name, f"{ranks} GPU(s)")
                continue
            yield from guarded(
                GROUP,
                name,
                lambda n=name, p=prompts, s=layout: [
                    at_most(
                        GROUP,
                        f"{n}: prompts with other tokens than on one rank",
                        _differing(one, every, folder / "mixtral", p, s, (reference, device)),
                        0,
                        f"{len(p)} prompts, reference on {reference}",
                    )
                ],
            )


def _differing(
    one: Running,
    every: Running,
    checkpoint: Path,
    prompts: list[list[int]],
    settings: list[str],
    devices: tuple[str, str],
) -> int:
    expected = _tokens(one, checkpoint, prompts, devices[0], [])[0]
    found = _tokens(every, checkpoint, prompts, devices[1], settings)
    return max(
        sum(mine != theirs for mine, theirs in zip(each, expected, strict=True)) for each in found
    )


def _tokens(
    worker: Running, checkpoint: Path, prompts: list[list[int]], device: str, settings: list[str]
) -> list[list[list[int]]]:
    """Return the tokens that every rank has of every prompt."""
    common = [f"runtime.device={device}", "model.dtype=float32", "scheduler.kv_cache_blocks=512"]
    worker.call("load", checkpoint=str(checkpoint), settings=[*common, *settings])
    try:
        replies = worker.call("run", prompts=prompts, new_tokens=NEW_TOKENS)
    finally:
        worker.call("close")
    return [reply["tokens"] for reply in replies]


def _check_fault(
    folder: Path, device: str, ranks: int, fault: str, signum: signal.Signals
) -> list[Check]:
    """Send the last rank a signal in the middle of a job; the others must report it and end."""
    work = folder / fault
    work.mkdir()
    output, log = work / "out.jsonl", work / "log"
    mark = uuid.uuid4().hex
    with log.open("wb") as out:
        process = subprocess.Popen(
            _job(work, folder / "mixtral", output, device, ranks),
            env={**os.environ, _MARK: mark, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            victim = _wait_for_records(process, output, ranks)
            send(victim, signum)
            began = time.monotonic()
            code = process.wait(TIMEOUT_S + 2 * GRACE_S)
            seconds = time.monotonic() - began
            wait_until_gone(marked(_MARK, mark), 5.0)
            left = len(marked(_MARK, mark))
        except Exception:
            print(log.read_text(errors="replace")[-4000:])
            raise
        finally:
            end_marked(_MARK, mark)
            process.wait()
    text = log.read_text(errors="replace")
    names = len(re.findall(rf"rank\s*:?\s*{ranks - 1}\b", text))
    print(text[-4000:])
    name = f"a rank {fault}"
    return [
        at_most(GROUP, f"{name}: seconds until the job ended", seconds, TIMEOUT_S + GRACE_S),
        at_most(GROUP, f"{name}: job ended with exit code 0", float(code == 0), 0),
        at_most(GROUP, f"{name}: report without the rank's number", float(not names), 0),
        at_most(GROUP, f"{name}: processes left", left, 0),
    ]


def _wait_for_records(process: subprocess.Popen[bytes], output: Path, ranks: int) -> int:
    """Return the process of the last rank once the job has written records.

    Raises:
        RuntimeError: the job ended or wrote nothing within the limit.
    """
    deadline = time.monotonic() + START_S
    while not any(path.stat().st_size for path in part_files(output)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the job ended, or wrote no record, before its rank was to fail")
        time.sleep(0.02)
    return ranks_of(process.pid)[ranks - 1]


def _job(work: Path, checkpoint: Path, output: Path, device: str, ranks: int) -> list[str]:
    chance, requests, config = random.Random(5), work / "in.jsonl", work / "job.yaml"
    vocab = SIZES["tiny"].vocab
    with requests.open("w", encoding="utf-8") as file:
        for number in range(4000):  # more than the time until the fault lasts
            ids = [chance.randrange(vocab) for _ in range(chance.randint(1, 60))]
            entry: dict[str, Any] = {"id": str(number), "prompt_token_ids": ids}
            file.write(json.dumps({**entry, "max_tokens": chance.randint(2, 60)}) + "\n")
    config.write_text(
        f"model: {{path: {str(checkpoint)!r}, dtype: float32}}\n"
        f"runtime: {{device: {device}, timeout_s: {TIMEOUT_S}}}\n"
        "sampling: {ignore_eos: true}\n"
        "scheduler: {kv_cache_blocks: 256, max_sequences: 4}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(REPOSITORY / "launch" / "infer.py")]
    return [*command, "--config", str(config), "--input", str(requests), "--output", str(output)]


def _engine(name: str, ranks: int) -> Candidate:
    return Candidate(
        name=f"engine on {name}",
        module="bench.workers.generate_lockstep",
        python=sys.executable,
        ranks=ranks,
        threads=1,
        needs_engine=True,
    )


def _prompts(count: int, length: int = 60) -> list[list[int]]:
    chance = random.Random(count)
    vocab = SIZES["tiny"].vocab
    lengths = [chance.randint(1, length) if length < 100 else length for _ in range(count)]
    return [[chance.randrange(vocab) for _ in range(each)] for each in lengths]
