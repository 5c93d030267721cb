"""Which attention backend a model gets: auto goes on, an explicit choice is refused in words.

Run: pytest tests/unit/layers/attention_backends/test_choose.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.layers.attention_backends import choose, flashinfer, varlen
from engine.layers.attention_backends.backend import AttentionKind
from engine.layers.attention_backends.paged_kernels import PAGED_KERNELS
from engine.ops.float8_cache import FLOAT8

KIND = AttentionKind(num_heads=8, num_kv_heads=2, key_dim=128, value_dim=128, scale=0.1)
LATENT = replace(KIND, num_kv_heads=1, key_dim=576, value_dim=512, is_latent=True)
SINKS = replace(KIND, has_sinks=True)
HALF = torch.bfloat16


@pytest.fixture
def installed(monkeypatch):
    """Both libraries, made of nothing: only the choice is looked at."""
    for module in (flashinfer, varlen):
        monkeypatch.setattr(module, "is_installed", lambda: True)
    monkeypatch.setattr(flashinfer, "FlashInferAttention", lambda *_: "flashinfer")
    monkeypatch.setattr(varlen, "VarlenAttention", lambda *_: "varlen")


def chosen(setting="auto", kind=KIND, dtype=HALF, kv_dtype=None, block_size=16, device="cuda"):
    return choose.choose_backend(
        setting,
        (KIND, kind),
        device=torch.device(device),
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        block_size=block_size,
    )


def test_auto_takes_flashinfer_then_varlen_then_the_own_kernels(installed, monkeypatch):
    assert chosen() == "flashinfer"
    assert chosen(kv_dtype=FLOAT8) == "flashinfer"
    assert chosen(kind=LATENT) == "flashinfer"
    odd = replace(KIND, key_dim=96, value_dim=96)
    assert chosen(kind=odd, block_size=256) == "varlen"
    assert chosen(kind=odd) is PAGED_KERNELS
    assert chosen("triton") is PAGED_KERNELS
    assert chosen(device="cpu") is PAGED_KERNELS
    monkeypatch.setattr(flashinfer, "is_installed", lambda: False)
    assert chosen(block_size=256) == "varlen" and chosen() is PAGED_KERNELS


@pytest.mark.parametrize(
    ("setting", "change", "words"),
    [
        ("flashinfer", {"kind": SINKS}, "without attention sinks"),
        ("flashinfer", {"kind": replace(KIND, chunk=8)}, "no chunked attention"),
        ("flashinfer", {"kind": replace(KIND, key_dim=80, value_dim=80)}, "heads of 64, 128"),
        ("flashinfer", {"kind": replace(LATENT, key_dim=40, value_dim=32)}, "a layer 32 [+] 8"),
        ("flashinfer", {"kind": LATENT, "kv_dtype": FLOAT8}, "cache in bfloat16"),
        ("flashinfer", {"kind": replace(KIND, scale=None)}, "transformers builds the model"),
        ("flashinfer", {"dtype": torch.float32}, "the model in float32"),
        (
            "varlen",
            {"kind": replace(KIND, has_sinks=True), "block_size": 256},
            "no attention sinks",
        ),
        ("varlen", {"block_size": 256, "kind": LATENT}, "no MLA"),
        ("varlen", {"kv_dtype": FLOAT8}, "no cache in float8"),
        ("varlen", {"block_size": 256, "kind": replace(KIND, key_dim=260)}, "at most 256"),
        ("varlen", {}, "set scheduler.block_size = 256"),
        ("varlen", {"dtype": torch.float32}, "the model in float32"),
        ("varlen", {"device": "cpu"}, "runs on CUDA alone"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_in_words(installed, setting, change, words):
    with pytest.raises(ValueError, match=f"attention.backend = '{setting}': .*{words}"):
        chosen(setting, **change)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(flashinfer, "is_installed", lambda: False)
    with pytest.raises(ValueError, match="pip install flashinfer-python"):
        chosen("flashinfer")
