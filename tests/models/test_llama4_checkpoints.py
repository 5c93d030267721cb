"""Llama 4 as it is published, with images: the text model against transformers.

python -m pytest tests/models/test_llama4_checkpoints.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.loader import config_from_tree
from engine.layers.attention import AttentionSpec
from engine.llm import LLM
from engine.models.registry import model_length, read_config, read_spec
from engine.models.spec import DenseSpec, LayerSpec, SparseSpec
from engine.moe.router import gate_logits, route
from engine.request import SamplingParams
from tests.helpers.model_cases import CASES, NEW_TOKENS, redraw
from tests.helpers.model_harness import chunked, logits_on_this_rank, one_by_one, whole
from tests.helpers.ranks import run_ranks

SCHEDULES = {"whole": whole, "chunked": chunked, "one by one": one_by_one}
# What the published config.json of Scout has beside the defaults of transformers.
SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "image_token_index": 200092,
    "model_type": "llama4",
    "text_config": {
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": 4,
        "eos_token_id": [200001, 200007, 200008],
        "floor_scale": 8192,
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"model_type": "llama4_vision_model"},
}


def write(folder: Path, **settings: Any) -> Path:
    values = SCOUT | {"text_config": {**SCOUT["text_config"], **settings}}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def attention_of(layer: LayerSpec) -> AttentionSpec:
    assert isinstance(layer.attention, AttentionSpec)
    return layer.attention


def test_the_published_configurations_are_understood(tmp_path):
    config = read_config(write(tmp_path))
    spec = read_spec(config)
    assert config.dtype == torch.bfloat16 and model_length(config, None) == 10485760
    for index, layer in enumerate(spec.layers):
        attention, mlp, turned = attention_of(layer), layer.mlp, (index + 1) % 4 != 0
        assert (attention.rotary, attention.chunk) == (turned, 8192 if turned else None)
        assert attention.qk_norm == ("unit" if turned else "none")
        assert (attention.query_scale is None) == turned
        assert isinstance(mlp, SparseSpec) and mlp.shared == DenseSpec(ffn=8192)
        assert mlp.moe.router.weights_on_input and mlp.moe.router.num_experts == 16
    maverick = {"interleave_moe_layer_step": 2, "use_qk_norm": False, "rope_scaling": None}
    layers = read_spec(read_config(write(tmp_path, **maverick))).layers
    assert [isinstance(layer.mlp, SparseSpec) for layer in layers] == [False, True] * 24
    assert layers[0].mlp == DenseSpec(ffn=16384) and attention_of(layers[0]).qk_norm == "none"
    assert attention_of(layers[3]).query_scale is not None


@pytest.mark.parametrize("inner", [..., None, [], "x"])
def test_a_text_model_that_is_no_object_is_refused(tmp_path, inner):
    values = {name: value for name, value in SCOUT.items() if name != "text_config"}
    values |= {} if inner is ... else {"text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"text_config = .* in config\.json: must be an object"):
        read_config(tmp_path)


def test_a_wrong_field_of_the_text_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"attention_chunk_size = 0 in config\.json: must be"):
        read_config(write(tmp_path, attention_chunk_size=0))
    with pytest.raises(ValueError, match=r"model_type = 'llama5'"):
        (tmp_path / "config.json").write_text(json.dumps(SCOUT | {"model_type": "llama5"}))
        read_config(tmp_path)


@torch.inference_mode()
def test_where_sigmoids_tie_the_expert_is_that_of_transformers():
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    spec = read_spec(config := CASES["llama4"].config()).layers[1].mlp
    assert isinstance(spec, SparseSpec)
    generator, gate = torch.Generator().manual_seed(2), Llama4Router(config)
    gate.weight.copy_(20 * torch.randn(gate.weight.shape, generator=generator))
    x = torch.randn(50, gate.weight.shape[1], generator=generator)
    expected, logits = gate(x)
    largest = logits.topk(2).values.sigmoid()
    assert (largest[:, 0] == largest[:, 1]).sum() > 9, "nothing ties"
    routing = route(gate_logits(x, gate.weight, spec.moe.router), spec.moe.router)
    got = torch.zeros_like(expected).scatter_(1, routing.topk_ids_TK, routing.topk_weights_TK)
    torch.testing.assert_close(got, expected)


@pytest.fixture(scope="module")
def with_images(tmp_path_factory) -> tuple[Path, list[list[int]], list[torch.Tensor]]:
    """A checkpoint with a vision model, sequences and transformers' logits."""
    import transformers

    path, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(1)
    text = CASES["llama4"].config()
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 64, "image_size": 28, "patch_size": 14}
    vision |= {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    model = transformers.Llama4ForConditionalGeneration(config)
    redraw(model, generator)
    model.eval().save_pretrained(path)
    model.set_attn_implementation("eager")
    sequences = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in (15, 4, 9)]
    with torch.inference_mode():
        logits = [model(torch.tensor([each]), use_cache=False).logits[0] for each in sequences]
    return path, sequences, logits


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_with_images_gives_the_logits_of_transformers(with_images, world):
    path, sequences, expected = with_images
    names = load_file(path / "model.safetensors")
    assert "language_model.model.layers.1.feed_forward.experts.gate_up_proj" in names
    assert "language_model.lm_head.weight" in names
    assert any(name.startswith("vision_model.") for name in names)
    schedules = {name: make([len(each) for each in sequences]) for name, make in SCHEDULES.items()}
    found = run_ranks(logits_on_this_rank, world, path, sequences, schedules, {}, NEW_TOKENS)
    for key in found[0]:
        together = {s: logits for rank in found for s, logits in rank[key].items()}
        assert sorted(together) == list(range(len(sequences)))
        for s, logits in together.items():
            wanted = expected[s][-len(logits) :]
            assert (logits - wanted).abs().max() < 2e-5 * wanted.abs().max()


def part_experts(source: Path, folder: Path) -> Path:
    """Copy a checkpoint, its experts one by one as in those that others have quantised."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors, parted = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        base, experts, last = name.rpartition(".experts.")
        for expert, matrix in enumerate(tensor.mT if experts else ()):
            parts = {"down_proj": matrix}
            if last == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            for part, rows in parts.items():
                parted[f"{base}.experts.{expert}.{part}.weight"] = rows.contiguous()
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    save_file(tensors | parted, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def completions(path: Path, quantization: str) -> list[Any]:
    llm = LLM(
        config_from_tree(
            {
                "model": {"path": str(path), "dtype": "float32", "quantization": quantization},
                "scheduler": {"kv_cache_blocks": 32, "block_size": 4},
                "runtime": {"device": "cpu"},
            }
        )
    )
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=True)
    done = llm.generate([[5, 60, 7, 90, 12], [3, 1, 4, 1, 5, 9, 2, 6, 53]], params)
    llm.close()
    return [(each.token_ids, each.logprobs) for each in done]


def test_experts_stacked_or_one_by_one_are_the_same_also_as_integers(with_images, tmp_path):
    stacked, _, _ = with_images
    parted = part_experts(stacked, tmp_path)
    found = {held: completions(parted, held) for held in ("auto", "int8")}
    assert found["auto"] == completions(stacked, "auto")
    assert found["int8"] == completions(stacked, "int8")
    assert found["int8"] != found["auto"]
