"""Balance panel: one model on a number of ranks, with copies of experts and with drops.

Loads are recorded on calibration data with the dropless engine, placements are planned from them,
and the evaluation job runs under every case. The ranks are real processes over gloo with one CPU
thread each.

Share is the mean rank's rows before capacity over the most loaded rank's rows after it, both summed
over the layer calls of the steps that have prefill tokens: 1.0 is perfect balance. Where capacity
applies to prefill, rows of decode tokens in these steps stay at their homes, whatever the load:
they count in `share_all` alone.

Legend: S steps, L MoE layers, E experts, W ranks.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench.candidate import Candidate, Running, start

from capacity.balance_cases import MIXED, ROBUST, Case
from capacity.calibration import TASKS, assigned
from capacity.jobs import TEXT, Item
from capacity.panel import engine_settings
from capacity.scores import Scores, collect
from capacity.settings import to_json
from engine.moe.placement import search
from engine.moe.placement.placement import Placement
from engine.moe.placement.placement_file import write_placement

WEIGHT_BITS = 16  # of the checkpoints' experts


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceResult:
    """One case's run."""

    case: Case
    scores: Scores
    digests: Mapping[int, str]  # of every item's tokens and log probabilities
    share: float  # of the rows that capacity applies to; without a policy of all
    share_all: float  # of all rows
    planned_share: float | None  # what the placement promises for its calibration data
    rows: int  # after capacity
    dropped: int  # rows
    copied: int  # rows that copies computed
    memory: float  # bytes of copies over those of the experts
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BalancePanel:
    """Results of one model on one number of ranks."""

    model: str
    ranks: int
    items: list[Item]  # the evaluation job
    calibration: Mapping[str, int]  # tokens of each domain
    steps: int  # of each domain's calibration, the fewest
    results: list[BalanceResult]  # dropless first

    def reference(self, result: BalanceResult) -> BalanceResult:
        """Return dropless, for the items of a result's job."""
        first, job = self.results[0], result.case.job
        if job == MIXED:
            return first
        kept = replace(first.scores)
        if job == TEXT:
            kept = replace(kept, hit_N=kept.hit_N[:0], task_N=kept.task_N[:0])
        else:
            kept = replace(kept, nll_X=kept.nll_X[:0], tokens_X=kept.tokens_X[:0])
        return replace(first, scores=kept)

    def is_exact(self, result: BalanceResult) -> bool:
        """Return whether all tokens and log probabilities are those of dropless, bit for bit."""
        first = self.results[0].digests
        return all(first[index] == value for index, value in result.digests.items())


def run_balance(
    config: str,
    ranks: int,
    items: list[Item],
    calibration: Mapping[str, list[Item]],
    cases: Sequence[Case],
    *,
    batch_tokens: int,
    overrides: Sequence[str] = (),
    seed: int = 0,
    effort: float = 1.0,
) -> BalancePanel:
    """Start `ranks` ranks of `config`, record, plan and run every case.

    Args:
        config: as for `--config`.
        ranks: W.
        items: of the evaluation, assigned to ranks.
        calibration: items of each domain.
        cases: dropless first.
        batch_tokens: of a step, all ranks together.
        overrides: further `section.key=value` settings.
        seed: of the search for placements.
        effort: of that search.

    Raises:
        WorkerError: a rank failed; the message has its log.
    """
    jobs = {MIXED: items, **_alone(items)}
    recorded = {f"calibration {name}": assigned(each, ranks) for name, each in calibration.items()}
    candidate = Candidate(
        name=f"{config}-{ranks}-ranks",
        module="capacity.balance_worker",
        python=sys.executable,
        ranks=ranks,
        threads=1,
        needs_engine=True,
    )
    log = _Log(f"{config}, {ranks} ranks")
    with start(candidate) as running, tempfile.TemporaryDirectory(prefix="balance-") as folder:
        keys = [*engine_settings(ranks, items, batch_tokens), *overrides]
        requests = {name: _requests(each) for name, each in {**jobs, **recorded}.items()}
        running.call("load", config=config, settings=keys, jobs=requests)
        placed = running.call("place", placement=None)
        loads: dict[str, dict[int, np.ndarray]] = {}
        for name in calibration:
            loads[name] = _loads(running.call("run", job=f"calibration {name}"), batch_tokens)
            log.say(f"loads of {name} recorded")
        steps = min(len(next(iter(each.values()))) for each in loads.values())
        loads[MIXED] = _in_proportion(loads[TEXT], loads[TASKS], items)
        plans = _plan(loads, ranks, cases, seed, effort)
        log.say("placements planned")
        results = []
        order = sorted(range(len(cases)), key=lambda n: (cases[n].copies > 0, cases[n].placement))
        for key, group in itertools.groupby(order, key=lambda n: cases[n].placement):
            placement = plans.get(key)
            if placement is not None:
                path = Path(folder, f"{'-'.join(map(str, key))}.yaml")
                write_placement(placement, path)
                placed = running.call("place", placement=str(path))
            for number in group:
                result = _run(running, cases[number], jobs, placement, placed)
                results.append((number, result))
                log.say(f"{len(results)}/{len(cases)} {result.case.name} ({result.case.job})")
    return BalancePanel(
        model=config,
        ranks=ranks,
        items=items,
        calibration={name: sum(len(i.prompt) for i in each) for name, each in calibration.items()},
        steps=steps,
        results=[result for _, result in sorted(results, key=lambda pair: pair[0])],
    )


