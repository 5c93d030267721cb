"""Which experts backend runs where. Run: pytest tests/unit/moe/test_experts.py"""

import importlib.util
import re
import sys
from types import ModuleType

import pytest
import torch

from engine.moe.backend_choice import choose_backend, deep_gemm_serves
from engine.moe.experts import ExpertWeights, make_backend
from engine.ops import triton_support
from tests.helpers.fake_deep_gemm import fake_module

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pretend_installed(monkeypatch, installed: bool) -> None:
    find = importlib.util.find_spec

    def fake(name, *rest):
        if name == "transformer_engine":
            return object() if installed else None
        return find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", fake)
    package, module = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    package.pytorch = module  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)


class BrokenImport:
    """Finds Transformer Engine, built for another torch."""

    def find_spec(self, name, *rest):
        if name.startswith("transformer_engine"):
            raise OSError("libtorch.so: undefined symbol: _ZN2at4_ops5zerosE\nmore")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU that torch's grouped_mm has a kernel for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (CPU, torch.float32, "torch"),
        (CPU, torch.bfloat16, "torch"),
        (CUDA, torch.float32, "torch"),
        (CUDA, torch.bfloat16, "grouped_mm"),
        (CUDA, torch.float16, "torch"),
    ],
)
def test_auto_takes_grouped_mm_in_bfloat16_on_cuda_whether_te_is_installed_or_not(
    monkeypatch, device, dtype, installed, expected
):
    pretend_installed(monkeypatch, installed)
    assert choose_backend("auto", device, dtype) == expected


def test_auto_takes_torch_where_grouped_mm_would_copy_its_offsets_to_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert choose_backend("auto", CUDA, torch.bfloat16) == "torch"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_grouped_mm_that_copies_its_offsets_to_the_host_is_warned_of(caplog, dtype):
    assert choose_backend("grouped_mm", CUDA, dtype) == "grouped_mm"
    assert "copies its offsets to the host" in caplog.text


def test_grouped_mm_of_torch_2_8_and_2_9_runs_in_bfloat16_on_cuda_alone(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert choose_backend("auto", CUDA, torch.bfloat16) == "grouped_mm"
    assert choose_backend("grouped_mm", CUDA, torch.bfloat16) == "grouped_mm"
    for device, dtype in ((CUDA, torch.float16), (CPU, torch.bfloat16)):
        with pytest.raises(
            ValueError, match=r"'grouped_mm' needs torch >= 2\.10, or torch >= 2\.8"
        ):
            choose_backend("grouped_mm", device, dtype)
    weights = ExpertWeights(2, 16, 24, CPU, torch.bfloat16)
    for weight in weights.parameters():
        weight.data.normal_()
    old = make_backend("grouped_mm", weights)(torch.ones(5, 16, dtype=torch.bfloat16), [2, 3])
    monkeypatch.undo()
    new = make_backend("grouped_mm", weights)(torch.ones(5, 16, dtype=torch.bfloat16), [2, 3])
    assert torch.equal(old, new)


def test_te_is_refused_where_it_cannot_run(monkeypatch):
    pretend_installed(monkeypatch, False)
    with pytest.raises(ValueError, match=r"moe\.experts\.backend: 'te' runs on CUDA only"):
        choose_backend("te", CPU, torch.float32)
    with pytest.raises(ValueError, match=r"'te' needs Transformer Engine.*lockstep-moe\[te\]"):
        choose_backend("te", CUDA, torch.bfloat16)


def test_a_transformer_engine_that_fails_to_import_is_refused_with_why(monkeypatch):
    pretend_installed(monkeypatch, True)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [BrokenImport(), *sys.meta_path])
    with pytest.raises(ValueError, match=r"'te' needs.*fails: libtorch.so: undefined.*; install"):
        choose_backend("te", CUDA, torch.bfloat16)


