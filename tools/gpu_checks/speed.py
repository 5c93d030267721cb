"""Speed at the widths of real models: steps of the engine, launches, backends, a virtual layer.

Figures stand beside what the device allows and are not judged; launches and syncs are, against
their budgets.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.generation.request_source import ListSource
from engine.llm import LLM
from engine.moe.backend_choice import choose_backend
from engine.moe.experts import ExpertWeights, make_backend
from engine.request import Request, SamplingParams
from gpu_checks import virtual_layer
from gpu_checks.check import Check, Settings, at_most, figure, guarded, not_here
from gpu_checks.experts.deep_gemm import check_deep_gemm_speed
from gpu_checks.experts.low_bit import check_low_bit_speed
from gpu_checks.experts.scaled import check_scaled_speed
from gpu_checks.gated_delta import check_gated_delta_speed
from gpu_checks.launches import budget, count_step
from gpu_checks.peaks import Peaks, measure_peaks, seconds_of
from gpu_checks.shapes import MIXTRAL, QWEN3, ModelShape, dummy_llm, free_bytes, tiny

GROUP = "speed"
# Rows of the budgets. That of Mixtral has one expert per rank, where nothing is sorted; here all
# are on one rank, as OLMoE's, whose attention launches more.
_ROWS = {
    "mixtral": "olmoe decode, asynchronous",
    "qwen3_moe": "qwen3_moe decode, asynchronous",
}
_MOE = {"experts": {"backend": "grouped_mm"}, "dispatch": {"deduplicate": False}}  # as those have


def check_speed(settings: Settings) -> Iterator[Check]:
    """Measure the device's peaks, then steps of both models, the experts and the virtual layer."""
    device = settings.device
    peaks = measure_peaks(device, settings.is_tiny)
    yield figure(GROUP, "copy, GB/s", peaks.copy_bytes / 1e9, "", _scaled(peaks.published_bytes))
    yield figure(
        GROUP,
        "matrix product, bfloat16, TFLOP/s",
        peaks.matmul_flops / 1e12,
        "",
        _scaled(peaks.published_flops, 1e12),
    )
    for shape in (MIXTRAL, QWEN3):
        shape = tiny(shape) if settings.is_tiny else shape
        if free_bytes(device) < 1.3 * shape.weight_bytes + (4 << 30):
            needed = f"needs {shape.weight_bytes / 2**30:.0f} GiB for weights"
            yield not_here(GROUP, f"{shape.name}, {shape.layers} layers", needed)
            continue
        with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
            yield from _listed(shape.name, _check_model(settings, shape, Path(folder), peaks))
        _release(device)
    yield from _listed("experts", _check_backends(settings, peaks))
    _release(device)
    yield from _listed("low-bit experts", check_low_bit_speed(settings))
    _release(device)
    rule = check_gated_delta_speed(settings, peaks.copy_bytes)
    yield from _listed("gated delta rule", rule)
    _release(device)
    yield from _listed("scaled_mm", check_scaled_speed(settings))
    _release(device)
    yield from _listed("deep_gemm", check_deep_gemm_speed(settings))
    _release(device)
    yield from _listed("virtual layer", virtual_layer.check_virtual_layer(settings))


