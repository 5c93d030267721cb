"""What the model check says of models that transformers builds, from real headers without data.

The names of the tensors are the published ones, written out here.

Run: pytest tests/unit/model_check/test_transformers_models.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.model_check import report
from engine.model_check.text import lines_of
from tests.helpers.sparse_checkpoint import Tensors, mixtral_8x7b, write_sparse

_BASE: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "rope_theta": 10000.0,
}


def granite_3b() -> tuple[dict[str, Any], Tensors]:
    """Granite-3.1-3B-A800M: experts stacked, under names of their own."""
    config = _BASE | {
        "model_type": "granitemoe",
        "architectures": ["GraniteMoeForCausalLM"],
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "hidden_size": 1536,
        "intermediate_size": 512,
        "logits_scaling": 6.0,
        "max_position_embeddings": 131072,
        "num_attention_heads": 24,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 40,
        "residual_multiplier": 0.22,
        "tie_word_embeddings": True,
        "vocab_size": 49155,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (49155, 1536),
        "model.norm.weight": (1536,),
    }
    for layer in range(32):
        prefix = f"model.layers.{layer}"
        shapes |= _attention(prefix, 1536, 24 * 64, 8 * 64)
        shapes[f"{prefix}.block_sparse_moe.input_linear.weight"] = (40, 1024, 1536)
        shapes[f"{prefix}.block_sparse_moe.output_linear.weight"] = (40, 1536, 512)
        shapes[f"{prefix}.block_sparse_moe.router.layer.weight"] = (40, 1536)
    return config, _bfloat16(shapes)


def hunyuan_a13b(layers: int = 32) -> tuple[dict[str, Any], Tensors]:
    """Hunyuan-A13B: experts one by one, a shared expert, norms of queries and keys."""
    config = _BASE | {
        "model_type": "hunyuan_v1_moe",
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 3072,
        "max_position_embeddings": 32768,
        "moe_topk": [8] * layers,
        "num_attention_heads": 32,
        "num_experts": 64,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "vocab_size": 128167,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128167, 4096),
        "model.norm.weight": (4096,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= _attention(prefix, 4096, 32 * 128, 8 * 128)
        shapes[f"{prefix}.self_attn.query_layernorm.weight"] = (128,)
        shapes[f"{prefix}.self_attn.key_layernorm.weight"] = (128,)
        shapes[f"{prefix}.mlp.gate.wg.weight"] = (64, 4096)
        for block in ("shared_mlp", *(f"experts.{expert}" for expert in range(64))):
            shapes[f"{prefix}.mlp.{block}.gate_proj.weight"] = (3072, 4096)
            shapes[f"{prefix}.mlp.{block}.up_proj.weight"] = (3072, 4096)
            shapes[f"{prefix}.mlp.{block}.down_proj.weight"] = (4096, 3072)
    return config, _bfloat16(shapes)


def _attention(prefix: str, hidden: int, queries: int, keys: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
        f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
    }


def _bfloat16(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def check(folder: Path, ranks=(1, 8), tensor: int = 1, **settings: Any) -> dict[str, Any]:
    found = report.check(folder, ranks, tensor, "auto", (79.0,), **settings)
    assert json.loads(json.dumps(found)) == found
    return found


@pytest.fixture(scope="module")
def granite(tmp_path_factory) -> dict[str, Any]:
    return check(write_sparse(tmp_path_factory.mktemp("granite"), *granite_3b()))


def test_granite_has_its_published_size_and_its_stacked_experts_are_experts(granite):
    assert granite["runs"], granite["problems"]
    parameters = granite["parameters"]
    assert parameters["total"] / 1e9 == pytest.approx(3.3, abs=0.05)
    assert parameters["active"] / 1e9 == pytest.approx(0.88, abs=0.05)
    experts, router = 32 * 40 * 3 * 512 * 1536, 32 * 40 * 1536
    assert parameters["parts"] == {"experts": experts, "shared experts": 0, "router": router}
    assert granite["stored"]["parts"]["experts"] == {"BF16": 2 * experts}
    assert granite["stored"]["parts"]["router"] == {"BF16": 2 * router}
    assert "shared, dense" not in granite["stored"]["parts"]
    one, eight = (row["bytes"] for row in granite["ranks"])
    assert one["experts"] == 8 * eight["experts"] == 2 * experts
    assert one["router"] == eight["router"] == 2 * router


def test_hunyuan_has_its_published_size_and_a_shared_expert(tmp_path):
    found = check(write_sparse(tmp_path, *hunyuan_a13b()), (8,))
    assert found["runs"], found["problems"]
    assert found["parameters"]["total"] / 1e9 == pytest.approx(80.4, abs=0.05)
    assert found["parameters"]["active"] / 1e9 == pytest.approx(13.0, abs=0.5)
    one = 3 * 3072 * 4096
    assert found["parameters"]["parts"] == {
        "experts": 32 * 64 * one,
        "shared experts": 32 * one,
        "router": 32 * 64 * 4096,
    }
    assert found["ranks"][0]["bytes"]["experts"] == 2 * 32 * 8 * one


def test_the_report_says_who_builds_the_model_and_whose_router_chooses(granite):
    text = "\n".join(lines_of(granite))
    assert "family      GraniteMoeForCausalLM of transformers\n" in text
    assert "built by    transformers (model.implementation auto)\n" in text
    assert "40 routed of width 512, top-8, chosen by transformers' router\n" in text
    assert "no shared expert\n" not in text
    assert "shared expert balanced: no: transformers runs shared experts" in text


def test_a_family_here_is_built_by_whom_the_option_says(tmp_path):
    folder = write_sparse(tmp_path, *mixtral_8x7b())
    ours, theirs = (check(folder, (8,), implementation=who) for who in ("auto", "transformers"))
    assert ours["implementation"] == {"setting": "auto", "as": "lockstep"}
    assert theirs["implementation"] == {"setting": "transformers", "as": "transformers"}
    assert ours["runs"] and theirs["runs"], theirs["problems"]
    assert ours["parameters"] == theirs["parameters"]
    assert ours["ranks"][0]["bytes"] == theirs["ranks"][0]["bytes"]
    assert ours["stored"] == theirs["stored"]


def test_what_only_transformers_builds_does_not_run_by_this_engine_alone(tmp_path):
    folder = write_sparse(tmp_path, *granite_3b())
    found = check(folder, implementation="lockstep")
    assert not found["runs"]
    assert "model_type = 'granitemoe', which this engine cannot run" in found["problems"][0]
    assert "set model.implementation to auto" in found["problems"][0]


def test_tensor_ranks_are_refused_for_what_transformers_builds(tmp_path):
    found = check(write_sparse(tmp_path, *granite_3b()), (8,), 2)
    assert not found["runs"]
    assert "parallel.tensor = 2: must be 1 where transformers builds" in found["problems"][0]


def test_a_missing_tensor_of_experts_is_named(tmp_path):
    config, tensors = granite_3b()
    name = "model.layers.3.block_sparse_moe.output_linear.weight"
    del tensors[name]
    found = check(write_sparse(tmp_path, config, tensors), (8,))
    assert not found["runs"] and "1 tensors are missing" in found["problems"][0]
    assert "model.layers.3.block_sparse_moe.experts" in found["problems"][0]
