"""Which kernels attend over the KV cache: the section `attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Which kernels attend over the KV cache."""

    backend: Literal["auto", "flashinfer", "varlen", "triton"] = "auto"  # flashinfer, varlen: on
    # CUDA, FlashInfer's kernels or torch's varlen_attn; triton: this engine's (on the CPU the
    # compiled ones); auto: the first of these that is installed and serves every layer
