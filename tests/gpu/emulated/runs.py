"""Jobs of the real engine on one rank, on the CPU and on an emulated GPU: for `run_ranks`."""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.config.loader import config_from_tree
from engine.llm import LLM
from engine.moe.dispatch import chunk_layout, layout_policy
from engine.moe.placement.placement import LayerPlacement, Placement, Precision
from engine.moe.placement.placement_file import digest, write_placement
from engine.moe.policy.policy import Policy
from engine.moe.policy.policy_file import digest as policy_digest
from engine.moe.policy.policy_file import write_policy
from engine.request import SamplingParams
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE

PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([5, 17, 1, 30, 8, 12, 3, 21])
]


@dataclass(frozen=True)
class Placed:
    """Where the 8 experts of a model are on two ranks, the same in every MoE layer."""

    homes: tuple[int, ...] = (0, 0, 0, 0, 1, 1, 1, 1)
    copied: tuple[int, ...] = ()  # experts that the other rank has a copy of
    precision: Precision = "model"
    layers: tuple[int, ...] = (0, 1)

    def write(self, folder: Path, rank: int) -> Path:
        """Write the placement's file, as the other ranks do; return its path."""
        copies = tuple((1 - self.homes[e],) if e in self.copied else () for e in range(8))
        layer = LayerPlacement(self.homes, copies)
        placement = Placement(2, 8, dict.fromkeys(self.layers, layer), self.precision)
        path = folder / f"placement-{digest(placement)}.yaml"
        own = path.with_name(f"{rank}-{path.name}")
        write_placement(placement, own)
        return own.replace(path)


SCATTERED = (1, 0, 1, 0, 0, 1, 1, 0)  # homes in no order


@dataclass(frozen=True)
class Job:
    """One job of a small random model."""

    family: str
    settings: dict[str, Any] = field(default_factory=dict)  # sections of the config
    sampling: dict[str, Any] = field(default_factory=dict)  # fields of SamplingParams
    # Methods that the job has to call on every rank, or it does not test what it says.
    uses: tuple[tuple[type, str], ...] = ()
    placement: Placed | None = None
    policy: Policy | None = None
    prompts: list[list[int]] = field(default_factory=lambda: PROMPTS)


@dataclass(frozen=True)
class Result:
    """What a rank saw of a job."""

    done: list[dict[str, Any]]  # the completions: tokens, logprobs, drops, errors
    preemptions: int
    chunks: int  # of the last layer
    dispatched: int  # collectives of the MoE layers
    kernels: int  # on the emulated GPU
    syncs: dict[str, int]  # by kind and line


def on_both(rank: int, guard: Path, path: Path, job: Job) -> tuple[Result, Result]:
    """Run one job on the CPU and on an emulated GPU."""
    return run(rank, None, path, job), run(rank, guard, path, job)


def run(
    rank: int,
    guard: Path | None,
    path: Path,
    job: Job,
    plant: Callable[[pytest.MonkeyPatch], None] | None = None,
) -> Result:
    """Run one job. No step is too small for chunks, deduplication and the like.

    Args:
        guard: of the emulated GPU to run on; None: the CPU.
        path: of the checkpoint.
        job: what to run.
        plant: plants a fault.
    """
    os.environ["LOCKSTEP_NATIVE"] = "0"  # both devices run the same torch ops, to the same bits
    calls: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(chunk_layout, "MIN_CHUNK_ROWS", 1)
        patch.setattr(layout_policy, "COLLECTIVE_BYTES", 1)
        for owner, name in job.uses:
            patch.setattr(owner, name, _counted(getattr(owner, name), calls))
        if guard is not None:
            stack.enter_context(emulated_cuda(guard))
        if plant is not None:
            plant(patch)
        result = _generate(rank, path, job, "cpu" if guard is None else "cuda")
    unused = [name for owner, name in job.uses if not calls[getattr(owner, name).__qualname__]]
    assert not unused, f"the job did not use {unused}"
    return result


def _counted(method: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        calls[method.__qualname__] += 1
        return method(*args, **options)

    return call


def _generate(rank: int, path: Path, job: Job, device: str) -> Result:
    tree: dict[str, Any] = {
        "model": {"path": str(path), "max_model_len": 64, "dtype": "float32"},
        "scheduler": {"kv_cache_blocks": 64, "block_size": 4, "max_batch_tokens": 24},
        "runtime": {
            "device": device,
            "shared_memory": False,
            "timeout_s": 60.0,
            "graphs": "off",  # every step is eager; `graphs/` has the jobs with graphs
        },
    }
    for section, values in job.settings.items():
        tree[section] = {**tree.get(section, {}), **values}
    if job.placement is not None:
        file = job.placement.write(path, rank)
        tree["moe"] = {**tree.get("moe", {}), "placement": str(file)}
    if job.policy is not None:
        file, own = path / f"policy-{policy_digest(job.policy)}.yaml", path / f"{rank}-policy.yaml"
        write_policy(job.policy, own)
        tree["moe"] = {**tree.get("moe", {}), "policy": str(own.replace(file))}
    llm = LLM(config_from_tree(tree))
    layers = llm.model.moe_layers
    before = sum(layer.num_collectives for layer in layers)  # of the warm-up
    DEVICE.reset_counts()
    options = {"max_new_tokens": 8, "ignore_eos": True, "logprobs": True, **job.sampling}
    done = llm.generate(job.prompts, SamplingParams(**options))
    assert llm.report is not None
    result = Result(
        done=[{**each.record(), "timing": None} for each in done],
        preemptions=llm.report.ranks[rank].preemptions,
        chunks=layers[-1].num_chunks,
        dispatched=sum(layer.num_collectives for layer in layers) - before,
        kernels=sum(DEVICE.kernels.values()),
        syncs=dict(DEVICE.syncs),
    )
    llm.close()
    return result
