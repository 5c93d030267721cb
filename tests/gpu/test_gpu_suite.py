"""tools/gpu_suite.py: its message without a GPU, that it catches mistakes, and the run on a GPU.

python -m pytest tests/gpu/test_gpu_suite.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_suite
import pytest
import torch
from gpu_checks.check import Check, at_most, guarded, relative_error
from gpu_checks.experts import check_experts
from gpu_checks.kernels import check_kernels
from gpu_checks.pipeline import check_pipeline

from engine.moe import experts as engine_experts
from engine.ops import silu_and_mul

CPU = torch.device("cpu")


def test_without_cuda_it_exits_with_2_and_an_instruction(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    message = capsys.readouterr().err
    assert "no CUDA device" in message and "--allow-cpu" in message


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (None, 0), (False, 1)])
def test_the_exit_code_is_1_when_a_check_failed(
    passed: bool | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    check = Check(group="g", name="n", passed=passed, value=float("inf"), bound=1.0)
    monkeypatch.setattr(gpu_suite, "run_checks", lambda *_: [check])
    assert gpu_suite.main(["--allow-cpu", "--out", str(tmp_path)]) == code
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["checks"][0]["passed"] is passed and record["checks"][0]["value"] is None
    assert len(list(tmp_path.iterdir())) == 2


def test_nan_and_wrong_shapes_never_pass() -> None:
    good = torch.ones(2, 2)
    assert relative_error(good, good) == 0
    assert relative_error(good * float("nan"), good) == float("inf")
    assert relative_error(torch.ones(2), good) == float("inf")
    assert at_most("g", "n", float("nan"), 1.0).passed is False


def test_a_check_that_raises_is_one_that_failed() -> None:
    def broken() -> list[Check]:
        raise RuntimeError("device on fire")

    (check,) = guarded("g", "n", broken)
    assert check.passed is False and "RuntimeError: device on fire" in check.note


def test_all_ops_and_backends_pass_on_the_cpu() -> None:
    checks = check_kernels(CPU) + check_experts(CPU)
    assert [check for check in checks if check.passed is False] == []
    assert {check.name for check in checks if check.passed is None} == {
        "te float32",
        "te bfloat16",
    }


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = silu_and_mul.silu_and_mul_reference
    monkeypatch.setattr(silu_and_mul, "silu_and_mul", lambda x: right(x) * 1.02)
    failed = {check.name for check in check_kernels(CPU) if check.passed is False}
    assert failed == {f"silu_and_mul {dtype}" for dtype in ("float32", "bfloat16", "float16")}


def test_a_backend_that_swaps_two_experts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swapped(engine_experts.TorchExperts):
        def __call__(self, rows_RD: Any, expert_counts: list[int], *rest: Any) -> torch.Tensor:
            return super().__call__(rows_RD, expert_counts[::-1], *rest)

    monkeypatch.setattr(engine_experts, "TorchExperts", Swapped)
    failed = {check.name for check in check_experts(CPU) if check.passed is False}
    assert {"torch float32, skewed", "torch bfloat16, skewed"} <= failed
    assert "torch float32, even" not in failed


def test_the_pipeline_gives_the_same_in_any_number_of_chunks() -> None:
    checks = check_pipeline(CPU)
    assert [check for check in checks if check.passed is False] == []
    assert sum(check.passed is True for check in checks) == 6  # two backends, 1 to 3 chunks


@pytest.mark.slow
def test_engine_checks_pass_on_the_cpu() -> None:
    checks = gpu_suite.run_checks("cpu", ["engine"], ["mixtral"])
    assert {check.group for check in checks} == {"families", "batch job", "memory"}
    assert [check for check in checks if check.passed is False] == []


@pytest.mark.gpu
def test_the_whole_suite_passes_on_this_gpu() -> None:
    checks = gpu_suite.run_checks("cuda", gpu_suite.SUBJECTS, gpu_suite.FAMILIES)
    assert [check for check in checks if check.passed is False] == []
