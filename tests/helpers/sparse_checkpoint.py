"""Checkpoints of any size that take no room: real headers, and a hole in place of the data.

The names and shapes of the families are written out here, not taken from the engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype in the file, shape

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I32": 4, "U8": 1}


def write_sparse(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, shards: int = 1
) -> Path:
    """Write config.json and safetensors files of these tensors, in turn over the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    names = list(tensors)
    for number, file in enumerate(files):
        write_header(folder / file, {name: tensors[name] for name in names[number::shards]})
    if shards > 1:
        places = {name: files[number % shards] for number, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_header(path: Path, tensors: Tensors) -> None:
    """Write one file: its header, then nothing, as long as the data would be."""
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BYTES[dtype]
        offsets = [position, position + size]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position += size
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + position)


def mixtral_8x7b() -> tuple[dict[str, Any], Tensors]:
    """Return the published configuration and tensors: 46.7B parameters."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    }
    shapes: dict[str, tuple[int, ...]] = _ends(32000, 4096)
    for layer in range(32):
        prefix = f"model.layers.{layer}"
        shapes |= _gqa(prefix, 4096, 32, 8, 128)
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (8, 4096)
        for expert in range(8):
            name = f"{prefix}.block_sparse_moe.experts.{expert}"
            shapes |= _gated(name, 4096, 14336, ("w1", "w3", "w2"))
    return config, {name: ("BF16", shape) for name, shape in shapes.items()}


def qwen3_235b() -> tuple[dict[str, Any], Tensors]:
    """Return the published configuration and tensors of Qwen3-235B-A22B."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 1536,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    shapes = _ends(151936, 4096)
    for layer in range(94):
        prefix = f"model.layers.{layer}"
        shapes |= _gqa(prefix, 4096, 64, 4, 128)
        for letter in "qk":
            shapes[f"{prefix}.self_attn.{letter}_norm.weight"] = (128,)
        shapes[f"{prefix}.mlp.gate.weight"] = (128, 4096)
        for expert in range(128):
            shapes |= _gated(f"{prefix}.mlp.experts.{expert}", 4096, 1536)
    return config, {name: ("BF16", shape) for name, shape in shapes.items()}


def olmoe_7b() -> tuple[dict[str, Any], Tensors]:
    """Return the published configuration and tensors of OLMoE-1B-7B."""
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 50304,
    }
    shapes = _ends(50304, 2048)
    for layer in range(16):
        prefix = f"model.layers.{layer}"
        shapes |= _gqa(prefix, 2048, 16, 16, 128)
        for letter in "qk":
            shapes[f"{prefix}.self_attn.{letter}_norm.weight"] = (2048,)
        shapes[f"{prefix}.mlp.gate.weight"] = (64, 2048)
        for expert in range(64):
            shapes |= _gated(f"{prefix}.mlp.experts.{expert}", 2048, 1024)
    return config, {name: ("BF16", shape) for name, shape in shapes.items()}


