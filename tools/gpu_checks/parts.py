"""The parts of tools/gpu_suite.py: what each runs, and how long it may take.

A part yields checks. It is a process of its own, so that one that hangs, exhausts the device's
memory or breaks its context ends alone; `worker.py` starts it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from gpu_checks.check import Check, Settings

_Run = Callable[[Settings], Iterable[Check]]


@dataclass(frozen=True, slots=True)
class Part:
    """One part."""

    seconds: float  # most that it may take
    run: _Run
    is_extra: bool = False  # runs where --only names it: the others take all of the time there is


def _of(module: str, function: str) -> _Run:
    """Return a part that imports its module only in its own process."""

    def run(settings: Settings) -> Iterable[Check]:
        return getattr(import_module(f"gpu_checks.{module}"), function)(settings)

    return run


def _on_device(module: str, function: str) -> _Run:
    check = _of(module, function)
    return lambda settings: check(settings.device)  # pyright: ignore[reportArgumentType]


def _engine(settings: Settings) -> Iterable[Check]:
    from gpu_checks.engine import check_engine

    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
        yield from check_engine(settings.device.type, Path(folder), settings.families)


# In the order in which they run: what a short time on a machine should give comes first. The first
# two take at most 4 minutes, all but the extra ones 10.
PARTS = {
    "nccl": Part(115, _of("nccl", "check_nccl")),
    "speed": Part(115, _of("speed", "check_speed")),
    "step": Part(40, _of("step", "check_step")),
    "experts": Part(20, _on_device("experts.backends", "check_experts")),
    "pipeline": Part(20, _on_device("pipeline", "check_pipeline")),
    "capacity": Part(25, _on_device("capacity", "check_capacity")),
    "kernels": Part(45, _on_device("kernels", "check_kernels")),
    "attention": Part(30, _of("attention", "check_attention")),
    "engine": Part(70, _engine),
    "memory": Part(35, _of("memory", "check_memory")),
    "clocks": Part(75, _of("clocks", "check_clocks")),
    "graphs": Part(120, _of("graphs", "check_graphs"), is_extra=True),
}
DEFAULT = tuple(name for name, part in PARTS.items() if not part.is_extra)
LIMIT_S = 595.0  # of all parts together, their starts included
