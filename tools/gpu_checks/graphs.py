"""Decode steps as CUDA graphs and without: equal tokens, and the time of a step.

Both run the same kernels on as many rows, a bucket full of sequences, so a GEMM has no reason to
round differently; and both attend by triton.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.generation.request_source import ListSource
from gpu_checks.check import Check, Settings, at_most, figure, guarded, not_here
from gpu_checks.shapes import MIXTRAL, QWEN3, ModelShape, dummy_llm, free_bytes, tiny
from gpu_checks.speed import make_requests, step_seconds

GROUP = "graphs"
_MOE = {"experts": {"backend": "grouped_mm"}, "dispatch": {"exchange": "static"}}


def check_graphs(settings: Settings) -> Iterator[Check]:
    """Compare decode with and without graphs at the widths of two models."""
    if settings.device.type != "cuda":
        yield not_here(GROUP, "decode graphs", "a CPU has none")
        return
    for shape in (MIXTRAL, QWEN3):
        shape = tiny(shape) if settings.is_tiny else shape
        if free_bytes(settings.device) < 1.3 * shape.weight_bytes + (6 << 30):
            needed = f"needs {shape.weight_bytes / 2**30:.0f} GiB for weights"
            yield not_here(GROUP, shape.name, needed)
            continue
        yield from guarded(GROUP, shape.name, lambda s=shape: _compare(settings, s))


def _compare(settings: Settings, shape: ModelShape) -> list[Check]:
    tokens: dict[str, list[list[int]]] = {}
    seconds: dict[str, float] = {}
    for setting in ("auto", "off"):
        tokens[setting], seconds[setting] = _decode(settings, shape, setting)
        gc.collect()
        torch.cuda.empty_cache()
    differing = sum(one != other for one, other in zip(*tokens.values(), strict=True))
    note = "complete steps left out"
    return [
        at_most(GROUP, f"{shape.name}: sequences with other tokens than eager", differing, 0),
        figure(
            GROUP,
            f"{shape.name}: decode step in a graph, ms",
            seconds["auto"] * 1e3,
            f"median, {note}; beside it the eager one",
            seconds["off"] * 1e3,
        ),
    ]


def _decode(settings: Settings, shape: ModelShape, graphs: str) -> tuple[list[list[int]], float]:
    """Return the tokens of each sequence, and the median seconds of a decode step."""
    sequences, context, steps = (4, 8, 8) if settings.is_tiny else (64, 256, 40)
    scheduler = {"max_batch_tokens": sequences * context, "max_sequences": sequences}
    sections: dict[str, Any] = {
        "scheduler": {**scheduler, "kv_cache_blocks": 4096},
        "moe": _MOE,
        "attention": {"backend": "triton"},
        "runtime": {"graphs": graphs},
    }
    with (
        tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder,
        dummy_llm(shape, Path(folder), settings.device, **sections) as llm,
    ):
        if graphs == "auto" and not isinstance(llm.resolved_settings["runtime.graphs"], list):
            raise RuntimeError(f"no graphs: {llm.resolved_settings['runtime.graphs']}")
        requests = make_requests(shape, sequences, context, steps)
        step_seconds(llm, make_requests(shape, sequences, context, 6))  # compiles and tunes
        median = statistics.median(step_seconds(llm, requests)["decode"])
        done: list[Any] = []
        llm.run(ListSource(requests), done.extend)
    done.sort(key=lambda each: each.index)
    return [list(each.token_ids) for each in done], median
