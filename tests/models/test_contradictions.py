"""Checkpoints whose config.json and files contradict each other, or say the same twice.

transformers loads each of them; its logits are the reference.

    python -m pytest tests/models/test_contradictions.py
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.models.registry import build_model, read_config
from engine.weights.loader import CheckpointError, fill_dummy
from tests.helpers.model_cases import CASES, Case, make_reference
from tests.helpers.model_harness import (
    load_model,
    logits_on_this_rank,
    make_config,
    run_schedule,
    whole,
)
from tests.helpers.ranks import run_ranks

TIED = "qwen3-moe-bias-dense-layer-window-tied"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SEQUENCES = [[5, 3, 90, 17, 44, 8], [71], [2, 2, 60]]
Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    topology = bootstrap.start(make_config(Path("unused")), {})
    yield topology
    bootstrap.stop(topology)


def write(folder: Path, case: str | Case, edit: Edit, **settings: Any) -> Path:
    """Write a case's checkpoint with changed tensors and fields of config.json."""
    make_reference(CASES[case] if isinstance(case, str) else case, folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reference(folder: Path) -> list[torch.Tensor]:
    """transformers' logits of `SEQUENCES`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return [model(torch.tensor([tokens]), use_cache=False).logits[0] for tokens in SEQUENCES]


def check(folder: Path, logits: dict[int, torch.Tensor]) -> None:
    for s, expected in enumerate(reference(folder)):
        assert (logits[s] - expected).abs().max() < 2e-5 * expected.abs().max()


def run(folder: Path, topology: Topology) -> dict[int, torch.Tensor]:
    model = load_model(make_config(folder), topology)
    return run_schedule(model, topology, SEQUENCES, whole([len(each) for each in SEQUENCES]))


def own_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = torch.randn(
        tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(9)
    )


def last_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] += 40.0


def same_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def only_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors


@pytest.mark.parametrize("case", [TIED, "mixtral-window-head-dim-tied"])
@pytest.mark.parametrize("edit", [own_head, last_value])
def test_a_tied_head_that_differs_in_the_files_is_the_one_used(
    tmp_path, one_rank, caplog, case, edit
):
    write(tmp_path, case, edit)
    with caplog.at_level(logging.WARNING, "engine"):
        check(tmp_path, run(tmp_path, one_rank))
    (line,) = [each.message for each in caplog.records if each.name.startswith("engine.")]
    assert HEAD in line and EMBEDDING in line and "tie_word_embeddings" in line


@pytest.mark.parametrize("edit", [same_head, only_head, nothing])
def test_a_tied_head_is_found_under_either_name_and_takes_no_memory(tmp_path, one_rank, edit):
    write(tmp_path, TIED, edit)
    check(tmp_path, run(tmp_path, one_rank))
    model = load_model(make_config(tmp_path), one_rank)
    assert model.head_VD is model.embedding_VD


def test_an_untied_config_uses_a_head_that_equals_the_embedding(tmp_path, one_rank):
    write(tmp_path, TIED, same_head, tie_word_embeddings=False)
    check(tmp_path, run(tmp_path, one_rank))


def logits_and_log(rank: int, folder: Path, *args: Any) -> tuple[Any, list[str]]:
    """`logits_on_this_rank`, and what was logged meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("engine").addHandler(handler)
    return logits_on_this_rank(rank, folder, *args), lines


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["expert", "tensor"])
@pytest.mark.parametrize(
    ("edit", "lines"), [(own_head, 1), (last_value, 1), (same_head, 0), (only_head, 0)]
)
def test_two_ranks_agree_on_the_head_and_rank_0_says_so(tmp_path, edit, lines, parallel):
    write(tmp_path, TIED, edit)
    schedules = {"whole": whole([len(each) for each in SEQUENCES])}
    found = run_ranks(logits_and_log, 2, tmp_path, SEQUENCES, schedules, parallel, 1)
    logits, logged = zip(*found, strict=True)
    check(tmp_path, logits[0]["whole", None] | logits[1]["whole", None])
    said = [sum(f"using the files' {HEAD}" in line for line in each) for each in logged]
    assert said == [lines, 0]


def test_random_weights_of_a_tied_model_have_one_tensor_for_both(tmp_path, one_rank):
    write(tmp_path, TIED, own_head)
    config = make_config(tmp_path)
    model = build_model(read_config(tmp_path), config, one_rank, one_rank.device, torch.float32)
    fill_dummy(model.weight_slots(), seed=1)
    assert model.head_VD is model.embedding_VD


def buffers(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(64, 16),
        "model.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.original_inv_freq": torch.ones(8),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "model.layers.0.self_attn._extra_state": torch.zeros(40, dtype=torch.uint8),
        "model.layers.1.self_attn._extra_state": torch.zeros(0),
        "model.position_ids": torch.arange(64)[None],
        "model.layers.0.mlp.tokens_per_expert": torch.arange(6),
    }


@pytest.mark.parametrize("case", ["mixtral", "deepseek-v3", "qwen3-moe"])
def test_buffers_and_tensors_without_values_are_left_unread(tmp_path, one_rank, case):
    check(write(tmp_path, case, buffers), run(tmp_path, one_rank))


def without_shared_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".shared_expert" in name]:
        del tensors[name]


@pytest.mark.parametrize("edit", [nothing, without_shared_expert])
def test_a_shared_expert_of_size_0_adds_nothing(tmp_path, one_rank, edit):
    common = CASES["qwen2-moe"].settings | {"shared_expert_intermediate_size": 0}
    check(write(tmp_path, Case("Qwen2Moe", common), edit), run(tmp_path, one_rank))


def test_no_shared_experts_of_deepseek_add_nothing(tmp_path, one_rank):
    common = CASES["deepseek-v3"].settings | {"n_shared_experts": 0}
    check(write(tmp_path, Case("DeepseekV3", common), nothing), run(tmp_path, one_rank))


@pytest.mark.parametrize("case", ["deepseek-v2-lite", "deepseek-v3"])
def test_a_decoder_layer_that_config_json_does_not_count_is_not_taken_for_a_prediction_head(
    tmp_path, one_rank, case
):
    write(tmp_path, case, nothing, num_hidden_layers=1)
    with pytest.raises(
        CheckpointError, match=r"belong to no part of the model.*model\.layers\.1\."
    ):
        load_model(make_config(tmp_path), one_rank)


def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize("case", [TIED, "mixtral", "deepseek-v2-lite"])
def test_names_without_the_prefix_of_the_base_model_are_read(tmp_path, one_rank, case):
    check(write(tmp_path, case, without_prefix), run(tmp_path, one_rank))


def test_stacked_experts_without_the_prefix_of_the_base_model_are_read(tmp_path, one_rank):
    make_reference(CASES["qwen2-moe"], tmp_path, save_original_format=False)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    without_prefix(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    check(tmp_path, run(tmp_path, one_rank))


def test_layers_that_moe_layer_freq_lists_are_routed(tmp_path, one_rank):
    check(write(tmp_path, "deepseek-v3", nothing, moe_layer_freq=[0, 1]), run(tmp_path, one_rank))


def two_heads(tensors: dict[str, torch.Tensor]) -> None:
    for layer in (2, 3):
        tensors[f"model.layers.{layer}.eh_proj.weight"] = torch.full((32, 64), float("nan"))
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(32)


def test_several_multi_token_prediction_layers_are_left_unread(tmp_path, one_rank):
    write(tmp_path, "deepseek-v3", two_heads, num_nextn_predict_layers=2)
    load_model(make_config(tmp_path), one_rank)
