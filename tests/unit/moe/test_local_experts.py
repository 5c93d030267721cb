"""engine/moe/local_experts.py: what copies take, and what is freed before the KV cache is sized."""

from __future__ import annotations

import weakref

import pytest
import torch

from engine.moe.copy_weights import copy_parts, read_home
from engine.moe.local_experts import LocalExperts
from engine.moe.placement.placement import Precision

HIDDEN, FFN = 64, 48


def filled(
    precision: Precision, copies: int = 2, dtype: torch.dtype = torch.float32
) -> LocalExperts:
    experts = LocalExperts(
        3,
        copies,
        precision,
        hidden=HIDDEN,
        ffn=FFN,
        backend="torch",
        device=torch.device("cpu"),
        dtype=dtype,
    )
    for local in range(3 + copies):
        for weights in experts.weights_of(local):
            weights.data.fill_(0.01 * (local + 1))
    return experts


@pytest.mark.parametrize(("precision", "bits"), [("int4", 5), ("int8", 9)])
def test_weights_that_low_bit_copies_were_quantised_from_are_freed(precision, bits):
    experts = filled(precision)
    assert experts.loading is not None
    parts = [weakref.ref(each) for each in experts.loading.parameters()]
    assert parts and all(part() is not None for part in parts)
    experts.finalize_weights()
    assert experts.loading is None and [part() for part in parts] == [None] * len(parts)
    # A scale of 32 bits for every 32 columns; 48 columns have two groups.
    weights = 2 * (2 * FFN * HIDDEN + HIDDEN * FFN)
    assert weights * bits / 8 <= experts.copy_bytes <= weights * (bits + 0.5) / 8


def test_copies_in_the_models_precision_take_as_much_as_homes():
    experts = filled("model")
    experts.finalize_weights()
    assert experts.copy_bytes == 2 * 3 * HIDDEN * FFN * 4
    assert filled("model", copies=0).copy_bytes == filled("int4", copies=0).copy_bytes == 0


def test_copies_of_bfloat16_weights_take_half_of_float32_ones():
    wide, narrow = filled("model"), filled("model", dtype=torch.bfloat16)
    assert narrow.copy_bytes * 2 == wide.copy_bytes and narrow.copy_size * 2 == wide.copy_size
    assert filled("int8", dtype=torch.bfloat16).copy_size == filled("int8").copy_size


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
def test_a_copy_moved_from_bfloat16_weights_is_the_one_that_was_loaded(precision):
    experts = LocalExperts(
        1,
        1,
        precision,
        hidden=HIDDEN,
        ffn=FFN,
        backend="torch",
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    generator = torch.Generator().manual_seed(0)
    for home, copy in zip(experts.weights_of(0), experts.weights_of(1), strict=True):
        copy.copy_(home.copy_(torch.randn(home.shape, generator=generator)))
    experts.finalize_weights()
    parts = zip(read_home(experts, 0), copy_parts(experts, 0), strict=True)
    assert all(torch.equal(home, copy) for home, copy in parts)
