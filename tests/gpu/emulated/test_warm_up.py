"""What runs at start on emulated CUDA, before the KV cache is sized.

Run: pytest tests/gpu/emulated/test_warm_up.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config.loader import config_from_tree
from engine.generation import builder
from engine.llm import LLM
from engine.request import SamplingParams
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.runs import Placed
from tests.helpers.ranks import run_ranks


def started(
    rank: int,
    guard: Path,
    path: Path,
    parallel: dict[str, int],
    placement: Placed | None = None,
) -> dict[str, Any]:
    """What has run on the device when the memory for the cache is measured, and what it left."""
    seen: dict[str, Any] = {}
    num_kv_blocks = builder.num_kv_blocks

    def measure(*args: Any, **options: Any) -> int:
        seen["kernels"] = set(DEVICE.kernels)
        seen["collectives"] = sum(DEVICE.collectives.values())
        return num_kv_blocks(*args, **options)

    tree: dict[str, Any] = {
        "model": {"path": str(path), "max_model_len": 64, "dtype": "bfloat16"},
        "scheduler": {"kv_cache_blocks": 64, "block_size": 4, "max_batch_tokens": 24},
        "moe": {"overlap": {"chunks": "auto"}, "capacity": {"policy": "token_drop"}},
        "parallel": parallel,
        "runtime": {"device": "cuda", "timeout_s": 60.0},
    }
    if placement is not None:
        tree["moe"] = {"placement": str(placement.write(path, rank))}
    with pytest.MonkeyPatch.context() as patch, emulated_cuda(guard):
        patch.setattr(builder, "num_kv_blocks", measure)
        llm = LLM(config_from_tree(tree))
        seen["position"] = llm._telemetry.clock.position()
        seen["choices"] = [layer.layout_policy.choices for layer in llm.model.moe_layers]
        seen["is_own"] = all(layer.telemetry is llm._telemetry for layer in llm.model.moe_layers)
        llm.close()
    return seen


@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("qwen3_moe", {}),
        pytest.param("deepseek_v2", {"tensor": 2}, marks=pytest.mark.long),
        pytest.param("llama4_text", {}, marks=pytest.mark.long),
    ],
)
def test_every_kernel_and_collective_runs_once_before_the_cache_is_sized(
    guard, checkpoint, family, parallel
):
    for seen in run_ranks(started, 2, guard, checkpoint(family), parallel):
        for kernel in ("paged_attention", "rotary_store", "silu_and_mul", "combine_rows"):
            assert any(kernel in each for each in seen["kernels"]), (kernel, seen["kernels"])
        assert seen["collectives"] >= 3 * 2, "counts and rows, in two steps"
        assert seen["position"].step == 0 and seen["is_own"]
        assert not any(seen["choices"])


@pytest.mark.parametrize("precision", [pytest.param("model", marks=pytest.mark.long), "int4"])
def test_what_deals_rows_to_copies_runs_before_the_cache_is_sized(guard, checkpoint, precision):
    placement = Placed(copied=(0, 5), precision=precision)
    for seen in run_ranks(started, 2, guard, checkpoint("mixtral"), {}, placement):
        for kernel in ("deal_rows", "deal_claims", "list_claims", "sort_key", "sort"):
            assert any(kernel in each for each in seen["kernels"]), (kernel, seen["kernels"])


Form = tuple[object, ...]


def products(
    rank: int, guard: Path, path: Path, quantization: str, placement: Placed
) -> tuple[set[Form], set[Form]]:
    """Forms of the low-bit product that have run when the cache is sized, and those of a job."""
    forms: set[Form] = set()
    warmed: set[Form] = set()
    num_kv_blocks = builder.num_kv_blocks

    def measure(*args: Any, **options: Any) -> int:
        warmed.update(forms)
        forms.clear()
        return num_kv_blocks(*args, **options)

    tree: dict[str, Any] = {
        "model": {
            "path": str(path),
            "max_model_len": 128,
            "dtype": "bfloat16",
            "quantization": quantization,
        },
        "scheduler": {"kv_cache_blocks": 256, "block_size": 4, "max_batch_tokens": 256},
        "moe": {"placement": str(placement.write(path, rank)), "copies": {"target": 1.0}},
        "runtime": {"device": "cuda", "timeout_s": 60.0},
    }
    with pytest.MonkeyPatch.context() as patch, emulated_cuda(guard):
        patch.setattr(builder, "num_kv_blocks", measure)
        module = sys.modules["engine.ops.gpu.grouped_low_bit"]
        launch = module.grouped_low_bit_triton

        def noted(x: Any, weights: Any, tiles: Any, height: int, *rest: Any, **options: Any) -> Any:
            way = "in place"
            if len(rest) > 1 and rest[1] is not None:
                way = "scattered" if options.get("scatter") else "gathered"
            layout = weights.format, weights.bits, weights.group, weights.scale_ePGN.shape[2:]
            shape = weights.outputs, weights.inputs, options.get("bias_eO") is not None
            forms.add((x.dtype, height, way, *layout, *shape))
            return launch(x, weights, tiles, height, *rest, **options)

        patch.setattr(module, "grouped_low_bit_triton", noted)
        llm = LLM(config_from_tree(tree))
        forms.clear()  # of what is measured behind the warm-up
        # One expert has many rows in the first step, and few in those of single tokens.
        prompts = [[7] * 60, [7] * 60, [7] * 60, [*range(60)]]
        llm.generate(prompts, SamplingParams(max_new_tokens=4, ignore_eos=True))
        llm.close()
    return warmed, forms


@pytest.mark.parametrize(
    ("family", "quantization", "precision"),
    [
        ("mixtral", "fp8", "int4"),
        pytest.param("gpt_oss mxfp4", "keep", "model", marks=pytest.mark.long),
    ],
)
def test_every_form_of_the_low_bit_product_that_a_job_runs_ran_before_the_cache_is_sized(
    guard, checkpoint, family, quantization, precision
):
    placement = Placed(copied=tuple(range(8)), precision=precision)
    path = checkpoint(family)
    for warmed, ran in run_ranks(products, 2, guard, path, quantization, placement):
        assert ran <= warmed
        assert {form[1] for form in ran} == {16, 64}, "the job has few rows and many"
