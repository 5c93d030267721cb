"""engine/moe/local_experts.py: what copies take, and what is freed before the KV cache is sized."""

from __future__ import annotations

import weakref

import pytest
import torch

from engine.moe.local_experts import LocalExperts
from engine.moe.placement.placement import Precision

HIDDEN, FFN = 64, 48


def filled(precision: Precision, copies: int = 2) -> LocalExperts:
    experts = LocalExperts(
        3,
        copies,
        precision,
        hidden=HIDDEN,
        ffn=FFN,
        backend="torch",
        device=torch.device("cpu"),
        dtype=torch.float32,
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
