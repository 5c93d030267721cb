"""Plan drift: what a placement promised against what the job got, and when to plan again. Pure.

A placement file keeps, for every domain of traffic that it was planned for, the expert loads and
the share of perfect balance that it promises for them: the time of a step with its rows spread
evenly over that of its slowest rank, summed over steps. The job's nearest domain is the one whose
loads differ least; its share is compared with the job's own.

A lower share is not always drift. Small steps are less even by nature, so the plan is priced again
on random steps of the job's size with the domain's loads. Only what is below that by more than the
tolerance is a reason to plan again.

Worked example, 2 ranks with experts 0 1 | 2 3 and no copies, planned for 25 25 25 25: share 1.0. A
job with 40 40 10 10 rows per step has 80 of 100 rows on rank 0: share 50 / 80 = .63, and 30% of its
rows are at other experts than in the plan.

Legend: E experts, W ranks, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from engine.config import Config
from engine.moe.placement.placement import Placement, PlannedLoads
from engine.moe.placement.predict import mean_times, slowest_times
from engine.profiling.loads import LayerLoad, LoadCounter
from engine.profiling.report import PlanLayerReport, PlanReport, PlanVerdict

TOLERANCE = 0.05  # of the share; later steps of planned traffic are below its promise by less
_ENOUGH_ROWS = 100  # per expert and layer, over the run
_MOST_UNMOVED = 0.1  # of the tokens, those whose rows copies do not take
_RANDOM_STEPS = 256  # of all layers together
_SHOWN_LAYERS = 3


@dataclass(frozen=True, slots=True)
class PlanInUse:
    """The placement that a job runs with."""

    placement: Placement  # with domains
    file: str  # moe.placement
    phases: tuple[str, ...] = ("prefill", "decode")  # of the tokens whose rows copies may take
    low_bit_share: float = 1.0  # up to which low-bit copies take rows; 1.0: as far as possible


def plan_in_use(placement: Placement | None, config: Config) -> PlanInUse | None:
    """Return the placement that the job runs with; None where it was planned for no domains."""
    if placement is None or not placement.domains:
        return None
    capacity, copies = config.moe.capacity, config.moe.copies
    phases, share = copies.phases, 1.0
    if placement.num_copies and placement.precision != "model":
        share = copies.target
    if capacity.policy != "none":
        phases = capacity.phases
        if share < 1.0:  # rows move up to the limits
            share = min(share, 1 / float(capacity.exact_factor))
    if not placement.num_copies:
        phases = ("prefill", "decode")
    return PlanInUse(placement, config.moe.placement, tuple(phases), share)


def plan_drift(
    plan: PlanInUse,
    loads: LoadCounter,
    *,
    steps: int,
    tokens: Mapping[str, int],
    folder: str | None = None,
) -> PlanReport | None:
    """Compare a run with its plan; None where the run has no rows in a planned layer.

    Args:
        plan: the placement in use.
        loads: of the run, equal on all ranks of the expert-parallel group.
        steps: of the run.
        tokens: phase -> the group's tokens in the run.
        folder: where the run's routing is recorded; None: it is not.
    """
    domains = plan.placement.domains
    run = {
        index: load
        for index, load in sorted(loads.layers.items())
        if load.experts.any() and load.slowest_time and _is_planned(domains, index)
    }
    if not run or not steps:
        return None
    apart = {name: _distances(domain, run) for name, domain in domains.items()}
    means = {name: float(np.mean(list(each.values()))) for name, each in apart.items()}
    nearest = min(means, key=means.__getitem__)  # of equal ones the first in the file
    domain = domains[nearest]
    ideal = {index: _ideal_time(load, plan.placement) for index, load in run.items()}
    share = sum(ideal.values()) / sum(load.slowest_time for load in run.values())
    promised = min(domain.share, plan.low_bit_share)
    layers = [
        PlanLayerReport(
            layer=index,
            promised=min(domain.layer_shares[index], plan.low_bit_share),
            share=ideal[index] / load.slowest_time,
            distance=apart[nearest][index],
        )
        for index, load in run.items()
    ]
    expected = predicted = None
    if share < promised - TOLERANCE:
        planned = {index: np.array(domain.loads_E[index], dtype=float) for index in run}
        expected = min(promised, _share_of_random_steps(plan, planned, run, steps))
        own = {index: load.experts.astype(float) for index, load in run.items()}
        predicted = _share_of_random_steps(plan, own, run, steps)
    report = PlanReport(
        file=plan.file,
        domain=nearest,
        distance=means[nearest],
        distances=means,
        promised=promised,
        share=share,
        expected=expected,
        predicted=predicted,
        verdict="kept",
        layers=layers,
        text=(),
    )
    verdict = _verdict(report, _rows_per_expert(run), _unmoved(plan, tokens))
    report = replace(report, verdict=verdict)
    return replace(report, text=_sentences(report, plan, folder))


def _is_planned(domains: Mapping[str, PlannedLoads], index: int) -> bool:
    return all(sum(domain.loads_E.get(index, ())) > 0 for domain in domains.values())


def _distances(domain: PlannedLoads, run: Mapping[int, LayerLoad]) -> dict[int, float]:
    """Return, by layer, the share of the rows that are at other experts: total variation."""
    found = {}
    for index, load in run.items():
        planned_E = np.array(domain.loads_E[index], dtype=float)
        apart_E = load.experts / load.experts.sum() - planned_E / planned_E.sum()
        found[index] = float(np.abs(apart_E).sum() / 2)
    return found


def _ideal_time(load: LayerLoad, placement: Placement) -> float:
    """Return how long the run takes in a layer where rows are spread perfectly, in rows."""
    rows = load.mean * placement.num_ranks
    times_W = placement.row_times_W or [1.0] * placement.num_ranks
    return rows / sum(1 / each for each in times_W)


def _rows_per_expert(run: Mapping[int, LayerLoad]) -> float:
    return float(np.mean([load.experts.mean() for load in run.values()]))


def _unmoved(plan: PlanInUse, tokens: Mapping[str, int]) -> float:
    """Return the share of the tokens whose rows copies do not take."""
    total = sum(tokens.values())
    return 1 - sum(tokens.get(each, 0) for each in plan.phases) / total if total else 0.0


def _share_of_random_steps(
    plan: PlanInUse, loads: Mapping[int, np.ndarray], run: Mapping[int, LayerLoad], steps: int
) -> float:
    """Return the plan's share on steps of the run's size, drawn with the given loads.

    Args:
        loads: by layer, float64 [E], in any unit.
        run: the rows that a step of each layer has.
        steps: of the run.
    """
    draw = np.random.default_rng(0)  # every rank reports the same
    count = max(8, _RANDOM_STEPS // len(loads))
    placement, ideal, slowest = plan.placement, 0.0, 0.0
    times_W = placement.row_times_W or [1.0] * placement.num_ranks
    for index, load_E in loads.items():
        rows = max(1, round(float(run[index].experts.sum()) / steps))
        loads_SE = draw.multinomial(rows, load_E / load_E.sum(), size=count)
        layer = placement.layer(index)
        ideal_S = mean_times(loads_SE, placement.num_ranks, times_W)
        slowest_S = slowest_times(layer, loads_SE, placement.num_ranks, times_W)
        if plan.low_bit_share < 1.0:
            is_home_EW = np.array(layer.home_E)[:, None] == np.arange(placement.num_ranks)
            home_S = (loads_SE @ is_home_EW * np.array(times_W)).max(1)
            limit_S = np.ceil(ideal_S / plan.low_bit_share)
            slowest_S = np.maximum(slowest_S, np.minimum(home_S, limit_S))
        ideal += float(ideal_S.sum())
        slowest += float(slowest_S.sum())
    return ideal / slowest


def _verdict(report: PlanReport, rows: float, unmoved: float) -> PlanVerdict:
    if report.expected is None or report.predicted is None:
        return "kept"
    if rows < _ENOUGH_ROWS:
        return "too few rows"
    if unmoved > _MOST_UNMOVED:
        return "other phases"
    least = report.expected - TOLERANCE
    if report.share >= least:
        return "small steps"
    return "plan again" if report.predicted < least else "uneven steps"


def _sentences(report: PlanReport, plan: PlanInUse, folder: str | None) -> list[str]:
    """Return what the summary prints."""
    of = "" if len(report.distances) == 1 else f" of its {len(report.distances)} kinds of traffic"
    lines = [
        f"Placement {report.file}: share of perfect balance {report.share:.2f}, promised "
        f"{report.promised:.2f} for {report.domain!r}, the nearest{of} "
        f"({report.distance:.0%} of the rows are at other experts)."
    ]
    if report.verdict == "too few rows":
        lines.append(
            f"Too few rows to tell whether its loads have drifted: {_ENOUGH_ROWS} per expert and "
            "layer are needed."
        )
    elif report.verdict == "other phases":
        lines.append(
            "Not to be compared: copies take the rows of "
            f"{' and '.join(plan.phases)} tokens only, and the plan is for all."
        )
    elif report.verdict == "small steps":
        lines.append(
            f"Its steps are small: steps of their size have {report.expected:.2f} with the planned "
            "loads. No reason to plan again."
        )
    elif report.verdict == "plan again":
        lines.append(
            "Plan again: its loads have drifted; with their mean the plan gives "
            f"{report.predicted:.2f}{_furthest_off(report)}."
        )
        lines.append(_advice(report, folder))
    elif report.verdict == "uneven steps":
        timed = len(plan.placement.row_times_W) > 0
        speeds = ", or rows are not split by the planned times per row" if timed else ""
        lines.append(
            f"Its mean loads suit the plan ({report.predicted:.2f}), but single steps differ more "
            f"from them than those that were planned for{speeds}"
            f"{_furthest_off(report)}."
        )
        lines.append(_advice(report, folder))
    return lines


def _furthest_off(report: PlanReport) -> str:
    worst = sorted(report.layers, key=lambda layer: layer.share - layer.promised)[:_SHOWN_LAYERS]
    shown = [
        f"{each.layer} ({each.share:.2f} of {each.promised:.2f})"
        for each in worst
        if each.share < each.promised - TOLERANCE
    ]
    return f"; furthest off: layer {', '.join(shown)}" if shown else ""


def _advice(report: PlanReport, folder: str | None) -> str:
    plan = f"python tools/plan_placement.py {folder or 'DIR'} --from {report.file} --out NEXT"
    if folder is None:
        return f"Record such traffic with profiler.routing=DIR, then run: {plan}"
    return f"This run's routing is recorded; run: {plan}"
