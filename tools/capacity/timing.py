"""Measured layer speedup: the recorded rows, timed on simulated ranks, to compare with the bound.

`bench/simulated_layer.py` runs each rank's own work (pack, experts, combine) alone on all cores; a
layer takes as long as its slowest rank. The layers of the fullest step are timed in turns, before
and after capacity, at a chosen layer shape and with rows scaled down in proportion: the tiny
checkpoints' own experts are too small to be bound by their rows. The all-to-alls, whose bytes
capacity also cuts, are left out, so the figure is the gain of the experts' work alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from bench.moe_case import MoEShape
from bench.simulated_layer import SimulatedLayer

from capacity.panel import Panel, Result
from capacity.speed import CallLoads
from capacity.tables import panel_fronts

# The slowest of many ranks is taken, so one disturbed median among them is the layer's time.
ROUNDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedShape:
    """The layer that is timed."""

    hidden: int
    ffn: int
    tokens: int  # of a step over all ranks

    @property
    def text(self) -> str:
        """The shape in the table's legend."""
        cores = len(os.sched_getaffinity(0))
        return (
            f"simulated ranks (each rank's work alone on {cores} cores, the slowest counts, no "
            f"all-to-all), hidden {self.hidden}, ffn {self.ffn}, {self.tokens:,} tokens per step"
        )


def time_panel(panel: Panel, shape: TimedShape, *, everything: bool = False) -> Panel:
    """Fill in `measured` of the settings on a Pareto front, or of all that capacity applied to."""
    fronts = panel_fronts(panel).values()
    chosen = range(len(panel.results)) if everything else {i for front in fronts for i in front}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    results = []
    for index, result in enumerate(panel.results):
        if index in chosen and result.calls:
            result = replace(result, measured=measured_speedup(result, shape, panel.ranks))
        results.append(result)
    return replace(panel, results=results)


def measured_speedup(result: Result, shape: TimedShape, ranks: int) -> float:
    """Return seconds of the fullest step's layers before capacity over those after it."""
    calls = scaled(fullest_step(result), shape.tokens * result.top_k)
    layer = SimulatedLayer(
        MoEShape(
            hidden=shape.hidden,
            ffn=shape.ffn,
            experts=calls[0].before_WE.shape[1],
            top_k=result.top_k,
        ),
        ranks,
    )
    before = after = 0.0
    for call in calls:
        first, second = layer.compare([call.before_WE, call.after_WE], rounds=ROUNDS)
        before += first.seconds
        after += second.seconds
    return before / after


def fullest_step(result: Result) -> list[CallLoads]:
    """Return the layer calls of the step with most tokens, the first of several."""
    num_layers = len(result.calls) // len(result.tokens)
    step = result.tokens.index(max(result.tokens))
    return result.calls[step * num_layers : (step + 1) * num_layers]


def scaled(calls: Sequence[CallLoads], rows: int) -> list[CallLoads]:
    """Return the loads scaled to about `rows` rows before capacity; never scaled up.

    Raises:
        ValueError: nothing would be left.
    """
    total = int(calls[0].before_WE.sum())
    share = min(1.0, rows / total)
    made = [
        CallLoads(
            np.floor(call.before_WE * share).astype(np.int64),
            np.floor(call.after_WE * share).astype(np.int64),
        )
        for call in calls
    ]
    if not all(call.after_WE.any() for call in made):
        raise ValueError(f"--timing: no rows are left of {total} when scaled to {rows}; use more")
    return made
