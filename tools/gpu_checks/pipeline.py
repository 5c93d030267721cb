"""The MoE pipeline never stops the host: dispatch, experts and combine of every number of chunks,
with CUDA's synchronising calls forbidden while they are queued.

On one rank nothing is sent; what remains is every kernel and copy that the host queues between one
chunk's dispatch and the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from engine.config import ExpertsConfig, MoEConfig, OverlapConfig
from engine.distributed.groups import Group
from engine.layers.precision import compute_dtype
from engine.moe.backend_choice import choose_backend
from engine.moe.dispatch.two_batch import run_to_end
from engine.moe.layer import MoELayer
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec
from engine.ops.permute import combine_rows
from engine.profiling.device_clocks import NoClock
from gpu_checks.check import Check, at_most, guarded, relative_error
from gpu_checks.experts.backends import BACKENDS

GROUP = "pipeline"
HIDDEN, FFN, EXPERTS, TOP_K, TOKENS = 256, 512, 8, 2, 500
# bfloat16 rounds a sum of chunks as it rounds the whole.
BOUND = 1e-6


def check_pipeline(device: torch.device) -> list[Check]:
    """Check every backend that runs here with 1, 2 and 3 chunks.

    There must be no synchronising call, and the result of one chunk.
    """
    found: list[Check] = []
    for backend in BACKENDS:
        try:
            choose_backend(backend, device, torch.bfloat16)
        except ValueError as error:
            note = str(error).split(";")[0]
            found.append(Check(group=GROUP, name=backend, passed=None, note=note))
            continue
        for chunks in (1, 2, 3):
            name = f"{backend}, {chunks} chunks: difference from one, no host sync"
            found += guarded(
                GROUP,
                name,
                lambda backend=backend, chunks=chunks, name=name: [
                    at_most(GROUP, name, _difference(device, backend, chunks), BOUND)
                ],
            )
    return found


def _difference(device: torch.device, backend: str, chunks: int) -> float:
    return relative_error(_run(device, backend, chunks), _run(device, backend, 1))


@torch.inference_mode()
def _run(device: torch.device, backend: str, chunks: int) -> torch.Tensor:
    layer = _layer(device, backend, chunks)
    generator = torch.Generator().manual_seed(1)
    dtype = compute_dtype(torch.bfloat16, device)
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator).to(device, dtype)
    routing = layer.route(x_TD)
    decision, plans = layer.agreement.agree(routing, None, layer.telemetry)
    weights_TM = decision.weights_TM
    pipeline: Any = layer._pipelines[0]
    out = torch.empty(0)
    for _ in range(2):  # the first call compiles and tunes, which may synchronise
        with _no_sync(device) if out.numel() else nullcontext():
            rows_SD = run_to_end(pipeline.steps(x_TD, weights_TM, plans, NoClock()))
            out = combine_rows(rows_SD, *plans[0].terms(weights_TM))
    return out


def _layer(device: torch.device, backend: str, chunks: int) -> MoELayer:
    single = Group(0, 1, (0,), None)  # pyright: ignore[reportArgumentType]
    topology: Any = SimpleNamespace(expert=single, counts=single, tensor=single, control=single)
    router = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, normalize=True)
    config = MoEConfig(
        experts=ExpertsConfig(backend=backend),  # pyright: ignore[reportArgumentType]
        overlap=OverlapConfig(chunks=chunks),
    )
    layer = MoELayer(
        MoESpec(router=router, hidden=HIDDEN, ffn=FFN),
        layer=0,
        topology=topology,
        config=config,
        device=device,
        dtype=torch.bfloat16,
    )
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        drawn = torch.randn(weight.shape, generator=generator) * 0.05
        weight.data.copy_(drawn.to(device, weight.dtype))
    layer.finalize_weights()
    return layer


@contextmanager
def _no_sync(device: torch.device) -> Iterator[None]:
    """Make synchronising CUDA calls raise in the block."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