def share_of(before_SL: np.ndarray, after_WSL: np.ndarray) -> float:
    """Return the mean rank's rows before capacity over the most loaded rank's rows after it."""
    slowest = int(after_WSL.max(0).sum())
    return float(before_SL.sum()) / len(after_WSL) / slowest if slowest else 1.0


def _plan(
    loads: search.Loads, ranks: int, cases: Sequence[Case], seed: int, effort: float
) -> dict[tuple[int, str, str], Placement]:
    """Return a placement for every kind of case that has copies."""
    first = next(iter(loads.values()))
    num_experts = next(iter(first.values())).shape[1]
    planned: dict[tuple[int, str], Placement] = {}
    found = {}
    for case in cases:
        if not case.copies:
            continue
        key = case.copies, case.planned_for
        if key not in planned:
            names = (TEXT, TASKS) if case.planned_for == ROBUST else (case.planned_for,)
            chosen = {name: loads[name] for name in names}
            planned[key] = search.plan(
                chosen, num_experts, ranks, num_copies=case.copies, seed=seed, effort=effort
            )
        found[case.placement] = replace(planned[key], precision=case.precision)
    return found


def _run(
    running: Running,
    case: Case,
    jobs: Mapping[str, list[Item]],
    placement: Placement | None,
    placed: Sequence[dict[str, Any]],
) -> BalanceResult:
    """Run one case."""
    began = time.monotonic()
    replies = running.call("run", job=case.job, capacity=to_json(case.capacity))
    first = replies[0]
    prefill_S = np.array(first["prefill"]) > 0
    before_SL = np.array(first["before"])[prefill_S].sum(2)
    after_WSL, copied_WSL = (
        np.array([reply[name] for reply in replies])[:, prefill_S] for name in ("after", "copied")
    )
    exempt_SLW = sum(np.array(reply["exempt"]) for reply in replies)[prefill_S]
    done = [each for reply in replies for kind in ("scored", "generated") for each in reply[kind]]
    copy_bytes = sum(each["copy_bytes"] for each in placed) if case.copies else 0
    expert_bytes = placed[0]["expert_weights"] * WEIGHT_BITS / 8
    if case.precision == "model" and placement is not None:
        # The engine may run in another precision than the checkpoint is in.
        num_layers = len(placement.layers)
        copy_bytes = placement.num_copies / placement.num_experts / num_layers * expert_bytes
    return BalanceResult(
        case=case,
        scores=collect(
            jobs[case.job],
            {index: nll for reply in replies for index, nll, _ in reply["scored"]},
            {index: tokens for reply in replies for index, tokens, _ in reply["generated"]},
        ),
        digests={index: value for index, _, value in done},
        share=share_of(before_SL - exempt_SLW.sum(2), after_WSL - exempt_SLW.transpose(2, 0, 1)),
        share_all=share_of(before_SL, after_WSL),
        planned_share=None
        if placement is None
        else min(domain.share for domain in placement.domains.values()),
        rows=int(after_WSL.sum()),
        dropped=int(before_SL.sum() - after_WSL.sum()),
        copied=int(copied_WSL.sum()),
        memory=copy_bytes / expert_bytes,
        seconds=time.monotonic() - began,
    )


def _loads(replies: Sequence[dict[str, Any]], batch_tokens: int) -> dict[int, np.ndarray]:
    """Return the loads of the steps that were at least half full, by layer, int64 [S, E]."""
    first = replies[0]
    prefill_S = np.array(first["prefill"])
    full_S = prefill_S >= min(batch_tokens, int(prefill_S.max())) / 2
    before_SLE = np.array(first["before"], dtype=np.int64)[full_S]
    return {layer: before_SLE[:, n] for n, layer in enumerate(first["layers"])}


def _in_proportion(
    text: Mapping[int, np.ndarray], tasks: Mapping[int, np.ndarray], items: Sequence[Item]
) -> dict[int, np.ndarray]:
    """Return calibration steps with as much text as the job has, by layer, int64 [S, E]."""
    alone = {name: sum(len(item.prompt) for item in each) for name, each in _alone(items).items()}
    part = alone[TEXT] / max(1, sum(alone.values()))
    count = min(len(text[min(text)]), len(tasks[min(tasks)]))
    return {
        layer: np.rint(part * text[layer][:count] + (1 - part) * tasks[layer][:count]).astype(
            np.int64
        )
        for layer in text
    }


def _alone(items: Sequence[Item]) -> dict[str, list[Item]]:
    return {
        TEXT: [item for item in items if item.domain == TEXT],
        TASKS: [item for item in items if item.domain != TEXT],
    }


def _requests(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [
        {
            "index": item.index,
            "rank": item.rank,
            "prompt": item.prompt,
            "new_tokens": len(item.answer or ()),
        }
        for item in items
    ]


class _Log:
    """Says on stderr what has been done, and after how long."""

    def __init__(self, head: str) -> None:
        self._head, self._began = head, time.monotonic()

    def say(self, text: str) -> None:
        seconds = time.monotonic() - self._began
        print(f"{self._head}: {text} ({seconds:.0f} s)", file=sys.stderr, flush=True)
