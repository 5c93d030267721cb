"""What tests on emulated CUDA share: the device guard, checkpoints, and runs on both devices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.gpu.emulated.guard import compile_guard
from tests.gpu.emulated.runs import Job, Result, on_both
from tests.helpers.model_cases import make_reference
from tests.helpers.packers import CONFIGS, PACKERS, WIDE_PACKERS, mxfp4
from tests.helpers.ranks import run_ranks
from tests.helpers.transformers_cases import FOREIGN_CASES
from tools.make_random_checkpoint import make_checkpoint

OnBothDevices = Callable[..., list[tuple[Result, Result]]]


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled device guard."""
    return compile_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns a checkpoint of a family, "family kind" one with experts in a format
    of `tests/helpers/packers.py`; "family-128" has experts of 128 x 128; families that are not ours
    are of `transformers_cases.py`.
    """
    made: dict[str, Path] = {}

    def path_of(name: str) -> Path:
        if name not in made:
            path, (family, *kind) = tmp_path_factory.mktemp("checkpoint") / "made", name.split()
            if family in FOREIGN_CASES:
                make_reference(FOREIGN_CASES[family], path)
            elif kind:
                _store_experts(path_of(family), kind[0], path)
            else:
                wide = {"hidden_size": 128, "moe_intermediate_size": 128}
                overrides = {"vocab_size": 97, **(wide if family.endswith("-128") else {})}
                make_checkpoint(family.removesuffix("-128"), path, overrides=overrides)
            made[name] = path
        return made[name]

    return path_of


def _store_experts(source: Path, kind: str, out: Path) -> None:
    """Write a checkpoint with its experts in another format."""
    generator, stored = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".experts." not in name or "bias" in name:
            stored[name] = tensor
        elif kind == "mxfp4":  # stacked, transposed where they are not quantised
            parts = mxfp4(tensor.transpose(1, 2).contiguous(), generator)
            stored |= {f"{name}{suffix}": part for suffix, part in parts.items()}
        else:
            module = name.removesuffix("weight")
            stored |= {
                f"{module}{suffix}": part
                for suffix, part in (PACKERS | WIDE_PACKERS)[kind](tensor, generator).items()
            }
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[kind]}))


@pytest.fixture
def on_both_devices(guard: Path, checkpoint: Callable[[str], Path]) -> OnBothDevices:
    """A function that runs a job on the CPU and on emulated CUDA and returns what each rank saw."""

    def run(job: Job, world: int = 2) -> list[tuple[Result, Result]]:
        results = run_ranks(on_both, world, guard, checkpoint(job.family), job, timeout=120)
        for cpu, cuda in results:
            assert cuda.kernels > 0 == cpu.kernels
            if job.settings.get("model", {}).get("dtype") == "bfloat16":
                _assert_close(cuda.done, cpu.done)
            else:
                assert cuda.done == cpu.done
            assert not any("error" in record for record in cuda.done)
        return results

    return run


def _assert_close(cuda: list[dict[str, Any]], cpu: list[dict[str, Any]]) -> None:
    """The CPU computes in float32 on bfloat16 weights, CUDA in bfloat16: the first tokens of the
    same requests are about as likely.
    """
    assert [each["id"] for each in cuda] == [each["id"] for each in cpu]
    for one, other in zip(cuda, cpu, strict=True):
        assert abs(one["logprobs"][0] - other["logprobs"][0]) < 0.05
