"""What the model check says of published models, from real headers without data.

Run: pytest tests/unit/model_check/test_report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.model_check import report
from engine.model_check.text import lines_of
from tests.helpers.sparse_checkpoint import (
    deepseek_v3,
    mixtral_8x7b,
    olmoe_7b,
    qwen3_235b,
    write_header,
    write_sparse,
)

GIB = 1 << 30
RANKS = (1, 2, 4, 8, 16)


def check(folder: Path, ranks=RANKS, tensor: int = 1, dtype: str = "auto") -> dict[str, Any]:
    found = report.check(folder, ranks, tensor, dtype, (79.0, 139.0))
    assert json.loads(json.dumps(found)) == found
    return found


@pytest.fixture(scope="module")
def v3(tmp_path_factory) -> dict[str, Any]:
    """What is said of DeepSeek-V3 in bfloat16."""
    config, tensors = deepseek_v3(fp8=False)
    return check(write_sparse(tmp_path_factory.mktemp("v3"), config, tensors, shards=3))


def rows(found: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {row["ranks"]: row for row in found["ranks"]}


def check_sizes(
    found: dict[str, Any], total: float, active: float, kv_bytes: int, float32_gates: int = 0
) -> None:
    """total, active (with the embedding): parameters in 1e9; kv_bytes: per token; float32_gates:
    numbers of gates that the files have in 16 bits.
    """
    assert found["runs"] and not found["problems"]
    assert found["parameters"]["total"] / 1e9 == pytest.approx(total, abs=0.05)
    assert found["parameters"]["active_with_embedding"] / 1e9 == pytest.approx(active, abs=0.05)
    assert found["stored"]["files"] == 3 and not found["stored"]["unused"]
    whole = rows(found)[1]
    assert whole["kv_bytes_per_token"] == kv_bytes
    # In the checkpoint's own dtype a rank alone holds what the files hold.
    assert whole["bytes"]["total"] == whole["stored_bytes"] + 2 * float32_gates
    assert whole["stored_bytes"] == pytest.approx(2 * found["parameters"]["total"], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "total", "active", "kv_bytes"),
    [
        # 2 x kv heads x head dim x layers x 2 bytes.
        (mixtral_8x7b, 46.7, 12.9, 2 * 8 * 128 * 32 * 2),
        (qwen3_235b, 235.1, 22.2, 2 * 4 * 128 * 94 * 2),
        (olmoe_7b, 6.9, 1.3, 2 * 16 * 128 * 16 * 2),
    ],
    ids=["mixtral", "qwen3", "olmoe"],
)
def test_published_models_run_with_their_published_sizes(tmp_path, model, total, active, kv_bytes):
    check_sizes(check(write_sparse(tmp_path, *model(), shards=3)), total, active, kv_bytes)


def test_of_longcat_flash_zero_experts_take_their_share_of_a_tokens_choices(tmp_path):
    # The defaults of transformers' class are the published model's.
    config = {"model_type": "longcat_flash", "dtype": "bfloat16", "zero_expert_type": "identity"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = check(tmp_path, (16,))
    assert found["parameters"]["total"] / 1e9 == pytest.approx(560.7, abs=0.05)
    # 8 of 12 choices are experts.
    assert found["parameters"]["active_with_embedding"] / 1e9 == pytest.approx(28.0, abs=0.05)
    assert rows(found)[16]["kv_bytes_per_token"] == (512 + 64) * 56 * 2
    assert found["capacity"]["dropless_factor"] == {"expert": 64, "rank": 24}
    text = "\n".join(lines_of(found))
    assert "512 routed of width 2048 and 256 zero experts, top-12" in text
    # What the number is, and over what the softmax runs, say the zero experts too.
    assert "drops nothing from gamma 64 ((E + Z)/K, zero experts included) on" in text
    assert "router score: softmax over all 512 experts and 256 zero experts; without" in text


def test_deepseek_v3_has_its_published_size_and_caches_a_latent(v3):
    check_sizes(v3, 671.0, 37.6, (512 + 64) * 61 * 2, float32_gates=58 * 256 * 7168)


def test_experts_are_split_and_the_rest_is_on_every_rank(tmp_path):
    found = rows(check(write_sparse(tmp_path, *mixtral_8x7b())))
    one, eight = found[1]["bytes"], found[8]["bytes"]
    assert one["experts"] == 2 * 32 * 8 * 3 * 4096 * 14336 == 8 * eight["experts"]
    assert one["attention"] == eight["attention"] == 2 * 32 * 4096 * (2 * 4096 + 2 * 1024)
    assert one["embedding, head"] == eight["embedding, head"] == 2 * 2 * 32000 * 4096
    assert one["norms"] == 2 * (2 * 32 + 1) * 4096
    assert "8 experts" in found[16]["problem"]  # more ranks than experts


def test_with_uneven_experts_the_rank_that_holds_most_counts(tmp_path):
    found = rows(check(write_sparse(tmp_path, *olmoe_7b()), ranks=(12,)))[12]
    assert found["experts"] == [5, 6]
    assert found["bytes"]["experts"] == 2 * 16 * 6 * 3 * 2048 * 1024


def test_tensor_ranks_split_attention_and_the_cache(tmp_path):
    folder = write_sparse(tmp_path, *mixtral_8x7b())
    alone, two = (rows(check(folder, (8,), tensor))[8] for tensor in (1, 2))
    assert alone["bytes"]["attention"] == 2 * two["bytes"]["attention"]
    assert alone["kv_bytes_per_token"] == 2 * two["kv_bytes_per_token"]
    refused = check(folder, (8,), 3)
    assert not refused["runs"] and "parallel.tensor = 3" in refused["problems"][0]


def test_another_dtype_changes_what_a_rank_holds_and_not_what_is_stored(tmp_path):
    folder = write_sparse(tmp_path, *olmoe_7b())
    own, wide = (rows(check(folder, (4,), dtype=dtype))[4] for dtype in ("auto", "float32"))
    assert wide["bytes"]["total"] == 2 * own["bytes"]["total"]
    assert wide["stored_bytes"] == own["stored_bytes"] == own["bytes"]["total"]
    assert wide["kv_bytes_per_token"] == 2 * own["kv_bytes_per_token"]


def test_the_cache_has_what_weights_and_rows_leave_of_a_gpu(tmp_path):
    found = rows(check(write_sparse(tmp_path, *mixtral_8x7b())))
    assert found[1]["kv_tokens"]["79"] == 0  # 87 GiB of weights
    row = found[2]
    free = (79 * GIB - row["bytes"]["total"]) * 0.92 - row["row_bytes"]
    assert row["kv_tokens"]["79"] == free // row["kv_bytes_per_token"] > 100_000
    assert row["kv_tokens"]["79"] < row["kv_tokens"]["139"]


def test_multi_token_prediction_is_ignored_and_what_nothing_knows_is_named(tmp_path):
    config, tensors = deepseek_v3(fp8=False, layers=4)
    tensors["model.layers.7.mlp.adapter.weight"] = ("BF16", (4, 4))
    found = check(write_sparse(tmp_path, config, tensors), (16,))
    assert found["stored"]["ignored"] == sum("layers.4." in name for name in tensors)
    assert found["stored"]["unused"] == ["model.layers.7.mlp.adapter.weight"]
    assert not found["runs"] and "belong to no part" in found["problems"][0]


def test_a_missing_tensor_is_named(tmp_path):
    config, tensors = mixtral_8x7b()
    del tensors["model.layers.3.block_sparse_moe.experts.5.w2.weight"]
    found = check(write_sparse(tmp_path, config, tensors), (8,))
    assert not found["runs"]
    assert "1 tensors are missing" in found["problems"][0]
    assert "model.layers.3.block_sparse_moe.experts.5.w2.weight" in found["problems"][0]


def test_the_stored_format_is_given_by_part_and_scales_go_with_their_weights(tmp_path):
    config, tensors = deepseek_v3(fp8=True, layers=5)
    folder = write_sparse(tmp_path, config, tensors, shards=4)
    found = report.check(folder, (16,), 1, "auto", (79.0,), "keep")
    assert found["quantization"] == "fp8, fmt e4m3, weight_block_size [128, 128]"
    experts = found["stored"]["parts"]["experts"]
    assert experts["F8_E4M3"] == 2 * 256 * 3 * 7168 * 2048
    assert experts["F32"] == 2 * 256 * 3 * 56 * 16 * 4
    assert found["stored"]["parts"]["router"]["F32"] == 2 * 256 * 4
    assert not found["stored"]["unused"]
    row = rows(found)[16]
    # Experts are held as they are stored, attention and what is dense in bfloat16.
    assert 1 < row["bytes"]["experts"] * 16 / experts["F8_E4M3"] < 1.01
    assert row["stored_bytes"] < 0.8 * row["bytes"]["total"]


def test_packed_weights_of_a_format_that_is_refused_are_neither_missing_nor_unused(tmp_path):
    config, tensors = olmoe_7b()
    config["quantization_config"] = {"quant_method": "no-such-method", "bits": 4}
    for name in [name for name in tensors if ".experts." in name]:
        _, (rows_, columns) = tensors.pop(name)
        tensors[f"{name}_packed"] = ("I32", (rows_, columns // 8))
        tensors[f"{name}_scale"] = ("BF16", (rows_, columns // 32))
        tensors[f"{name}_shape"] = ("I32", (2,))
    found = check(write_sparse(tmp_path, config, tensors), (8,))
    assert [problem.split()[0] for problem in found["problems"]] == ["quantization_config"]
    assert found["quantization"] == "no-such-method, bits 4" and not found["stored"]["unused"]
    assert found["stored"]["parts"]["experts"]["I32"] == 16 * 64 * (3 * 2048 * 1024 // 2 + 3 * 8)


def test_all_that_is_wrong_with_a_config_is_told_at_once(tmp_path):
    config, tensors = mixtral_8x7b()
    config |= {
        "hidden_act": "gelu",
        "is_causal": False,
        "rope_scaling": {"rope_type": "linear", "factor": -1.0},
    }
    found = check(write_sparse(tmp_path, config, tensors), (8,))
    assert not found["runs"]
    for field in ("hidden_act", "is_causal", "rope_scaling"):
        assert any(problem.startswith(field) for problem in found["problems"]), found["problems"]
    assert len(found["problems"]) == 3
    assert found["parameters"]["total"] / 1e9 == pytest.approx(46.7, abs=0.05)  # shapes are known


def test_an_unknown_model_type_is_told_with_what_else_the_model_has(tmp_path):
    config, tensors = mixtral_8x7b()
    config |= {
        "model_type": "other_moe",
        "hidden_act": "mish",
        "layer_types": ["full_attention", "linear_attention"] * 16,
        "rope_scaling": {"rope_type": "spiral"},
        "scoring_func": "tanh",
        "vision_config": {"depth": 3},
    }
    found = check(write_sparse(tmp_path, config, tensors), (8,))
    assert not found["runs"] and "ranks" not in found
    assert "model_type = 'other_moe'" in found["problems"][0]
    assert "mixtral" in found["problems"][0]
    others = "\n".join(found["problems"][1:])
    for what in ("vision_config", "'mish'", "linear_attention", "'spiral'", "'tanh'"):
        assert what in others, what
    assert found["stored"]["parts"]["experts"]["BF16"] == 2 * 32 * 8 * 3 * 4096 * 14336


@pytest.mark.parametrize("value", [5, [], {}, "x", None, [[]], {"a": {}}, True])
def test_an_unknown_model_type_with_any_values_is_a_report(tmp_path, value):
    config, tensors = mixtral_8x7b()
    names = (
        "layer_types", "rope_parameters", "rope_scaling", "partial_rotary_factor", "scoring_func",
        "hidden_act", "quantization_config", "text_config", "num_experts_per_tok", "model_type",
    )  # fmt: skip
    config = dict.fromkeys(names, value)
    assert not check(write_sparse(tmp_path, config, tensors), (8,))["runs"]


def test_capacity_drops_nothing_from_experts_over_top_k_on(v3):
    capacity = v3["capacity"]
    assert capacity["ranks"] == 16
    # In scope rank: all T tokens choose K of the 16 experts of one rank of 16.
    assert capacity["dropless_factor"] == {"expert": 32.0, "rank": 16.0}
    assert "extras may be of any group" in capacity["expanded_drop"]
    assert capacity["shared_expert"].startswith("yes")


def test_what_capacity_cannot_do_is_told(tmp_path):
    config, tensors = mixtral_8x7b()
    config["num_experts_per_tok"] = 8
    capacity = check(write_sparse(tmp_path, config, tensors), (1,))["capacity"]
    assert capacity["dropless_factor"] == {"expert": 1.0, "rank": 1.0}
    assert capacity["expanded_drop"].startswith("no: ")
    assert capacity["copies"].startswith("no: ")
    assert capacity["shared_expert"].startswith("no: ")


def test_tokenizer_and_template_are_told(tmp_path):
    folder = write_sparse(tmp_path, *olmoe_7b())
    found = check(folder, (1,))
    assert found["tokenizer"] == {"files": [], "chat_template": False}
    assert "no tokenizer" in found["remarks"][0]
    (folder / "tokenizer.json").write_text('{"model": {}, "added_tokens": []}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    found = check(folder, (1,))
    assert found["tokenizer"]["chat_template"] and not found["remarks"] and found["runs"]
    (folder / "tokenizer.json").write_text("{")
    found = check(folder, (1,))
    assert not found["runs"] and "tokenizer.json is not valid JSON" in found["problems"][0]


def test_a_garbage_header_is_a_problem_and_the_shapes_are_still_told(tmp_path):
    folder = write_sparse(tmp_path, *olmoe_7b())
    for garbage in (b"", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x01" + b"\0" * 7 + b"{"):
        (folder / "model.safetensors").write_bytes(garbage)
        found = check(folder, (1,))
        assert not found["runs"] and len(found["problems"]) == 1
        assert "model.safetensors" in found["problems"][0]
        assert found["parameters"]["total"] > 6e9


def test_missing_shards_and_an_index_of_missing_files_are_problems(tmp_path):
    folder = write_sparse(tmp_path, *olmoe_7b(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    found = check(folder, (1,))
    assert not found["runs"] and "model-00002-of-00003.safetensors" in found["problems"][0]
    (folder / "model.safetensors.index.json").unlink()
    found = check(folder, (1,))
    assert not found["runs"] and "no model.safetensors.index.json" in found["problems"][0]


def test_a_shard_that_is_of_another_model_is_a_problem(tmp_path):
    folder = write_sparse(tmp_path, *olmoe_7b(), shards=2)
    write_header(folder / "model-00002-of-00002.safetensors", {"x": ("BF16", (2,))})
    found = check(folder, (1,))
    assert not found["runs"] and "which does not hold it" in " ".join(found["problems"])


def test_config_json_alone_tells_the_shapes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(qwen3_235b()[0]))
    found = check(tmp_path)
    assert not found["runs"] and "neither model.safetensors nor" in found["problems"][0]
    assert rows(found)[8]["bytes"]["total"] / GIB == pytest.approx(67.77, abs=0.01)


def test_gpt_oss_has_windows_in_half_of_its_layers_and_copies_in_its_own_precision(tmp_path):
    from transformers import GptOssConfig

    config = GptOssConfig(num_hidden_layers=4).to_dict() | {"model_type": "gpt_oss"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = check(tmp_path, (8,))
    assert (found["attention"]["window"], found["attention"]["window_layers"]) == (128, 2)
    assert "window 128 in 2 of 4 layers" in "\n".join(lines_of(found))
    assert found["capacity"]["copies"].startswith("yes, in the model's precision")


def test_llama4_has_chunks_in_its_rotary_layers_and_its_head_beside_the_embedding(tmp_path):
    text = {"num_hidden_layers": 4, "num_local_experts": 8, "tie_word_embeddings": False}
    config = {"model_type": "llama4", "text_config": text, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = check(tmp_path, (8,))
    assert found["family"] == "engine.models.families.llama4"
    assert "chunk 8192 in 3 of 4 layers" in "\n".join(lines_of(found))
    sizes = rows(found)[8]["bytes"]
    assert sizes["embedding, head"] == 2 * 202048 * 5120 * 2
    assert sizes["experts"] == 4 * 3 * 5120 * 8192 * 2


def test_shapes_beyond_any_memory_are_a_problem(tmp_path):
    config, tensors = olmoe_7b()
    config |= {"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1, "head_dim": 128}
    found = check(write_sparse(tmp_path, config, tensors), (1,))
    assert not found["runs"] and "beyond any memory" in found["problems"][0]


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"model_type": }'])
def test_a_folder_without_a_config_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        check(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        check(tmp_path / "none")