def deepseek_v3(*, fp8: bool, layers: int = 61) -> tuple[dict[str, Any], Tensors]:
    """Return the published configuration and tensors: 671B, and a multi-token prediction layer.

    fp8: as published, with a scale per 128 x 128 block; otherwise bfloat16.
    layers: of the 61, from the first; 3 are dense.
    """
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }
    shapes = _ends(129280, 7168)
    for layer in range(layers + 1):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (7168,),
            f"{prefix}.post_attention_layernorm.weight": (7168,),
            f"{prefix}.self_attn.q_a_proj.weight": (1536, 7168),
            f"{prefix}.self_attn.q_a_layernorm.weight": (1536,),
            f"{prefix}.self_attn.q_b_proj.weight": (128 * 192, 1536),
            f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
            f"{prefix}.self_attn.kv_a_layernorm.weight": (512,),
            f"{prefix}.self_attn.kv_b_proj.weight": (128 * 256, 512),
            f"{prefix}.self_attn.o_proj.weight": (7168, 128 * 128),
        }
        if layer < 3:
            shapes |= _gated(f"{prefix}.mlp", 7168, 18432)
            continue
        shapes[f"{prefix}.mlp.gate.weight"] = (256, 7168)
        shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (256,)
        shapes |= _gated(f"{prefix}.mlp.shared_experts", 7168, 2048)
        for expert in range(256):
            shapes |= _gated(f"{prefix}.mlp.experts.{expert}", 7168, 2048)
    last = f"model.layers.{layers}"
    shapes |= {
        f"{last}.embed_tokens.weight": (129280, 7168),
        f"{last}.enorm.weight": (7168,),
        f"{last}.hnorm.weight": (7168,),
        f"{last}.eh_proj.weight": (7168, 2 * 7168),
        f"{last}.shared_head.norm.weight": (7168,),
        f"{last}.shared_head.head.weight": (129280, 7168),
    }
    tensors: Tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
    tensors |= {name: ("F32", shapes[name]) for name in shapes if name.endswith("correction_bias")}
    if not fp8:
        return config, tensors
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    for name, shape in shapes.items():
        if "_proj" in name and "eh_proj" not in name:
            rows, columns = shape
            tensors[name] = ("F8_E4M3", shape)
            tensors[f"{name}_scale_inv"] = ("F32", (-(-rows // 128), -(-columns // 128)))
    return config, tensors


def qwen3_5_35b() -> tuple[dict[str, Any], Tensors]:
    """Return configuration and tensors of Qwen3.5-35B-A3B, which sees images; of what does, and of
    multi-token prediction, one tensor each.
    """
    text = {
        "model_type": "qwen3_5_moe_text",
        "attention_bias": False,
        "dtype": "bfloat16",
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": 512,
        "vocab_size": 248320,
    }
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "image_token_id": 248056,
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": "qwen3_5_moe"},
    }
    shapes, wide = _ends(248320, 2048), {}
    for layer in range(40):
        prefix = f"model.layers.{layer}"
        if layer % 4 == 3:
            shapes |= _gqa(prefix, 2048, 16, 2, 256)
            shapes[f"{prefix}.self_attn.q_proj.weight"] = (2 * 16 * 256, 2048)
            for letter in "qk":
                shapes[f"{prefix}.self_attn.{letter}_norm.weight"] = (256,)
        else:
            linear = f"{prefix}.linear_attn"
            shapes |= {
                f"{prefix}.input_layernorm.weight": (2048,),
                f"{prefix}.post_attention_layernorm.weight": (2048,),
                f"{linear}.in_proj_qkv.weight": (2 * 2048 + 4096, 2048),
                f"{linear}.in_proj_z.weight": (4096, 2048),
                f"{linear}.in_proj_b.weight": (32, 2048),
                f"{linear}.in_proj_a.weight": (32, 2048),
                f"{linear}.conv1d.weight": (2 * 2048 + 4096, 1, 4),
                f"{linear}.norm.weight": (128,),
                f"{linear}.out_proj.weight": (2048, 4096),
            }
            wide |= {f"{linear}.A_log": (32,), f"{linear}.dt_bias": (32,)}
        shapes |= _gated(f"{prefix}.mlp.shared_expert", 2048, 512)
        shapes |= {
            f"{prefix}.mlp.shared_expert_gate.weight": (1, 2048),
            f"{prefix}.mlp.gate.weight": (256, 2048),
            f"{prefix}.mlp.experts.gate_up_proj": (256, 2 * 512, 2048),
            f"{prefix}.mlp.experts.down_proj": (256, 2048, 512),
        }
    found: Tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
    found |= {name: ("F32", shape) for name, shape in wide.items()}
    nested = {
        name.replace("model.", "model.language_model.", 1): each for name, each in found.items()
    }
    nested["model.visual.patch_embed.proj.weight"] = ("BF16", (1152, 3, 2, 16, 16))
    nested["mtp.fc.weight"] = ("BF16", (2048, 2 * 2048))
    return config, nested


def _ends(vocabulary: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }


def _gqa(
    prefix: str, hidden: int, heads: int, kv_heads: int, head_dim: int
) -> dict[str, tuple[int, ...]]:
    """Return a layer's norms and its projections of grouped-query attention."""
    return {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (heads * head_dim, hidden),
        f"{prefix}.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        f"{prefix}.self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, heads * head_dim),
    }


def _gated(
    prefix: str,
    hidden: int,
    ffn: int,
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> dict[str, tuple[int, ...]]:
    gate, up, down = names
    return {
        f"{prefix}.{gate}.weight": (ffn, hidden),
        f"{prefix}.{up}.weight": (ffn, hidden),
        f"{prefix}.{down}.weight": (hidden, ffn),
    }
