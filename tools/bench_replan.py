"""How fast copies of experts follow a change of traffic: `moe.copies.replan` on trained experts.

    python tools/bench_replan.py
    python tools/bench_replan.py --config tiny_olmoe_ep4 --every 5 --runs 3

A job of texts becomes, from one step to the next, a job of task prompts. Its copies are planned for
texts alone. It runs with and without re-planning, in turns in one run, on real ranks over gloo
with one CPU thread each; texts and tasks are none of the checkpoint's evaluation sets.

    share        the mean rank's rows over the most loaded rank's, all layers together
    step N       first step after the change from which on the share stays above --share
    moved        copies that were replaced, over the experts of all layers: until that step, and in
                 the whole window
    slowest      the slowest step of the window after the change over the median step of the same
                 window without re-planning, in the run before it: what moving copies costs at most

The table has medians over the runs, one JSON line follows.

Legend: S steps, L MoE layers, E experts, W ranks.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no install

import numpy as np
from bench.candidate import Candidate, WorkerError, start
from bench.environment_record import environment_record
from bench.report import emit, table
from capacity.calibration import TASKS, assigned, calibration_items
from capacity.jobs import TEXT, Item
from capacity.panel import engine_settings
from capacity_report import load_tokenizer

from engine.config.loader import load_config
from engine.moe.placement import search
from engine.moe.placement.placement_file import write_placement

JOB = "texts, then tasks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one run did around the change of traffic."""

    share_before: float  # over the steps of texts
    share_at_change: float  # of the first step of tasks alone
    share_after: float  # over the last half of the window
    recovered: int | None  # steps after the change until the share stays above the limit
    moved_by_then: float  # copies that were replaced until then, over the experts of all layers
    moved: float  # the same in the whole window
    slowest: float  # step of the window, seconds
    median: float  # step of the window, seconds