@pytest.mark.parametrize("widths", [(16, 20), (28, 16), (2048, 1407)])
def test_widths_that_grouped_mm_does_not_take_are_found_before_the_model_is_loaded(
    monkeypatch, caplog, widths
):
    pretend_installed(monkeypatch, False)
    with pytest.raises(
        ValueError, match=r"'grouped_mm' needs.* multiples of 8 in bfloat16.*choose"
    ):
        choose_backend("grouped_mm", CUDA, torch.bfloat16, widths)
    assert choose_backend("auto", CUDA, torch.bfloat16, widths) == "torch"
    assert "going on with the backend 'torch'" in caplog.text
    assert choose_backend("auto", CUDA, torch.bfloat16, (16, 24)) == "grouped_mm"
    assert choose_backend("grouped_mm", CPU, torch.float32, (4, 20)) == "grouped_mm"


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "capability", "words"),
    [
        (CPU, torch.bfloat16, (), (9, 0), "the device is cpu"),
        (CUDA, torch.float16, (), (9, 0), "model.dtype is float16"),
        (CUDA, torch.float32, (), (9, 0), "model.dtype is float32"),
        (CUDA, torch.bfloat16, (), (8, 9), "this GPU's is 8.9"),
        (CUDA, torch.bfloat16, (), (12, 0), "this GPU's is 12.0"),
        (CUDA, torch.bfloat16, (64, 24), (9, 0), "one of this checkpoint is 24"),
    ],
)
def test_scaled_mm_is_refused_where_torch_has_no_kernel(
    monkeypatch, device, dtype, widths, capability, words
):
    monkeypatch.setattr(triton_support, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with pytest.raises(ValueError, match=f"'scaled_mm' needs .*{re.escape(words)}.*choose 'auto'"):
        choose_backend("scaled_mm", device, dtype, widths)


def test_scaled_mm_is_taken_where_it_is_asked_for_and_never_by_auto(monkeypatch):
    monkeypatch.setattr(triton_support, "_installed", lambda: True)
    assert choose_backend("scaled_mm", CUDA, torch.bfloat16, (64, 48)) == "scaled_mm"
    assert choose_backend("auto", CUDA, torch.bfloat16, (64, 48)) == "grouped_mm"
    with pytest.raises(ValueError, match="in FP8 and these are in bfloat16.*quantization to fp8"):
        make_backend("scaled_mm", ExpertWeights(2, 64, 48, CPU, torch.bfloat16))
    monkeypatch.delattr(torch, "_scaled_grouped_mm")
    with pytest.raises(ValueError, match=r"torch >= 2\.8.*this is torch"):
        choose_backend("scaled_mm", CUDA, torch.bfloat16, (64, 48))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(triton_support, "_installed", lambda: False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        choose_backend("scaled_mm", CUDA, torch.bfloat16, (64, 48))


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "capability", "words"),
    [
        (CPU, torch.bfloat16, (), (9, 0), "the device is cpu"),
        (CUDA, torch.float16, (), (9, 0), "model.dtype is float16"),
        (CUDA, torch.bfloat16, (), (8, 9), "this GPU's is 8.9"),
        (CUDA, torch.bfloat16, (), (10, 0), "this GPU's is 10.0"),
        (CUDA, torch.bfloat16, (256, 192), (9, 0), "one of this checkpoint is 192"),
    ],
)
def test_deep_gemm_is_refused_where_the_library_does_not_run(
    monkeypatch, device, dtype, widths, capability, words
):
    monkeypatch.setattr(triton_support, "_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_module())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with pytest.raises(ValueError, match=f"'deep_gemm' needs .*{re.escape(words)}.*choose 'auto'"):
        choose_backend("deep_gemm", device, dtype, widths)
    assert not deep_gemm_serves(device, dtype, widths)


def test_deep_gemm_is_refused_without_the_library_and_taken_with_it(monkeypatch):
    monkeypatch.setattr(triton_support, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    with pytest.raises(ValueError, match="'deep_gemm' needs .*is not installed"):
        choose_backend("deep_gemm", CUDA, torch.bfloat16, (256, 128))
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_module())
    assert choose_backend("deep_gemm", CUDA, torch.bfloat16, (256, 128)) == "deep_gemm"
    assert deep_gemm_serves(CUDA, torch.bfloat16, (256, 128))
    with pytest.raises(ValueError, match="in FP8 and these are in bfloat16.*quantization to fp8"):
        make_backend("deep_gemm", ExpertWeights(2, 128, 128, CPU, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "ffn"), [(16, 24), (16, 20), (20, 16), (18, 16), (16, 17)])
def test_grouped_mm_runs_with_every_width_that_is_let_through(dtype, hidden, ffn):
    try:
        choose_backend("grouped_mm", CPU, dtype, (hidden, ffn))
    except ValueError:
        return
    weights = ExpertWeights(2, hidden, ffn, CPU, dtype)
    for weight in weights.parameters():
        weight.data.normal_()
    out_RD = make_backend("grouped_mm", weights)(torch.ones(5, hidden, dtype=dtype), [2, 3])
    assert out_RD.isfinite().all()


@pytest.mark.parametrize("name", ["torch", "grouped_mm"])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [1, 1, 70]])
def test_every_backend_computes_the_gated_ffn_of_each_expert(name, counts):
    generator = torch.Generator().manual_seed(0)
    weights = ExpertWeights(3, 16, 32, CPU, torch.float32)
    weights.w13_e2FD.copy_(torch.randn(3, 64, 16, generator=generator))
    weights.w2_eDF.copy_(torch.randn(3, 16, 32, generator=generator))
    rows = torch.randn(sum(counts), 16, generator=generator)
    out = make_backend(name, weights)(rows, counts)
    start = 0
    for expert, count in enumerate(counts):
        x = rows[start : start + count].double()
        up = x @ weights.w13_e2FD[expert].double().T
        hidden = torch.nn.functional.silu(up[:, :32]) * up[:, 32:]
        expected = hidden @ weights.w2_eDF[expert].double().T
        torch.testing.assert_close(
            out[start : start + count].double(), expected, atol=1e-3, rtol=1e-4
        )
        start += count
    assert out.shape == rows.shape
    index = torch.randperm(len(rows), generator=generator)
    apart, buffer = torch.empty_like(rows), torch.empty_like(rows)
    apart[index] = rows
    for into in (None, buffer):  # rows that lie anywhere, as they arrive from several ranks
        got = make_backend(name, weights)(apart, counts, into, index)
        assert torch.equal(got[index], out)
