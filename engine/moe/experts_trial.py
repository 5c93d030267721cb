"""A short measurement at start: is Transformer Engine faster than the backend that `auto` takes?

Runs before the model is built, on random weights of one layer's local experts, with the rows of a
decode step: there the calls of a backend cost as much as its products. The slowest rank decides.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.distributed.collectives import Collectives
from engine.moe.backend_choice import choose_backend, import_transformer_engine
from engine.moe.experts import ExpertWeights, make_backend

logger = logging.getLogger(__name__)

_ROUNDS, _CALLS = 3, 5
_GAIN = 0.9  # of the time: what is saved by less could be noise, and importing it takes seconds
_NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class TrialShape:
    """One layer's experts on this rank."""

    num_local: int
    hidden: int
    ffn: int
    rows: int  # of a decode step, for all local experts together


def faster_backend(
    shape: TrialShape, device: torch.device, dtype: torch.dtype, control: Collectives
) -> str | None:
    """Return `te` where it is faster than what `auto` takes, else None; the same on every rank.

    Args:
        shape: what is measured.
        device: CUDA.
        dtype: of the weights; float32 is never measured, which `te` multiplies in TF32.
        control: on the host, over the ranks that agree.

    Collective over `control`: every rank must call.
    """
    if dtype == torch.float32:
        return None
    if _slowest([0.0 if _te_imports() else _NEVER], control) != [0.0]:
        return None
    usual = choose_backend("auto", device, dtype, (shape.hidden, shape.ffn))
    usual_s, te_s = _slowest(
        [_seconds(name, shape, device, dtype) for name in (usual, "te")], control
    )
    is_faster = te_s < _GAIN * usual_s
    if control.rank == 0:
        logger.info(
            "moe.experts.backend = auto: %s; a layer of a decode step takes %.3f ms with te, %.3f "
            "with %s on the slowest rank",
            "te" if is_faster else usual,
            1e3 * te_s,
            1e3 * usual_s,
            usual,
        )
    return "te" if is_faster else None


def _te_imports() -> bool:
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        import_transformer_engine()
    except ValueError as error:
        logger.warning("%s; going on without it", error)
        return False
    return True


def _slowest(seconds: list[float], control: Collectives) -> list[float]:
    """Return each time's maximum over the ranks. Collective over `control`."""
    part = torch.tensor(seconds, dtype=torch.float64)
    return control.all_gather(part).wait().amax(0).tolist()


@torch.inference_mode()
def _seconds(name: str, shape: TrialShape, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of a call, of the host and the device; infinite where it fails."""
    try:
        weights = ExpertWeights(shape.num_local, shape.hidden, shape.ffn, device, dtype)
        for weight in weights.parameters():
            weight.normal_(std=0.02)
        run = make_backend(name, weights)
        each, more = divmod(max(shape.rows, shape.num_local), shape.num_local)
        counts = [each + (index < more) for index in range(shape.num_local)]
        rows_RD = torch.randn(sum(counts), shape.hidden, device=device, dtype=dtype)
        run(rows_RD, counts)  # the first call compiles, and allocates workspaces
        return min(_time_calls(lambda: run(rows_RD, counts), device) for _ in range(_ROUNDS))
    except Exception as error:  # on this rank alone: the others wait for its answer
        logger.warning("the experts backend %r fails here: %s", name, error)
        return _NEVER


def _time_calls(call: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    _wait_for(device)
    return (time.perf_counter() - start) / _CALLS


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # SYNC: before the first step; what ran is timed