def _listed(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """Yield checks as they come; an exception becomes one failed check."""
    while True:
        found = guarded(GROUP, name, lambda: [each for each in [next(checks, None)] if each])
        yield from found
        if not found or (found[0].passed is False and found[0].value is None):
            return


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _scaled(value: float | None, unit: float = 1e9) -> float | None:
    return None if value is None else value / unit


def _check_model(
    settings: Settings, shape: ModelShape, folder: Path, peaks: Peaks
) -> Iterator[Check]:
    sequences, context, prompts, length = (4, 8, 2, 32) if settings.is_tiny else (64, 256, 4, 2048)
    steps = 6 if settings.is_tiny else 30
    scheduler = {"max_batch_tokens": max(prompts * length, sequences * context)}
    scheduler |= {"max_sequences": sequences, "kv_cache_blocks": 4096}
    with dummy_llm(shape, folder, settings.device, scheduler=scheduler, moe=_MOE) as llm:
        requests = make_requests(shape, sequences, context, 2 + steps)
        step_seconds(llm, make_requests(shape, sequences, context, 6))  # compiles and tunes
        decode = step_seconds(llm, requests)["decode"]
        seconds = statistics.median(decode)
        least = shape.decode_bytes(sequences, context + steps / 2)
        yield figure(
            GROUP,
            f"{shape.name}: decode step, ms",
            seconds * 1e3,
            f"{sequences} sequences; of it the bound at the measured copy bandwidth",
            least / peaks.copy_bytes * 1e3,
        )
        yield figure(
            GROUP,
            f"{shape.name}: decode, share of the copy bandwidth",
            least / peaks.copy_bytes / seconds,
            f"{least / 1e9:.2f} GB per step",
            1.0,
        )
        several = [*make_requests(shape, 4 * prompts, length, 1)]
        step_seconds(llm, several)
        prefill = statistics.median(step_seconds(llm, several)["prefill"])
        prefill /= shape.layers - 1  # the last one runs only the rows that are read
        flops = shape.prefill_flops(prompts, length)
        yield figure(
            GROUP,
            f"{shape.name}: prefill layer, ms",
            prefill * 1e3,
            f"{prompts} x {length} tokens, step / {shape.layers - 1}; bound: measured product",
            flops / peaks.matmul_flops * 1e3,
        )
        yield figure(
            GROUP,
            f"{shape.name}: prefill, share of the matrix product",
            flops / peaks.matmul_flops / prefill,
            f"{flops / 1e12:.3f} TFLOP per layer",
            1.0,
        )
        yield from _check_launches(llm, shape, make_requests(shape, sequences, context, 8))


def _check_launches(llm: LLM, shape: ModelShape, requests: list[Request]) -> Iterator[Check]:
    counts, report = count_step(llm, requests, step=4)
    assert not report.tokens_prefill, "another step than was meant"
    name = f"{shape.name}: decode step of {shape.layers} layers"
    yield figure(GROUP, f"{name}, ops of torch", counts["ops"])
    allowed = budget(_ROWS[shape.family], shape.layers)
    if llm.topology.device.type != "cuda":
        yield not_here(GROUP, f"{name}, kernels and syncs", "the profiler counts them on CUDA only")
        return
    yield figure(GROUP, f"{name}, copies and fills", counts["copies"])
    for column in ("kernels", "syncs"):
        if allowed is None:
            yield figure(GROUP, f"{name}, {column}", counts[column], "no budget in the table")
        else:
            note = f"budget of emulated CUDA, {_ROWS[shape.family]}"
            yield at_most(GROUP, f"{name}, {column}", counts[column], allowed[column], note)


def step_seconds(llm: LLM, requests: list[Request]) -> dict[str, list[float]]:
    """Run requests; return the seconds of steps of one kind that follow a step of that kind.

    Each step ends when the host has read its tokens.
    """
    found: dict[str, list[float]] = {"prefill": [], "decode": []}
    last: tuple[str, float] = ("", 0.0)

    def on_step(report: Any) -> None:
        nonlocal last
        kind = "decode" if not report.tokens_prefill else "prefill"
        kind = "mixed" if report.tokens_prefill and report.tokens_decode else kind
        now = time.perf_counter()
        if last[0] == kind and kind in found:
            found[kind].append(now - last[1])
        last = kind, now

    llm.run(ListSource(requests), lambda _: None, on_step)
    return found


def make_requests(shape: ModelShape, count: int, length: int, new_tokens: int) -> list[Request]:
    """Return so many requests of random prompts of `length` tokens."""
    chance = random.Random(count)
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return [
        Request(
            index=number,
            id=str(number),
            prompt_token_ids=[chance.randrange(shape.vocab) for _ in range(length)],
            params=params,
        )
        for number in range(count)
    ]


@torch.inference_mode()
def _check_backends(settings: Settings, peaks: Peaks) -> Iterator[Check]:
    """Time the experts of one layer by backend, with so many rows for each expert."""
    device, shape = settings.device, tiny(MIXTRAL) if settings.is_tiny else MIXTRAL
    sizes = (1, 4) if settings.is_tiny else (1, 4, 16, 64, 256, 1024, 4096)
    for backend in ("grouped_mm", "te"):
        try:
            choose_backend(backend, device, torch.bfloat16)
        except ValueError as error:
            yield not_here(GROUP, f"experts, {backend}", str(error).split(";")[0])
            continue
        weights = ExpertWeights(shape.experts, shape.hidden, shape.ffn, device, torch.bfloat16)
        for parameter in weights.parameters():
            parameter.normal_(0, 0.02)
        experts = make_backend(backend, weights)
        experts.finalize_weights()
        for rows in sizes:
            counts = [rows] * shape.experts
            x_RD = torch.randn(sum(counts), shape.hidden, device=device).to(torch.bfloat16)
            index_R = torch.arange(len(x_RD), device=device)
            seconds = seconds_of(
                lambda e=experts, x=x_RD, c=counts, i=index_R: e(x, c, None, i), device
            )
            values = shape.experts * shape.expert_values
            bound = max(2 * values / peaks.copy_bytes, 2 * rows * values / peaks.matmul_flops)
            yield figure(
                GROUP,
                f"experts, {backend}, {rows} rows each, ms",
                seconds * 1e3,
                f"{shape.experts} experts; bound: weights or products, the slower",
                bound * 1e3,
            )
        del weights, experts
        _release(device)
