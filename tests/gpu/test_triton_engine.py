"""The engine on the Triton kernels in Triton's interpreter: the tokens of the torch references.

CPU tensors are taken for CUDA ones, so every launcher is called as a job on a GPU calls it.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config.loader import config_from_tree
from engine.llm import LLM
from engine.models.transformers_model.spec import read_spec
from engine.ops import native, triton_support
from engine.request import Completion, SamplingParams
from tests.helpers.model_cases import make_reference
from tests.helpers.transformers_cases import FOREIGN_CASES
from tests.helpers.triton_cases import INTERPRETED, kernel
from tools.make_random_checkpoint import make_checkpoint

pytestmark = [kernel, pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")]

PROMPTS = [[5, 60, 7, 90, 12], [3, 1, 4, 1, 5, 9, 2, 6, 53], [71]]
DELTA = {"causal_conv_silu", "gated_delta_rule", "gated_rms_norm"}
# Launchers of the layers, and the families that need them beside those that all need.
ALL = {"rms_norm", "paged_attention", "combine_rows"}
FAMILIES = {
    "mixtral": {"qk_rotary_store"},
    "olmoe": {"qk_rotary_store"},
    "qwen2_moe": {"qk_rotary_store", "silu_and_mul", "gate_output"},
    "qwen3_moe": {"qk_rotary_store"},
    "deepseek_v2": {"latent_rotary_store", "silu_and_mul"},
    "deepseek_v3": {"latent_rotary_store", "silu_and_mul"},
    "minimax_m2": {"qk_rotary_store"},
    "ernie4_5_moe": {"qk_rotary_store", "silu_and_mul"},
    "glm4_moe": {"qk_rotary_store", "silu_and_mul"},
    "gpt_oss": {"qk_rotary_store"},
    "llama4_text": {"qk_rotary_store", "silu_and_mul"},
    "qwen3_next": DELTA | {"qk_rotary_store", "silu_and_mul", "gate_output"},
    "qwen3_5_moe_text": DELTA | {"qk_rotary_store", "silu_and_mul", "gate_output"},
    "longcat_flash": {"latent_rotary_store", "silu_and_mul", "add_zero_experts"},
}
TRANSFORMERS_USES = {"paged_attention", "store_kv", "combine_rows"}


def generate(path: Path) -> list[Completion]:
    """Greedy completions: a prompt in chunks beside decoding sequences, then decoding alone."""
    llm = LLM(
        config_from_tree(
            {
                "model": {"path": str(path), "max_model_len": 32, "dtype": "float32"},
                "scheduler": {"kv_cache_blocks": 32, "block_size": 4, "max_batch_tokens": 12},
                "moe": {"experts": {"backend": "torch"}},
                "runtime": {"device": "cpu"},
            }
        )
    )
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=4, ignore_eos=True, logprobs=True))
    llm.close()
    return done


def counted(launcher: Callable[..., Any], op: str, launched: Counter[str]) -> Callable[..., Any]:
    def launch(*args: Any, **options: Any) -> Any:
        launched[op] += 1
        return launcher(*args, **options)

    return launch


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_those_of_the_torch_references(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(family, tmp_path, overrides={"vocab_size": 97})
    launched: Counter[str] = Counter()
    for op in ALL | FAMILIES[family]:
        module = importlib.import_module(f"engine.ops.gpu.{op}")
        launcher = counted(getattr(module, f"{op}_triton"), op, launched)
        monkeypatch.setattr(module, f"{op}_triton", launcher)
    monkeypatch.setattr(native, "_serve", lambda *_: False)
    expected = generate(tmp_path)
    assert not launched
    monkeypatch.setattr(triton_support, "serves", lambda _: True)
    got = generate(tmp_path)
    assert set(launched) == ALL | FAMILIES[family]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.token_ids == theirs.token_ids and len(mine.token_ids) == 4
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


# In models that transformers builds rotary embedding and norms are its own; keys of mistral4 are
# wider than its values.
@pytest.mark.parametrize("case", [pytest.param("granitemoe", marks=pytest.mark.long), "mistral4"])
def test_models_that_transformers_builds_attend_and_run_experts_by_our_kernels(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FOREIGN_CASES[case]
    if case == "mistral4":
        made = replace(made, settings=made.settings | {"v_head_dim": 5})
        assert read_spec(made.config()).layers[0].attention.head_dim == 12
    make_reference(made, tmp_path)
    launched: Counter[str] = Counter()
    for op in TRANSFORMERS_USES:
        module = importlib.import_module(f"engine.ops.gpu.{op}")
        launcher = counted(getattr(module, f"{op}_triton"), op, launched)
        monkeypatch.setattr(module, f"{op}_triton", launcher)
    monkeypatch.setattr(native, "_serve", lambda *_: False)
    expected = generate(tmp_path)
    assert not launched
    monkeypatch.setattr(triton_support, "serves", lambda _: True)
    got = generate(tmp_path)
    assert set(launched) == TRANSFORMERS_USES
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.token_ids == theirs.token_ids and len(mine.token_ids) == 4
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
