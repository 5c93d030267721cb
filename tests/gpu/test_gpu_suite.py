"""tools/gpu_suite.py: its message without a GPU, that it catches mistakes, and the run on a GPU.

python -m pytest tests/gpu/test_gpu_suite.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gpu_suite
import pytest
import torch
from bench.environment_record import REPOSITORY
from gpu_checks import worker
from gpu_checks.check import Check, Settings, at_most, guarded, relative_error
from gpu_checks.experts.backends import check_experts
from gpu_checks.kernels import check_kernels
from gpu_checks.launches import COLUMNS, budget, read_table
from gpu_checks.parts import DEFAULT, LIMIT_S, PARTS
from gpu_checks.peaks import published
from gpu_checks.pipeline import check_pipeline
from gpu_checks.shapes import MIXTRAL
from gpu_checks.step import host_waits, may_wait
from gpu_checks.worker import Outcome, run_part

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


def outcome(*checks: Check, is_whole: bool = True) -> Outcome:
    return Outcome(list(checks), 1.0, is_whole)


def one(passed: bool | None, value: float = 0.0) -> Check:
    return Check(group="g", name="n", passed=passed, value=value, bound=1.0)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that ran; none of them really does."""
    names: list[str] = []

    def run(name: str, *_: Any) -> Outcome:
        names.append(name)
        return outcome(one(True))

    monkeypatch.setattr(gpu_suite, "run_part", run)
    return names


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (None, 0), (False, 1)])
def test_the_exit_code_is_1_when_a_check_failed(
    passed: bool | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(gpu_suite, "run_part", lambda *_: outcome(one(passed, float("inf"))))
    argv = ["--allow-cpu", "--only", "experts", "--out", str(tmp_path)]
    assert gpu_suite.main(argv) == code
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "gpu_suite_cpu.json").read_text())
    (check,) = printed["parts"]["experts"]["checks"]
    assert check["passed"] is passed and check["value"] is None


