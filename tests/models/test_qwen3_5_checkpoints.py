"""Qwen3.5 as it is published: the language model of a checkpoint that sees images.

Its tensors lie under model.language_model, its fields under text_config; a tower for images and
heads for multi-token prediction lie beside it and are not read. Against transformers' model with
all its parts, on text.

    python -m pytest tests/models/test_qwen3_5_checkpoints.py
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.loader import config_from_tree
from engine.generation.detokenizer import load_eos_token_ids
from engine.llm import LLM
from engine.models.registry import read_config, read_spec
from engine.request import SamplingParams
from tests.helpers.model_cases import NEW_TOKENS, Reference, make_reference, qwen3_5_with_images
from tests.helpers.model_harness import chunked, logits_on_this_rank, whole
from tests.helpers.ranks import run_ranks


def write(folder: Path, **save: Any) -> Reference:
    """A checkpoint whose tensors that are not to be read hold no numbers."""
    reference = make_reference(qwen3_5_with_images(), folder, **save)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.visual.")]:
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    tensors["mtp.fc.weight"] = torch.full((32, 64), float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return reference


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return write(tmp_path_factory.mktemp("published"))


def check(reference: Reference, world: int) -> None:
    sequences = [tokens[:-1] for tokens in reference.sequences]
    lengths = [len(tokens) for tokens in sequences]
    schedules = {"whole": whole(lengths), "chunked": chunked(lengths)}
    found = run_ranks(
        logits_on_this_rank, world, reference.path, sequences, schedules, {}, NEW_TOKENS
    )
    for name in found[0]:
        together = {s: logits for rank in found for s, logits in rank[name].items()}
        for s, expected in enumerate(reference.logits):
            want = expected[-len(together[s]) :]
            assert (together[s] - want).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_language_model_gives_the_logits_of_the_whole(published: Reference, world: int):
    names = load_file(published.path / "model.safetensors").keys()
    assert {name.split(".")[1] for name in names} >= {"visual", "language_model"}
    check(published, world)


def test_experts_stacked_as_they_are_published_load_as_well(tmp_path: Path):
    reference = write(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in names
    check(reference, 2)


def test_a_job_says_that_images_are_not_read(published: Reference, caplog):
    config = {
        "model": {"path": str(published.path)},
        "scheduler": {"kv_cache_blocks": 16, "block_size": 4},
        "runtime": {"device": "cpu", "threads": 1},
    }
    with caplog.at_level(logging.WARNING, "engine.llm"):
        llm = LLM(config_from_tree(config))
    prompts = [tokens[:-NEW_TOKENS] for tokens in published.sequences]
    done = llm.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    llm.close()
    assert [each.token_ids for each in done] == [
        tokens[-NEW_TOKENS:] for tokens in published.sequences
    ]
    (line,) = (record.message for record in caplog.records if "images" in record.message)
    assert str(published.path) in line and "language model alone is read" in line


def altered(published: Reference, folder: Path, text: dict[str, Any], **settings: Any) -> Path:
    values = json.loads((published.path / "config.json").read_text()) | settings
    values["text_config"] = values["text_config"] and values["text_config"] | text
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_fields_beside_the_language_model_count(published: Reference, tmp_path: Path):
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = altered(published, tmp_path, {}, quantization_config=scheme, tie_word_embeddings=True)
    config = read_config(folder)
    assert config.quantization_config == scheme and read_spec(config).tied_embeddings
    assert config.model_type == "qwen3_5_moe_text" and config.hidden_size == 32


def test_the_end_of_text_of_the_language_model_counts(published: Reference, tmp_path: Path):
    assert load_eos_token_ids(altered(published, tmp_path, {"eos_token_id": [7, 8]})) == {7, 8}


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ({}, {"text_config": None}, "text_config = null in config.json: must be an object"),
        ({"hidden_size": "32"}, {}, "hidden_size = '32' in config.json: must be a whole number"),
        ({"linear_num_value_heads": 3}, {}, "must be a multiple of linear_num_key_heads = 2"),
        ({"linear_conv_kernel_dim": 1}, {}, "linear_conv_kernel_dim = 1 in config.json: must be"),
        ({"layer_types": ["linear_attention"] * 4}, {}, "layer_types = .*at least one the latter"),
        ({"layer_types": ["full_attention"] * 3}, {}, "layer_types"),
    ],
)
def test_a_wrong_field_is_refused_by_name(
    published: Reference, tmp_path: Path, text, settings, message
):
    with pytest.raises(ValueError, match=message):
        read_config(altered(published, tmp_path, text, **settings))