def outcome(replies: Sequence[dict[str, Any]], change: int, window: int, limit: float) -> Outcome:
    """Return the outcome of one run.

    Args:
        replies: of the ranks.
        change: the first step of tasks alone.
        window: steps after it that count.
        limit: the share to reach.
    """
    before_SLE = np.array(replies[0]["before"])
    after_WSL = np.array([reply["after"] for reply in replies])
    slowest_S = after_WSL.max(0).sum(1)
    share_S = before_SLE.sum((1, 2)) / len(replies) / slowest_S
    seconds_S = np.array([reply["seconds"] for reply in replies]).max(0)
    inside = slice(change, change + window)
    if len(share_S) < change + window:
        raise ValueError(f"the job has {len(share_S)} steps, {change + window} are needed")
    low = np.flatnonzero(share_S[inside] <= limit)
    first = 0 if low.size == 0 else int(low[-1]) + 1
    moves_S = replies[0]["moves"]
    last = min(first, window - 1)
    moved_by_then, moved = (moves_S[change + n] - moves_S[change - 1] for n in (last, window - 1))
    num_experts = before_SLE.shape[1] * before_SLE.shape[2]
    return Outcome(
        share_before=float(np.mean(share_S[: max(1, change - 1)])),
        share_at_change=float(share_S[change]),
        share_after=float(np.mean(share_S[change + window // 2 : change + window])),
        recovered=first if first < window else None,
        moved_by_then=moved_by_then / num_experts,
        moved=moved / num_experts,
        slowest=float(seconds_S[inside].max()),
        median=float(np.median(seconds_S[inside])),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; print the table and the JSON line."""
    options = _parse(argv)
    config = load_config(options.config, [])
    ranks, tokens = options.ranks, options.batch_tokens
    items = calibration_items(load_tokenizer(config), [], tokens * 16, options.seed)
    later = calibration_items(
        load_tokenizer(config), [], tokens * (options.window + 6), options.seed + 1
    )
    texts = _first(later[TEXT], tokens * options.texts)
    tasks = random.Random(options.seed).sample(later[TASKS], len(later[TASKS]))
    job = assigned([*texts, *tasks], ranks)
    candidate = Candidate(
        name=f"{options.config}-{ranks}-ranks",
        module="capacity.replan_worker",
        python=sys.executable,
        ranks=ranks,
        needs_engine=True,
    )
    found: dict[str, list[Outcome]] = {"off": [], str(options.every): []}
    with start(candidate) as running, tempfile.TemporaryDirectory(prefix="replan-") as folder:
        jobs = {"texts": assigned(items[TEXT], ranks), JOB: job}
        keys = [*engine_settings(ranks, job, tokens), *options.set]
        requests = {name: _requests(each) for name, each in jobs.items()}
        running.call("load", config=options.config, settings=keys, jobs=requests)
        running.call("place", placement=None)
        first = running.call("run", job="texts")[0]
        full_S = np.array(first["prefill"]) >= tokens / 2
        before_SLE = np.array(first["before"], dtype=np.int64)[full_S]
        loads = {layer: before_SLE[:, n] for n, layer in enumerate(first["layers"])}
        copies = ranks if options.copies is None else options.copies
        plan = search.plan(
            {TEXT: loads}, before_SLE.shape[2], ranks, num_copies=copies, seed=options.seed
        )
        file = Path(folder, "plan.yaml")
        write_placement(plan, file)
        for _ in range(options.runs):
            for name in found:
                replies = running.call("measure", placement=str(file), replan=name, job=JOB)
                change = _first_of_tasks(replies[0]["prefill"], texts)
                found[name].append(outcome(replies, change, options.window, options.share))
    rows = [[f"replan: {name}", *_cells(each, found["off"])] for name, each in found.items()]
    header = ["", "share before", "at the change", "after", f"> {options.share} from step"]
    header += ["reached in", "moved", "in all", "slowest"]
    text = (
        f"{options.config}, {ranks} ranks, {copies} copies per layer planned for texts, steps of "
        f"{tokens:,} tokens, {options.window} steps after the change, {options.runs} runs\n"
        f"{table(header, rows)}"
    )
    record = {
        "bench": "replan",
        **environment_record(("torch",)),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "runs": {name: [asdict(run) for run in each] for name, each in found.items()},
    }
    emit(text, record, options.out, "bench_replan")
    return 0


def _cells(runs: Sequence[Outcome], without: Sequence[Outcome]) -> list[str]:
    def median(name: str) -> float:
        return statistics.median(getattr(run, name) for run in runs)

    slowest = [run.slowest / off.median for run, off in zip(runs, without, strict=True)]
    steps = [run.recovered for run in runs if run.recovered is not None]
    return [
        *(f"{median(name):.3f}" for name in ("share_before", "share_at_change", "share_after")),
        f"{statistics.median(steps):g}" if steps else "-",
        f"{len(steps)}/{len(runs)} runs",
        f"{median('moved_by_then'):.1%}",
        f"{median('moved'):.1%}",
        f"{statistics.median(slowest):.2f}x",
    ]


def _first_of_tasks(prefill: Sequence[int], texts: Sequence[Item]) -> int:
    """Return the first step without texts: ranks come to their last one at about the same time."""
    left = sum(len(item.prompt) for item in texts)
    for number, tokens in enumerate(prefill):
        if left <= 0:
            return number + 1
        left -= tokens
    return len(prefill)


def _first(items: Sequence[Item], num_tokens: int) -> list[Item]:
    found: list[Item] = []
    while num_tokens > 0:
        found.append(items[len(found)])
        num_tokens -= len(found[-1].prompt)
    return found


def _requests(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [
        {"index": item.index, "rank": item.rank, "prompt": item.prompt, "new_tokens": 0}
        for item in items
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="tiny_mixtral")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--copies", type=int, help="per layer; default: as many as ranks")
    parser.add_argument("--every", type=int, default=4, help="moe.copies.replan")
    parser.add_argument("--texts", type=int, default=8, help="steps of texts")
    parser.add_argument("--window", type=int, default=20, help="steps after the change")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of a step, all ranks")
    parser.add_argument("--share", type=float, default=0.9, help="to be reached again")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="folder for bench_replan.txt and .json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        sys.exit(f"error: {error}")
