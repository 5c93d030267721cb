"""The whole engine on the device: every family against the CPU, memory, and one batch job.

Engines run in worker processes (`bench/workers/generate_lockstep.py`), one per device, which load
one model after the other.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.candidate import REPOSITORY, Candidate, Running, start
from bench.jobs import make_job
from make_random_checkpoint import FAMILIES, SIZES, make_checkpoint

from gpu_checks.check import Check, at_most, guarded

NEW_TOKENS = 12
# Differences of log probabilities, in nats: float32 on two devices, and bfloat16 against float32
# as a mean, because one token may go to another expert.
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-3, 0.1
KV_GIB = 0.25
BACKENDS = ("torch", "grouped_mm", "te")


def check_engine(device: str, folder: Path, families: Sequence[str] = FAMILIES) -> list[Check]:
    """Check families, memory and the batch job.

    Args:
        device: 'cuda' or 'cpu'.
        folder: for checkpoints.
    """
    for family in families:
        make_checkpoint(family, folder / family)
    found: list[Check] = []
    with start(_engine("cpu")) as cpu, start(_engine(device)) as other:
        for family in families:
            checkpoint = str(folder / family)
            found += guarded(
                "families",
                family,
                lambda c=checkpoint, f=family: _check_family(cpu, other, device, c, f),
            )
        found += guarded(
            "batch job",
            "launch/infer.py",
            lambda: _check_job(cpu, device, folder / families[0], folder),
        )
        found += guarded("memory", "peak", lambda: _check_memory(other, device, folder / "bench"))
    return found


def _check_family(
    cpu: Running, other: Running, device: str, checkpoint: str, family: str
) -> list[Check]:
    expected = _outputs(cpu, checkpoint, "cpu", "float32")
    result = _outputs(other, checkpoint, device, "float32")
    pairs = list(zip(result["tokens"], expected["tokens"], strict=True))
    differing = sum(mine != theirs for mine, theirs in pairs)
    found = [
        at_most("families", f"{family}: prompts with other tokens than on the CPU", differing, 0),
        at_most(
            "families",
            f"{family}: log probabilities, float32",
            _difference(result, expected, max),
            FLOAT32_BOUND,
            f"experts {result['backends']}",
        ),
    ]
    for backend in BACKENDS:
        name = f"{family}: log probabilities, bfloat16, {backend}"

        def check(backend: str = backend, name: str = name) -> list[Check]:
            rounded = _outputs(other, checkpoint, device, "bfloat16", backend)
            difference = _difference(rounded, expected, lambda v: sum(v) / len(v))
            return [at_most("families", name, difference, BFLOAT16_BOUND, "mean")]

        if backend == "te" and not _has_transformer_engine(device):
            note = "Transformer Engine is not here"
            found.append(Check(group="families", name=name, passed=None, note=note))
        else:
            found += guarded("families", name, check)
    return found


def _outputs(
    worker: Running, checkpoint: str, device: str, dtype: str, backend: str = "auto"
) -> dict[str, Any]:
    settings = [
        f"runtime.device={device}",
        f"model.dtype={dtype}",
        f"moe.experts.backend={backend}",
        "scheduler.kv_cache_blocks=256",
        "scheduler.max_batch_tokens=64",  # so that long prompts are prefilled in chunks
    ]
    (loaded,) = worker.call("load", checkpoint=checkpoint, settings=settings)
    try:
        prompts = _prompts()
        (run,) = worker.call("run", prompts=prompts, new_tokens=NEW_TOKENS)
        (scored,) = worker.call("score", prompts=prompts)
    finally:
        worker.call("close")
    return {**loaded, **run, **scored}


def _check_job(cpu: Running, device: str, checkpoint: Path, folder: Path) -> list[Check]:
    """Return the user's command under torchrun with one rank: on CUDA, one rank over NCCL."""
    expected = _outputs(cpu, str(checkpoint), "cpu", "float32")["tokens"]
    requests, completions = folder / "requests.jsonl", folder / "completions.jsonl"
    lines = [{"id": str(i), "prompt_token_ids": ids} for i, ids in enumerate(_prompts())]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = folder / "job.yaml"
    config.write_text(
        f"model: {{path: {str(checkpoint)!r}, dtype: float32}}\n"
        f"runtime: {{device: {device}}}\n"
        f"sampling: {{max_new_tokens: {NEW_TOKENS}, ignore_eos: true}}\n"
        "scheduler: {kv_cache_blocks: 256}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "1", str(REPOSITORY / "launch" / "infer.py")]
    command += ["--config", str(config), "--input", str(requests), "--output", str(completions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    records = [json.loads(line) for line in completions.read_text("utf-8").splitlines()]
    got = [record["token_ids"] for record in records]
    unfinished = sum(record["finish_reason"] != "length" for record in records)
    wrong = sum(mine != theirs for mine, theirs in zip(got, expected, strict=True))
    name = "launch/infer.py, torchrun, 1 rank"
    return [
        at_most("batch job", f"{name}: records not finished", unfinished, 0),
        at_most("batch job", f"{name}: records with other tokens than on the CPU", wrong, 0),
    ]


def _check_memory(worker: Running, device: str, checkpoint: Path) -> list[Check]:
    """Return peak of the 57.7M-parameter model: weights + KV cache + 25%."""
    make_checkpoint("mixtral", checkpoint, size="bench")
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 2**20
    settings = [
        f"runtime.device={device}",
        "model.dtype=float32",
        f"scheduler.kv_cache_gib={KV_GIB}",
    ]
    (loaded,) = worker.call("load", checkpoint=str(checkpoint), settings=settings)
    try:
        job = make_job("batch8", SIZES["bench"].vocab)
        (run,) = worker.call("run", prompts=job.prompts, new_tokens=4)
    finally:
        worker.call("close")
    budget = weights + KV_GIB * 1024
    if device == "cpu":
        # A process that has run other models before; what it held when this one began is not its.
        peak = run["peak_rss_mib"] - loaded["idle"]["rss_mib"]
    else:
        peak = run["peak_device_mib"]
    note = f"MiB; weights {weights:.0f} + KV cache {KV_GIB * 1024:.0f}, and 25%"
    return [at_most("memory", f"peak on {device}", peak, 1.25 * budget, note)]


def _engine(device: str) -> Candidate:
    return Candidate(
        name=f"engine on {device}",
        module="bench.workers.generate_lockstep",
        python=sys.executable,
        threads=len(os.sched_getaffinity(0)),
        needs_engine=True,
    )


def _prompts() -> list[list[int]]:
    token = random.Random(3)
    lengths = (1, 5, 40, 17, 90, 2, 33, 64)
    vocab = SIZES["tiny"].vocab
    return [[token.randrange(vocab) for _ in range(length)] for length in lengths]


def _difference(result: dict[str, Any], expected: dict[str, Any], reduce: Any) -> float:
    pairs = zip(result["logprobs"], expected["logprobs"], strict=True)
    return reduce([abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)])


def _has_transformer_engine(device: str) -> bool:
    import importlib.util

    return device == "cuda" and importlib.util.find_spec("transformer_engine") is not None
