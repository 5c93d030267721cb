"""The job that faults hit: a few hundred greedy requests of a small model, and its ledger."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from bench.environment_record import REPOSITORY
from bench.parts import part_files

_SCRIPT = REPOSITORY / "launch" / "infer.py"
_MODEL = REPOSITORY / "configs" / "checkpoints" / "tiny_mixtral"
_WORDS = ("def", "f(x):", "return", "x", "+", "1", "the", "value", "of", "sum(", ")", "if", "else")


class Job:
    """Files in `folder`: config.yaml and in.jsonl; outputs go to any path.

    model: a checkpoint; by default the bundled one.
    """

    def __init__(
        self, folder: Path, num_requests: int, timeout_s: float, model: Path = _MODEL
    ) -> None:
        self.num_requests = num_requests
        self._config = folder / "config.yaml"
        self._input = folder / "in.jsonl"
        self._config.write_text(
            f"model: {{path: {model}, dtype: float32}}\n"
            "parallel: {expert: auto}\n"
            "scheduler: {max_sequences: 4}\n"
            "sampling: {ignore_eos: true}\n"
            f"runtime: {{device: cpu, timeout_s: {timeout_s}, threads: 1}}\n"
        )
        rng = random.Random(0)
        lines = []
        for number in range(num_requests):
            prompt = " ".join(rng.choices(_WORDS, k=rng.randint(1, 40)))
            request = {"id": f"r{number}", "prompt": prompt, "max_tokens": rng.randint(2, 24)}
            lines.append(json.dumps(request))
        lines[num_requests // 2] = lines[num_requests // 2][:-1]  # an error record
        self._input.write_text("\n".join(lines) + "\n")

    def command(self, output: Path) -> list[str]:
        """Return the script and its arguments."""
        files = ["--input", str(self._input), "--output", str(output)]
        return [str(_SCRIPT), "--config", str(self._config), *files]


def torchrun(num_ranks: int, max_restarts: int) -> list[str]:
    """Return torchrun's command line, up to the script."""
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*module, f"--nproc-per-node={num_ranks}", f"--max-restarts={max_restarts}"]


def tear(output: Path, num_bytes: int) -> bool:
    """Cut the end off the largest ledger shard; return False where there is nothing to cut."""
    parts = [part for part in part_files(output) if part.stat().st_size]
    if not parts:
        return False
    part = max(parts, key=lambda path: path.stat().st_size)
    with part.open("r+b") as file:
        file.truncate(max(0, part.stat().st_size - num_bytes))
    return True


def read_lines(output: Path) -> list[str]:
    """Return the records of a complete output, one per line."""
    return output.read_text(encoding="utf-8").splitlines()
