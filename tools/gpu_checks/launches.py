"""Launches and host syncs of one step: counted by torch's profiler, and their budgets.

The budgets are those of emulated CUDA, `tests/gpu/emulated/budgets.txt`: per layer, and per step of
two layers on two ranks. One rank launches no more.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from engine.generation.request_source import ListSource
from engine.llm import LLM
from engine.request import Request

TABLE = Path(__file__).resolve().parents[2] / "tests" / "gpu" / "emulated" / "budgets.txt"
COLUMNS = ("kernels", "events", "syncs", "collectives")
TABLE_LAYERS = 2  # of the table's steps
# Not cudaDeviceSynchronize, which the profiler itself calls at its end.
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def read_table(table: Path = TABLE) -> tuple[str, dict[str, list[float]]]:
    """Return the table's first line, and the numbers of each row by its name: of COLUMNS per layer,
    then per step.
    """
    first, _, *lines = table.read_text(encoding="utf-8").splitlines()
    rows = (line.split("|") for line in lines)
    return first, {
        name.strip(): [float(each) for each in " ".join(numbers).split()] for name, *numbers in rows
    }


def budget(row: str, layers: int) -> dict[str, float] | None:
    """Return the budget of a step of so many layers, by column; None without such a row."""
    if not TABLE.is_file() or (numbers := read_table()[1].get(row)) is None:
        return None
    per_layer, per_step = numbers[: len(COLUMNS)], numbers[len(COLUMNS) :]
    return {
        column: step + (layers - TABLE_LAYERS) * layer
        for column, layer, step in zip(COLUMNS, per_layer, per_step, strict=True)
    }


def count_step(llm: LLM, requests: list[Request], step: int) -> tuple[Counter[str], Any]:
    """Run requests; return what one step launched and waited for, and its report.

    In the counter `kernels`, `copies` (and fills) and `syncs` of the device, `ops` of the host.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if llm.topology.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)
    reports: list[Any] = []

    def on_step(report: Any) -> None:
        if len(reports) == step - 1:
            profile.start()
        if len(reports) == step:
            _synchronize(llm)
            profile.stop()
        reports.append(report)

    llm.run(ListSource(requests), lambda _: None, on_step)
    if len(reports) <= step:
        raise RuntimeError(f"the requests took {len(reports)} steps, not more than {step}")
    counts: Counter[str] = Counter()
    for event in profile.events() or ():
        name = event.name
        if event.device_type == torch.autograd.DeviceType.CUDA:
            is_copy = name.startswith(("Memcpy", "Memset"))
            counts["copies" if is_copy else "kernels"] += 1
        elif name.startswith(_WAITS) and not name.startswith("cudaMemcpyAsync"):
            counts["syncs"] += 1
        elif name.startswith("aten::"):
            counts["ops"] += 1
    return counts, reports[step]


def _synchronize(llm: LLM) -> None:
    if llm.topology.device.type == "cuda":
        torch.cuda.synchronize()
