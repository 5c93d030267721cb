"""Panel: results of one model on a number of ranks under every setting.

The ranks are real processes over gloo with one CPU thread each, started once per panel.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.candidate import Candidate, start

from capacity.jobs import Item
from capacity.scores import Scores, collect
from capacity.settings import label, to_json
from capacity.speed import CallLoads, Speed, merge_calls, speed
from engine.config import CapacityConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Result of one setting's run."""

    setting: CapacityConfig
    scores: Scores
    speed: Speed
    assignments: int  # top-k assignments subject to capacity
    dropped: int  # of them
    added: int  # extras
    orphans: int  # tokens that kept no expert, summed over the layers
    gate_mass_kept: float  # share of the combine weights of tokens subject to capacity
    calls: list[CallLoads]  # loads of every layer call that capacity applied to
    tokens: list[int]  # of each of those steps, all ranks together
    bytes_sent: int
    seconds: float  # wall time of the run
    top_k: int
    measured: float | None = None  # speedup by `timing.py`; None: not timed

    @property
    def name(self) -> str:
        """The setting's label."""
        return label(self.setting)

    @property
    def drop_rate(self) -> float:
        """Dropped assignments over those subject to capacity."""
        return self.dropped / self.assignments if self.assignments else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Results of one model on one number of ranks."""

    model: str
    ranks: int
    items: list[Item]  # the job
    results: list[Result]  # dropless first

    @property
    def reference(self) -> Result:
        """The dropless run."""
        return self.results[0]

    def find(self, setting: CapacityConfig) -> Result | None:
        """Return the result of a setting, None where it was not run."""
        return next((item for item in self.results if item.setting == setting), None)


def engine_settings(ranks: int, items: Sequence[Item], batch_tokens: int) -> list[str]:
    """Return overrides for large prefill batches.

    `batch_tokens` per step over all ranks, every request of a rank at once, and a cache that holds
    them all.
    """
    block_size = 16
    blocks = [0] * ranks
    for item in items:
        length = len(item.prompt) + len(item.answer or ())
        blocks[item.rank] += -(-length // block_size)
    most = max(sum(item.rank == rank for item in items) for rank in range(ranks))
    tokens = -(-batch_tokens // ranks)
    return [
        "parallel.expert=null",
        "parallel.tensor=1",
        f"scheduler.max_batch_tokens={tokens}",
        f"scheduler.max_sequences={max(1, min(most, tokens))}",
        f"scheduler.block_size={block_size}",
        # Admission keeps one spare block for each running sequence.
        f"scheduler.kv_cache_blocks={max(blocks) + most}",
        "runtime.threads=1",
        "runtime.device=cpu",
    ]


def run_panel(
    config: str,
    ranks: int,
    items: list[Item],
    settings: Sequence[CapacityConfig],
    *,
    batch_tokens: int,
    overrides: Sequence[str] = (),
) -> Panel:
    """Start `ranks` ranks of `config`, run the job under every setting; return the results.

    Args:
        overrides: further `section.key=value` settings.

    Raises:
        WorkerError: a rank failed; the message has its log.
    """
    candidate = Candidate(
        name=f"{config}-{ranks}-ranks",
        module="capacity.worker",
        python=sys.executable,
        ranks=ranks,
        threads=1,
        needs_engine=True,
    )
    requests = [
        {
            "index": item.index,
            "rank": item.rank,
            "prompt": item.prompt,
            "new_tokens": len(item.answer or ()),
        }
        for item in items
    ]
    print(f"{config}, {ranks} ranks: starting ...", file=sys.stderr, flush=True)
    results = []
    with start(candidate) as running:
        keys = [*engine_settings(ranks, items, batch_tokens), *overrides]
        running.call("load", config=config, settings=keys, items=requests)
        for number, setting in enumerate(settings, start=1):
            began = time.monotonic()
            replies = running.call("run", capacity=to_json(setting))
            results.append(to_result(items, setting, replies))
            print(
                f"{config}, {ranks} ranks: {number}/{len(settings)} {label(setting)} "
                f"({time.monotonic() - began:.1f} s)",
                file=sys.stderr,
                flush=True,
            )
    return Panel(model=config, ranks=ranks, items=items, results=results)


def to_result(
    items: Sequence[Item],
    setting: CapacityConfig,
    replies: Sequence[dict[str, Any]],
) -> Result:
    """Combine the ranks' replies (see `worker.py`)."""
    first = replies[0]
    nll = dict(pair for reply in replies for pair in reply["scored"])
    generated = dict(pair for reply in replies for pair in reply["generated"])
    mass, kept = (sum(reply["mass"][part] for reply in replies) for part in (0, 1))
    calls = merge_calls(first["before"], [reply["after"] for reply in replies])
    layers = first["layers"]
    # The layers of a step run the same tokens, so one of them gives their number.
    by_step = dict(zip(first["steps"], calls, strict=True))
    top_k = first["top_k"]
    return Result(
        setting=setting,
        scores=collect(items, nll, generated),
        speed=speed(calls),
        assignments=sum(layer["assignments"] for layer in layers),
        dropped=sum(layer["dropped"] for layer in layers),
        added=sum(layer["added"] for layer in layers),
        orphans=sum(layer["orphans"] for layer in layers),
        gate_mass_kept=kept / mass if mass else 1.0,
        calls=calls,
        tokens=[int(call.before_WE.sum()) // top_k for call in by_step.values()],
        bytes_sent=first["bytes_sent"],
        seconds=first["seconds"],
        top_k=top_k,
    )


def check_reference(panel: Panel, checkpoint: Path) -> dict[str, Any] | None:
    """Compare the dropless run with the checkpoint's metrics.json, measured by transformers.

    Returns None where there is no such file. `matches`: every task's accuracy is the same and the
    loss agrees to 1e-3 nats.
    """
    path = checkpoint / "metrics.json"
    if not path.is_file():
        return None
    metrics = json.loads(path.read_text(encoding="utf-8"))
    scores = panel.reference.scores
    accuracy, loss = metrics["task_accuracy"], metrics["validation_loss"]
    same = all(abs(scores.by_task[task] - value) < 1e-9 for task, value in accuracy.items())
    return {
        "matches": same and abs(scores.loss - loss) < 1e-3,
        "loss": [scores.loss, loss],
        "accuracy": {task: [scores.by_task[task], value] for task, value in accuracy.items()},
    }