def test_parts_run_in_their_order_and_only_once_per_commit_and_machine(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    argv = ["--allow-cpu", "--out", str(tmp_path)]
    assert gpu_suite.main([*argv, "--only", "speed,nccl"]) == 0
    assert ran == ["nccl", "speed"]
    assert gpu_suite.main(argv) == 0
    assert ran == list(DEFAULT)
    assert gpu_suite.main([*argv, "--only", "nccl", "--again"]) == 0
    assert ran == [*DEFAULT, "nccl"]

    found = gpu_suite._environment
    monkeypatch.setattr(gpu_suite, "_environment", lambda: {**found(), "sources": "others"})
    assert gpu_suite.main([*argv, "--only", "nccl"]) == 0
    assert ran == [*DEFAULT, "nccl", "nccl"]


def test_a_part_is_in_the_results_before_the_next_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(name: str, *_: Any) -> Outcome:
        if name == "speed":
            raise KeyboardInterrupt
        return outcome(one(True))

    monkeypatch.setattr(gpu_suite, "run_part", run)
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.main(["--allow-cpu", "--out", str(tmp_path)])
    assert list(json.loads((tmp_path / "gpu_suite_cpu.json").read_text())["parts"]) == ["nccl"]


def test_a_stopped_part_keeps_its_checks_fails_and_is_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    argv = ["--allow-cpu", "--only", "nccl", "--out", str(tmp_path)]
    runs = [outcome(one(True), one(False), is_whole=False), outcome(one(True))]
    monkeypatch.setattr(gpu_suite, "run_part", lambda *_: runs.pop(0))
    assert gpu_suite.main(argv) == 1
    assert gpu_suite.main(argv) == 0


@pytest.mark.long
def test_a_part_that_exceeds_its_time_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """Stopped while it makes its first model, whatever has started by then."""
    settings = Settings(device=CPU, families=("mixtral",), is_tiny=True)
    log = tmp_path / "log"
    found = run_part("nccl", settings, 12.0, log, mark="of this test")
    assert not found.is_whole and found.checks[-1].passed is False
    assert "stopped after" in found.checks[-1].note
    assert worker.marked(worker.MARK, "of this test") == []


def test_the_first_two_parts_take_at_most_4_minutes_and_all_of_them_10() -> None:
    assert list(PARTS)[:2] == ["nccl", "speed"]
    assert sum(PARTS[name].seconds for name in ("nccl", "speed")) <= 4 * 60 - 10
    assert sum(PARTS[name].seconds for name in DEFAULT) <= LIMIT_S < 10 * 60


def test_a_wait_is_found_with_its_line_and_allowed_where_the_source_says_so() -> None:
    call = (
        "import warnings\ndef wait():\n    warnings.warn('called a synchronizing CUDA operation')\n"
    )
    place = str(REPOSITORY / "engine" / "not_there.py")
    scope: dict[str, Any] = {}
    exec(compile(call, place, "exec"), scope)
    with host_waits() as places:
        scope["wait"]()
        warnings.warn("another warning", stacklevel=1)
    assert places == {(place, 3): 1}
    assert not may_wait(place, 3)
    sampler = REPOSITORY / "engine" / "generation" / "sampling" / "sampler.py"
    lines = sampler.read_text().splitlines()
    marked = next(number for number, line in enumerate(lines, 1) if "# SYNC:" in line)
    assert may_wait(str(sampler), marked + 1) and not may_wait(str(sampler), 1)


def test_the_budget_of_four_layers_is_that_of_two_and_two_more() -> None:
    per_layer, per_step = (numbers := read_table()[1]["olmoe decode"])[:4], numbers[4:]
    allowed = budget("olmoe decode", 4)
    assert allowed is not None
    assert [allowed[column] for column in COLUMNS] == [
        step + 2 * layer for layer, step in zip(per_layer, per_step, strict=True)
    ]
    assert budget("no such row", 4) is None


def test_bytes_and_operations_of_real_widths_by_hand() -> None:
    # 4 layers of 8 experts of 3 x 4096 x 14336, attention of 2 x (32 + 8) heads of 128, the gate.
    layer = 8 * 3 * 4096 * 14336 + 4096 * (2 * 40 * 128 + 8)
    assert MIXTRAL.weight_bytes == 2 * (4 * layer + 2 * 32000 * 4096)
    # One sequence without a context reads 2 of 8 experts, and the head.
    used = 2 * 3 * 4096 * 14336 + 4096 * (2 * 40 * 128 + 8)
    assert MIXTRAL.decode_bytes(1, 0) == pytest.approx(2 * (4 * used + 32000 * 4096))
    assert MIXTRAL.prefill_flops(1, 1) == pytest.approx(2 * used + 2 * 32 * 128)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
    ],
)
def test_the_longest_name_that_fits_gives_the_published_peaks(name: str, flops: float) -> None:
    assert published(name)[0] == flops
    assert published("NVIDIA L40") == (None, None)


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
        "scaled_mm bfloat16",
        "deep_gemm bfloat16",
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


@pytest.mark.long
def test_engine_checks_pass_on_the_cpu() -> None:
    settings = Settings(device=CPU, families=("mixtral",), is_tiny=True)
    checks = list(PARTS["engine"].run(settings))
    assert {check.group for check in checks} == {"families", "batch job", "memory"}
    assert [check for check in checks if check.passed is False] == []


@pytest.mark.long
def test_every_part_runs_on_the_cpu_and_is_in_the_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--allow-cpu", "--families", "mixtral", "--out", str(tmp_path)]
    assert gpu_suite.main([*argv, "--only", "nccl,speed"]) == 0
    code = gpu_suite.main(argv)
    printed = capsys.readouterr().out
    assert code == 0, printed
    record = json.loads((tmp_path / "gpu_suite_cpu.json").read_text())
    assert record == json.loads(printed.splitlines()[-1])
    assert list(record["parts"]) == list(DEFAULT)
    assert {"commit", "sources", "hardware", "packages", "python"} <= set(record)
    for name, part in record["parts"].items():
        assert part["is_whole"] and part["checks"], name
        assert part["environment"]["hardware"] == record["hardware"]
    names = [check["name"] for check in record["parts"]["nccl"]["checks"]]
    for claim in ("EP 2:", "zero rows", "2 chunks", "TP 2", "rank killed", "rank stopped"):
        assert any(claim in name for name in names), claim


@pytest.mark.gpu
def test_the_whole_suite_passes_on_this_gpu(tmp_path: Path) -> None:
    assert gpu_suite.main(["--out", str(tmp_path)]) == 0
