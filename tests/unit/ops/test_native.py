"""The compiled CPU kernels as a whole: presence in words, switching off, same bits on every set.

Run: python -m pytest tests/unit/ops/test_native.py
"""

import os
import subprocess
import sys

import pytest
import torch

from engine.ops import native
from engine.ops.grouped_ffn import grouped_ffn
from engine.ops.linear import linear
from engine.ops.paged_attention import paged_attention
from engine.ops.rms_norm import rms_norm
from tests.helpers.ops_cases import ISAS_HERE, needs_native, on_isa, paged_case


def native_line(value: str) -> subprocess.CompletedProcess:
    code = "from engine.ops import native; print(native.available(), native.reason())"
    environment = {**os.environ, "LOCKSTEP_NATIVE": value}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_reason_names_the_kernels_that_run_or_why_none_do():
    assert ("run (" in native.reason()) is native.available()


def test_the_environment_switches_the_kernels_off():
    assert native_line("0").stdout.startswith("False native CPU kernels are switched off")


def test_an_unknown_choice_is_an_error_that_lists_the_choices():
    result = native_line("fast")
    assert result.returncode != 0
    assert "LOCKSTEP_NATIVE='fast'" in result.stderr and "generic" in result.stderr


@needs_native
def test_the_environment_forces_an_instruction_set():
    assert native_line("generic").stdout.strip() == "True native CPU kernels run (generic)"


@needs_native
def test_tensors_that_ask_for_gradients_go_to_torch():
    weight = torch.randn(8, 4, requires_grad=True)
    x = torch.randn(3, 4)
    assert not native.serves(x, weight)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert native.serves(x, weight)


@needs_native
def test_other_dtypes_go_to_torch():
    assert not native.serves(torch.randn(2, 2, dtype=torch.bfloat16))
    x, weight = torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(5, 4, dtype=torch.bfloat16)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.skipif(
    not {"avx2", "avx512"} <= set(ISAS_HERE), reason="the processor lacks AVX2 or AVX-512"
)
def test_avx2_and_avx512_give_the_same_bits():
    torch.manual_seed(0)
    x, w13, w2 = torch.randn(37, 50), torch.randn(3, 42, 50), torch.randn(3, 50, 21)

    case = paged_case([(1, 1500), (60, 60)], heads=6, kv_heads=2, key_dim=24, value_dim=40)

    def run() -> list[torch.Tensor]:
        return [
            linear(x, w13[0]),
            grouped_ffn(x, w13, w2, [30, 0, 7]),
            rms_norm(x, x[0], 1e-6),
            paged_attention(*case.tensors, **case.lens, scale=0.2, window=None),
        ]

    with on_isa("avx512"):
        wide = run()
    with on_isa("avx2"):
        narrow = run()
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


@needs_native
def test_a_library_built_from_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "source_digest", lambda: "s0")
    loaded, reason = native._load.__wrapped__()
    assert not loaded and "built from other sources" in reason and "pip install -e ." in reason
