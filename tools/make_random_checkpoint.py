"""Write a small random checkpoint of any supported family, with transformers itself.

    python tools/make_random_checkpoint.py --family mixtral --size bench --out DIR
    python tools/make_random_checkpoint.py --family deepseek_v2 --out DIR --set num_hidden_layers=3

`--size bench` is the Mixtral of tools/bench_generate.py: hidden 512, ffn 1024, 8 experts top-2, 4
layers, 8 heads, 4 KV heads, vocab 4096, 57.7M parameters. `--size tiny` (default) takes
milliseconds to run: tests and tools/gpu_suite.py make theirs on the fly. Weights are float32 and
decided by the seed alone; there is no tokenizer, since benches use token ids.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Sizes all families share; `ffn` is the experts' hidden dim, `init_std` that of weights."""

    hidden: int
    ffn: int
    experts: int
    top_k: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    init_std: float


SIZES = {
    # init_std near hidden ** -0.5, so that a tiny model's logits are far apart.
    "tiny": Size(
        hidden=64,
        ffn=64,
        experts=8,
        top_k=2,
        layers=2,
        heads=4,
        kv_heads=2,
        vocab=256,
        context=512,
        init_std=0.1,
    ),
    "bench": Size(
        hidden=512,
        ffn=1024,
        experts=8,
        top_k=2,
        layers=4,
        heads=8,
        kv_heads=4,
        vocab=4096,
        context=4096,
        init_std=0.04,
    ),
}
FAMILIES = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "minimax_m2",
    "ernie4_5_moe",
    "gpt_oss",
    "llama4_text",
    "qwen3_next",
    "qwen3_5_moe_text",
    "longcat_flash",
)
BY_TRANSFORMERS = ("granitemoe",)  # families that transformers builds, not in the GPU suite


