"""engine/ops/deep_gemm_library.py: what is said of a library that cannot be used."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from engine.ops.deep_gemm_library import is_installed, load_deep_gemm
from tests.helpers.fake_deep_gemm import fake_module

installed = importlib.util.find_spec("deep_gemm") is not None


@pytest.mark.skipif(installed, reason="DeepGEMM is installed")
def test_without_the_library_it_is_said_to_be_missing():
    assert not is_installed()
    with pytest.raises(ImportError, match="is not installed"):
        load_deep_gemm()


def test_an_import_that_fails_is_named_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "deep_gemm.py").write_text("raise RuntimeError('no CUDA toolkit\\nat all')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    assert is_installed()
    with pytest.raises(ImportError, match=r"import of deep_gemm fails \(no CUDA toolkit\)$"):
        load_deep_gemm()


def test_a_release_with_other_names_is_named_with_its_version(monkeypatch):
    module = fake_module()
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    assert is_installed() and load_deep_gemm().alignment() == 128
    del module.m_grouped_fp8_gemm_nt_masked
    with pytest.raises(ImportError, match=r"deep_gemm 2\.8\.0 has no m_grouped_fp8_gemm_nt_masked"):
        load_deep_gemm()
