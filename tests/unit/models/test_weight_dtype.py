"""engine/models/weight_dtype.py: what model.dtype becomes, on one rank and on all, and in words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine.config import Config, ModelConfig, RuntimeConfig
from engine.distributed import bootstrap
from engine.models.weight_dtype import agree_dtype, dtype_in_words, model_dtype
from engine.ops import native
from tests.helpers.ranks import run_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("own", "has_products", "on_cpu"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.float32, True, torch.float32),
        (None, True, torch.float32),
    ],
)
def test_auto_is_bfloat16_on_a_cpu_that_multiplies_with_it_and_the_checkpoints_on_cuda(
    monkeypatch, own, has_products, on_cpu
):
    monkeypatch.setattr(native, "has_bfloat16_products", lambda: has_products)
    hf_config = SimpleNamespace(dtype=own)
    assert model_dtype("auto", hf_config, CPU) == on_cpu
    assert model_dtype("auto", hf_config, CUDA) == (own or torch.float32)
    assert model_dtype("bfloat16", hf_config, CPU) == torch.bfloat16


def agreed(rank: int, setting: str, dtypes: list[torch.dtype]) -> torch.dtype:
    model = ModelConfig(path="unused", dtype=setting)  # pyright: ignore[reportArgumentType]
    config = Config(model=model, runtime=RuntimeConfig(device="cpu"))
    topology = bootstrap.start(config)
    found = agree_dtype(dtypes[rank], config, topology)
    bootstrap.stop(topology)
    return found


def test_ranks_whose_processors_differ_agree_on_float32():
    differ = [torch.bfloat16, torch.float32]
    assert run_ranks(agreed, 2, "auto", differ) == [torch.float32] * 2
    assert run_ranks(agreed, 2, "auto", [torch.bfloat16] * 2) == [torch.bfloat16] * 2


def test_the_report_says_what_is_computed_in_float32():
    assert dtype_in_words(torch.bfloat16, CPU) == "bfloat16 (weights), computes in float32"
    assert dtype_in_words(torch.bfloat16, CUDA) == "bfloat16"
    assert dtype_in_words(torch.float16, CPU) == "float16"
    assert dtype_in_words(torch.float32, CPU) == "float32"