def hugging_face_fields(family: str, size: Size) -> dict[str, Any]:
    """Return the family's config.json fields for a size, with its special features on."""
    fields: dict[str, Any] = {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "num_experts_per_tok": size.top_k,
        "max_position_embeddings": size.context,
        "initializer_range": size.init_std,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    experts = {"num_experts": size.experts, "moe_intermediate_size": size.ffn}
    if family in ("mixtral", "granitemoe"):
        return fields | {"num_local_experts": size.experts, "intermediate_size": size.ffn}
    if family == "olmoe":
        return fields | {"num_experts": size.experts, "intermediate_size": size.ffn}
    if family == "qwen2_moe":
        return (
            fields
            | experts
            | {
                "intermediate_size": 2 * size.ffn,
                "shared_expert_intermediate_size": 2 * size.ffn,
            }
        )
    if family == "qwen3_moe":
        head_dim = size.hidden // size.heads
        return (
            fields
            | experts
            | {
                "intermediate_size": 2 * size.ffn,
                "head_dim": head_dim,
                "norm_topk_prob": True,
            }
        )
    if family in ("deepseek_v2", "deepseek_v3"):
        return fields | _deepseek_fields(family, size)
    if family == "glm4_moe":
        return (
            fields
            | {name: value for name, value in experts.items() if name != "num_experts"}
            | {
                "n_routed_experts": size.experts,
                "n_shared_experts": 1,
                "intermediate_size": 2 * size.ffn,
                "head_dim": size.hidden // size.heads,
                "first_k_dense_replace": 1,
                "routed_scaling_factor": 1.5,
                "attention_bias": True,
                "use_qk_norm": True,
            }
        )
    if family == "minimax_m2":
        head_dim = size.hidden // size.heads
        return fields | {
            "num_local_experts": size.experts,
            "intermediate_size": size.ffn,
            "head_dim": head_dim,
            "rotary_dim": head_dim // 2,
        }
    if family == "ernie4_5_moe":
        less = {name: value for name, value in fields.items() if name != "num_experts_per_tok"}
        return less | {
            "moe_num_experts": size.experts,
            "moe_k": size.top_k,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": size.ffn,
            "intermediate_size": 2 * size.ffn,
        }
    if family == "gpt_oss":
        return fields | {
            "num_local_experts": size.experts,
            "intermediate_size": size.ffn,
            "head_dim": size.hidden // size.heads,
            "sliding_window": 8,
        }
    if family == "llama4_text":
        return fields | {
            "num_local_experts": size.experts,
            "num_experts_per_tok": 1,
            "intermediate_size": size.ffn,
            "intermediate_size_mlp": 2 * size.ffn,
            "interleave_moe_layer_step": 2,
            "head_dim": size.hidden // size.heads,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 8,
            "floor_scale": 4,
        }
    if family in ("qwen3_next", "qwen3_5_moe_text"):
        return fields | experts | _linear_fields(family, size)
    if family == "longcat_flash":
        return _longcat_fields(fields, size)
    raise ValueError(f"family {family!r} is not known; choose from {', '.join(FAMILIES)}")


def _deepseek_fields(family: str, size: Size) -> dict[str, Any]:
    nope = size.hidden // size.heads
    fields: dict[str, Any] = {
        "num_key_value_heads": size.heads,
        "intermediate_size": 2 * size.ffn,
        "moe_intermediate_size": size.ffn,
        "n_routed_experts": size.experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": None if family == "deepseek_v2" else size.hidden // 2,
        "kv_lora_rank": size.hidden // 2,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": nope,
        "v_head_dim": nope,
    }
    if family == "deepseek_v2":
        return fields | {"topk_method": "group_limited_greedy", "norm_topk_prob": False}
    return fields | {"norm_topk_prob": True}


def _linear_fields(family: str, size: Size) -> dict[str, Any]:
    head_dim = size.hidden // size.heads
    fields: dict[str, Any] = {
        "head_dim": head_dim,
        "full_attention_interval": 2,  # every other layer has keys; by default every fourth
        "linear_num_key_heads": size.kv_heads,
        "linear_num_value_heads": size.heads,
        "linear_key_head_dim": head_dim,
        "linear_value_head_dim": head_dim,
        "shared_expert_intermediate_size": size.ffn,
    }
    dense = {"intermediate_size": 2 * size.ffn}
    return fields | (dense if family == "qwen3_next" else {})


def _longcat_fields(fields: dict[str, Any], size: Size) -> dict[str, Any]:
    others = ("num_hidden_layers", "num_key_value_heads", "num_experts_per_tok")
    nope = size.hidden // size.heads
    return {name: value for name, value in fields.items() if name not in others} | {
        "num_layers": max(1, size.layers // 2),
        "ffn_hidden_size": 2 * size.ffn,
        "expert_ffn_hidden_size": size.ffn,
        "n_routed_experts": size.experts,
        "zero_expert_num": size.experts // 2,
        "moe_topk": size.top_k,
        "routed_scaling_factor": 1.5,
        "q_lora_rank": size.hidden // 2,
        "kv_lora_rank": size.hidden // 2,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": nope,
        "v_head_dim": nope,
        "head_dim": nope,
    }


def make_checkpoint(
    family: str,
    out: Path,
    *,
    size: str = "tiny",
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
) -> int:
    """Write config.json and float32 safetensors under `out`; return the number of parameters.

    overrides: fields of the family's config.json that replace the size's.

    Raises:
        ValueError: unknown family, size or field.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not known; choose from {', '.join(SIZES)}")
    fields = hugging_face_fields(family, SIZES[size])
    config = AutoConfig.for_model(family, **fields)
    for name, value in (overrides or {}).items():
        if not hasattr(config, name):
            raise ValueError(f"{family}'s config.json has no field {name!r}; see {type(config)}")
        fields[name] = value
    config = AutoConfig.for_model(family, **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # transformers starts norms at 1 and biases at 0: a loader that forgets one would go unseen.
        # state_dict, because DeepSeek-V3's correction bias is a buffer.
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 or name.endswith("bias"):  # ERNIE's has two dimensions
                noise = torch.randn_like(tensor) * 0.1
                tensor.copy_(noise if name.endswith(("bias", "A_log")) else 1 + noise)
    model.generation_config.eos_token_id = None
    model.save_pretrained(out)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Parse the command line and write one checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=(*FAMILIES, *BY_TRANSFORMERS), default="mixtral")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON")
    options = parser.parse_args()
    overrides = {
        name: json.loads(value)
        for name, _, value in (assignment.partition("=") for assignment in options.set)
    }
    count = make_checkpoint(
        options.family, options.out, size=options.size, seed=options.seed, overrides=overrides
    )
    print(f"{options.out}: {options.family}, {count:,} parameters, float32")


if __name__ == "__main__":
    main()
